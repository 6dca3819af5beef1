"""The latent policy as a model: its tokenizer, its losses, and decoding against a literal twin."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lapa import config as configs
from lapa.data.dataset import ActionSpace
from lapa.policy.actions import ActionBins, KeyedSpace, Statistics
from lapa.policy.backbones import renew_backbone
from lapa.policy.backbones.tiny import TinyProcessor, load_tokenizer, train_tokenizer
from lapa.policy.config import FlowConfig, TinyConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import collate_steps, observe
from lapa.policy.vocabulary import Vocabulary

SMALL = TinyConfig(image_size=32, vision_widths=(16, 32), width=32, layers=2, heads=2)
TOKENIZER = train_tokenizer(["open the drawer", "press the button", "push the puck to the goal"])
INSTRUCTIONS = ["open the drawer", "", "schließe die 抽屉 🤖 quickly, please"]
CAMERAS = ("front", "wrist")
TEXT = len(TOKENIZER)
PROCESSOR = TinyProcessor(TOKENIZER, SMALL.image_size)
TWO = ActionSpace(("x", "y"), (False, False))


def small_policy(**changes) -> LatentPolicy:
    """Latent actions of 3 tokens out of 8; robot actions of 2 dimensions with 5 and 3 bins, two time steps."""
    torch.manual_seed(0)
    fields = {
        "vocabulary": Vocabulary(text=TEXT, latent=8, bins=16),
        "cameras": CAMERAS,
        "backbone": SMALL,
        "latent_length": 3,
        "spaces": (KeyedSpace("robot", TWO),),
        "action_bins": (5, 3),
        "chunk": 2,
    }
    config = PolicyConfig(**{**fields, **changes})
    backbone = renew_backbone(config.backbone, config.vocabulary, num_cameras=len(config.cameras))
    return LatentPolicy(config, backbone).eval()


@pytest.fixture(scope="module")
def policy() -> LatentPolicy:
    return small_policy()


@pytest.fixture(scope="module")
def batch(policy) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    images = [[rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in CAMERAS] for _ in INSTRUCTIONS]
    return observe(policy.config, PROCESSOR, {}, images, INSTRUCTIONS)


def with_latents(batch):
    return {**batch, "latent_BL": TEXT + torch.tensor([[0, 7, 3], [2, 0, 0], [5, 5, 1]])}


def with_actions(batch):
    bins_BKA = torch.tensor([[[0, 0], [4, 2]], [[1, 2], [3, 0]], [[2, 1], [0, 1]]])
    return {
        **batch,
        "action_BKA": TEXT + 8 + bins_BKA,
        "action_mask_BK": torch.tensor([[True, True], [True, False], [True, True]]),
    }


def test_text_of_any_kind_has_tokens_and_comes_back(tmp_path):
    TOKENIZER.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    for tokenizer in (TOKENIZER, loaded):
        for text in [*INSTRUCTIONS, "say </s> or <s>", "tabs\tand\nlines", "نص עברית हिन्दी"]:
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in ids[1:-1], "what a user writes is no control token"
            assert tokenizer.decode(ids[1:-1]) == text
    assert len(TOKENIZER("open the drawer")["input_ids"]) == 5, "known words are single tokens"
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "absent")


def test_the_tokenizer_depends_on_its_texts_alone():
    texts = ["push the puck", "pull the puck", "open it"]
    one, other = train_tokenizer(texts), train_tokenizer([*reversed(texts), *texts])
    assert one.get_vocab() == other.get_vocab()


def test_text_is_padded_on_the_left(batch):
    assert batch["mask_BT"].sum(1).tolist()[1] == 2
    assert (batch["mask_BT"][:, -1] == 1).all()


@pytest.mark.parametrize("kind", ["latent", "action"])
def test_a_padded_batch_equals_its_samples_alone(policy, batch, kind):
    full = with_latents(batch) if kind == "latent" else with_actions(batch)
    target = policy.latent_field if kind == "latent" else policy.action_field
    tokens = full["latent_BL"] if kind == "latent" else full["action_BKA"].flatten(1)
    together = policy.field_logits(full, target, tokens)
    decoded, log_probabilities = policy.decode(batch, target)
    for i, mask_T in enumerate(batch["mask_BT"].bool()):
        alone = {
            "images_BVHWC": batch["images_BVHWC"][i : i + 1],
            "tokens_BT": batch["tokens_BT"][i : i + 1, mask_T],
            "mask_BT": batch["mask_BT"][i : i + 1, mask_T],
        }
        torch.testing.assert_close(policy.field_logits(alone, target, tokens[i : i + 1])[0], together[i])
        one, log_probability = policy.decode(alone, target)
        assert torch.equal(one[0], decoded[i])
        torch.testing.assert_close(log_probability[0], log_probabilities[i])


@pytest.mark.parametrize("kind", ["latent_field", "action_field"])
def test_cached_decoding_equals_the_full_forward(policy, batch, kind):
    """The slow, literal twin: greedy decoding by a full forward for each token, and one over all of them."""
    target = getattr(policy, kind)
    decoded, log_probabilities = policy.decode(batch, target)
    assert decoded.shape == (3, target.length)
    full = policy.field_logits(batch, target, decoded).log_softmax(-1)
    codes = policy.config.vocabulary.codes(target.segment, decoded)
    torch.testing.assert_close(full.gather(-1, codes[..., None])[..., 0], log_probabilities)

    grown = torch.full_like(decoded, policy.config.vocabulary.rows(target.segment).start)
    for step in range(target.length):
        best = policy.field_logits(batch, target, grown)[:, step].argmax(-1)
        grown[:, step] = best + policy.config.vocabulary.rows(target.segment).start
    assert torch.equal(grown, decoded)


@pytest.mark.parametrize("kind", ["latent_field", "action_field"])
def test_compiled_decoding_in_a_cache_of_fixed_size_equals_the_plain_one(policy, batch, kind):
    compiled = small_policy()
    compiled.backbone.compile_steps(backend="eager")
    for _ in range(2):
        plain, fast = (one.decode(batch, getattr(policy, kind)) for one in (policy, compiled))
        assert torch.equal(plain[0], fast[0]), "also when the cache is used again"
        torch.testing.assert_close(plain[1], fast[1])
    assert compiled.state_dict().keys() == policy.state_dict().keys()


def test_decoding_stays_within_the_bins_of_each_dimension(policy, batch):
    """Whatever the head prefers: rows of other segments and bins that a dimension lacks are never said."""
    biased = small_policy()
    head = biased.backbone.language.lm_head.weight
    with torch.no_grad():
        head[:TEXT] += 10
        head[TEXT + 8 + 3 :] += 5
    bins_BKA = biased.predict_actions(batch)
    assert bins_BKA.shape == (3, 2, 2)
    assert (bins_BKA < torch.tensor([5, 3])).all() and (bins_BKA >= 0).all()
    codes_BL = biased.predict_codes(batch)
    assert codes_BL.shape == (3, 3) and (codes_BL < 8).all()


def test_no_code_ends_the_sequence(batch):
    """The released code stops at latent code 2; here a policy that says nothing but 2 says it L times."""
    stubborn = small_policy()
    rows = stubborn.backbone.language.lm_head.weight
    with torch.no_grad():
        stubborn.backbone.language.model.norm.weight.zero_()
        rows[TEXT : TEXT + 8] = 0
    # All logits are equal then, and greedy decoding takes the first: 0. A bias in the hidden state prefers 2.
    stubborn.backbone.language.model.norm.register_forward_hook(lambda norm, inputs, hidden: hidden + 1)
    with torch.no_grad():
        rows[TEXT + 2] = 1
    assert stubborn.predict_codes(batch).tolist() == [[2, 2, 2]] * 3


def test_the_loss_is_the_cross_entropy_of_the_field_within_its_segment(policy, batch):
    """Against the whole model called literally, sample by sample, with logits over the whole vocabulary."""
    full = with_latents(batch)
    losses = []
    for i, mask_T in enumerate(full["mask_BT"].bool()):
        embed = policy.backbone.language.get_input_embeddings()
        images = policy.backbone.embed_images(full["images_BVHWC"][i : i + 1])
        text = torch.cat([full["tokens_BT"][i, mask_T], full["latent_BL"][i]])
        logits = policy.backbone.language(inputs_embeds=torch.cat([images, embed(text[None])], 1)).logits[0]
        predicting = logits[-4:-1, TEXT : TEXT + 8]
        losses.append(F.cross_entropy(predicting, full["latent_BL"][i] - TEXT))
    torch.testing.assert_close(policy(full).loss, torch.stack(losses).mean())


def test_the_loss_touches_its_segment_alone(batch):
    fresh = small_policy()
    fresh(with_actions(batch)).loss.backward()
    rows = fresh.backbone.language.lm_head.weight.grad.abs().sum(-1)
    assert (rows[: TEXT + 8] == 0).all() and (rows[TEXT + 8 : TEXT + 8 + 5] > 0).all() and (rows[-11:] == 0).all()


def test_actions_past_the_end_of_an_episode_do_not_count(policy, batch):
    full = with_actions(batch)
    other = {**full, "action_BKA": full["action_BKA"].clone()}
    other["action_BKA"][1, 1] = TEXT + 8
    assert torch.equal(policy(full).loss, policy(other).loss)
    nothing = {**full, "action_mask_BK": torch.zeros(3, 2, dtype=torch.bool)}
    assert policy(nothing).loss == 0


def test_token_accuracy_of_its_own_words_is_one(policy, batch):
    decoded, _ = policy.decode(batch, policy.latent_field)
    assert policy({**batch, "latent_BL": decoded}).parts["token_accuracy"] == 1


def test_finetuning_keeps_everything_but_the_new_rows():
    none = {"spaces": (), "action_bins": (), "chunk": 0}
    pretrained = small_policy(vocabulary=Vocabulary(text=TEXT, latent=8), **none)
    before = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    config = replace(
        pretrained.config,
        vocabulary=Vocabulary(text=TEXT, latent=8, bins=256),
        spaces=(KeyedSpace("robot", TWO),),
        action_bins=(200, 3),
        chunk=4,
        cameras=("a", "b"),
    )
    grown = pretrained.grown(config)
    after = grown.state_dict()
    assert grown.config == config and before.keys() == after.keys()
    assert all(torch.equal(after[name][: len(tensor)], tensor) for name, tensor in before.items())
    longer = [name for name in before if before[name].shape != after[name].shape]
    assert longer == ["backbone.language.model.embed_tokens.weight", "backbone.language.lm_head.weight"]
    again = grown.grown(replace(config, chunk=1))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in after.items())


def test_every_camera_and_its_slot_matter(policy, batch):
    images_BVHWC, latents = batch["images_BVHWC"], with_latents(batch)["latent_BL"]
    logits = policy.field_logits(batch, policy.latent_field, latents)
    others = [images_BVHWC.flip(1)]
    for camera in range(images_BVHWC.shape[1]):
        others.append(images_BVHWC.clone())
        others[-1][:, camera] = 255 - others[-1][:, camera]
    for other in others:
        changed = policy.field_logits({**batch, "images_BVHWC": other}, policy.latent_field, latents)
        assert (changed - logits).abs().max() > 1e-4


def test_frozen_vision_gets_no_gradient(batch):
    frozen = small_policy()
    frozen.freeze(vision=True)
    frozen.train()(with_latents(batch)).loss.backward()
    assert all(parameter.grad is None for parameter in frozen.backbone.vision.parameters())
    assert frozen.backbone.project.weight.grad is not None
    assert not any("running" in name for name in frozen.state_dict()), "the weights are the whole state"


def test_the_language_model_is_an_ordinary_one(policy, batch):
    """Plain `generate` of transformers with nothing but a mask over the logits says the same latent action."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class OnlyLatents(LogitsProcessor):
        def __call__(self, input_ids, scores):
            rows = policy.config.vocabulary.rows("latent")
            allowed = torch.full_like(scores, -torch.inf)
            allowed[:, rows.start : rows.stop] = scores[:, rows.start : rows.stop]
            return allowed

    language = policy.backbone.language
    prefix = torch.cat(
        [policy.backbone.embed_images(batch["images_BVHWC"]), language.get_input_embeddings()(batch["tokens_BT"])], 1
    )
    said = language.generate(
        inputs_embeds=prefix,
        attention_mask=F.pad(batch["mask_BT"], (prefix.shape[1] - batch["mask_BT"].shape[1], 0), value=1),
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([OnlyLatents()]),
    )
    assert torch.equal(said - TEXT, policy.predict_codes(batch))


def test_collating_says_actions_as_tokens_and_refuses_codes_that_are_not_there():
    config = small_policy().config
    bins = ActionBins.fit(np.stack([np.arange(5.0), np.arange(5.0) % 3], axis=1))
    collate = partial(collate_steps, config, PROCESSOR, {"robot": Statistics(bins)})
    image = np.zeros((32, 32, 3), np.uint8)
    item = {"images": {"front": image, "wrist": image}, "instruction": "open the drawer", "index": 4, "dataset": "a"}
    actions = {"actions_KA": np.array([[4, 2], [0, 1]], np.float32), "action_mask_K": np.array([True, False])}
    batch = collate([{**item, **actions}])
    assert (batch["action_BKA"] - TEXT - 8).tolist() == [[[4, 2], [0, 1]]]
    assert batch["action_mask_BK"].tolist() == [[True, False]] and batch["index"].tolist() == [4]
    with pytest.raises(ValueError, match=r"latent segment lie in \[0, 8\)"):
        collate([{**item, "codes_L": np.array([0, 8, 1]), "has_codes": True}])
    with pytest.raises(ValueError, match="expected actions of 2 dimensions"):
        collate([{**item, **actions, "actions_KA": np.zeros((2, 7), np.float32)}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_weight": 0.01}, "text around a latent action"),
        ({"latent_weight": -1.0}, "at least 0"),
        ({"cameras": ("front", "front")}, "each named once"),
        ({"latent_length": 0}, "go together"),
        ({"chunk": 0}, "go together"),
        ({"action_bins": (5,)}, "of 2 dimensions do not fit"),
        ({"action_bins": (17, 2)}, "do not fit the 16 rows"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_policy(**changes)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not a multiple of the vision tower's stride"):
        TinyConfig(image_size=60)
    with pytest.raises(ValueError, match="does not divide into 3 heads"):
        TinyConfig(width=64, heads=3)


def test_a_config_survives_its_file(policy, tmp_path):
    configs.save(policy.config, tmp_path / "config.json")
    assert configs.load(PolicyConfig, tmp_path / "config.json") == policy.config


def acting_policy(head: str, **changes) -> LatentPolicy:
    """Acts through a head that gives real numbers, knows the robot's state, and still says latent actions."""
    return small_policy(
        vocabulary=Vocabulary(text=TEXT, latent=8, state=4, query=3 if head == "chunk" else 0),
        head=head,
        action_bins=(),
        chunk=3,
        state_bins=(4, 2),
        flow=FlowConfig(width=16, layers=1, heads=2, steps=3),
        **changes,
    )


def with_targets(policy, batch):
    rng = torch.Generator().manual_seed(1)
    return {
        **batch,
        "state_BS": policy.config.vocabulary.tokens("state", torch.tensor([[0, 1], [3, 0], [2, 1]])),
        "action_BKA": torch.rand(3, 3, 2, generator=rng) * 2 - 1,
        "action_mask_BK": torch.tensor([[True] * 3, [True, False, False], [True] * 3]),
    }


@pytest.mark.parametrize("head", ["chunk", "flow"])
def test_a_padded_batch_acts_as_its_samples_do_alone(batch, head):
    policy = acting_policy(head)
    full = with_targets(policy, batch)
    together = policy.predict_actions(full)
    assert together.shape == (3, 3, 2)
    for i, mask_T in enumerate(batch["mask_BT"].bool()):
        alone = {
            "images_BVHWC": full["images_BVHWC"][i : i + 1],
            "tokens_BT": full["tokens_BT"][i : i + 1, mask_T],
            "mask_BT": full["mask_BT"][i : i + 1, mask_T],
            "state_BS": full["state_BS"][i : i + 1],
        }
        torch.testing.assert_close(policy.predict_actions(alone)[0], together[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["chunk", "flow"])
def test_the_robots_state_matters(batch, head):
    policy = acting_policy(head)
    full = with_targets(policy, batch)
    other = {**full, "state_BS": full["state_BS"].flip(0)}
    assert (policy.predict_actions(full) - policy.predict_actions(other)).abs().max() > 1e-6


@pytest.mark.parametrize("head", ["chunk", "flow"])
def test_a_head_trains_all_that_it_reads(batch, head):
    """And nothing else: the language model's own head says nothing here, and would stall distributed training."""
    policy = acting_policy(head).train()
    policy.freeze()
    policy(with_targets(policy, batch)).loss.backward()
    silent = {name for name, p in policy.named_parameters() if p.requires_grad and p.grad is None}
    assert silent == set()
    assert policy.backbone.language.lm_head.weight.grad is None
    rows = policy.backbone.language.get_input_embeddings().weight.grad.abs().sum(-1)
    used = [*policy.config.vocabulary.rows("state"), *policy.config.vocabulary.rows("query")]
    assert (rows[used] > 0).all() and (rows[list(policy.config.vocabulary.rows("latent"))] == 0).all()


@pytest.mark.parametrize("head", ["bins", "chunk"])
def test_latent_actions_can_be_learned_beside_the_robots(batch, head):
    """The two losses are added; a sample without a label has none of its own."""
    both = small_policy(latent_weight=0.5) if head == "bins" else acting_policy(head, latent_weight=0.5)
    actions = with_actions(batch) if head == "bins" else with_targets(both, batch)
    labelled = {**with_latents(batch), "latent_mask_B": torch.tensor([True, False, True])}
    state = {"state_BS": actions["state_BS"]} if both.config.state_dim else {}
    total = both({**actions, **labelled})
    expected = both(actions).loss + 0.5 * both({**labelled, **state}).loss
    torch.testing.assert_close(total.loss, expected)
    assert "latent_token_accuracy" in total.parts
    changed = {**labelled, "latent_BL": labelled["latent_BL"].clone()}
    changed["latent_BL"][1] = TEXT
    torch.testing.assert_close(both({**actions, **changed}).loss, total.loss)


def test_text_around_a_latent_action_is_read_and_learned(batch):
    """The loss by hand: one full pass over opening, latent action and closing, each in its own rows."""
    opening, closing = (5, 9), (7,)
    tagged = small_policy(latent_opening=opening, latent_closing=closing, text_weight=0.25)
    full = with_latents(batch)
    said = torch.cat([torch.tensor(opening).expand(3, -1), full["latent_BL"], torch.tensor(closing).expand(3, -1)], 1)
    hidden, _ = tagged.backbone.read(batch, said[:, :-1])
    logits = tagged.backbone.language.lm_head(hidden[:, -6:])
    latent = F.cross_entropy(logits[:, 2:5, TEXT : TEXT + 8].flatten(0, 1), full["latent_BL"].flatten() - TEXT)
    text = F.cross_entropy(logits[:, [0, 1, 5], :TEXT].flatten(0, 1), said[:, [0, 1, 5]].flatten())
    torch.testing.assert_close(tagged(full).loss, 0.75 * latent + 0.25 * text)
    decoded, log_probabilities = tagged.decode(batch, tagged.latent_field)
    again = tagged.field_logits(batch, tagged.latent_field, decoded).log_softmax(-1)
    torch.testing.assert_close(again.gather(-1, (decoded - TEXT)[..., None])[..., 0], log_probabilities)


def test_checkpointed_activations_give_the_same_gradients(batch):
    plain, frugal = small_policy().train(), small_policy().train()
    frugal.checkpoint_activations()
    for policy in (plain, frugal):
        policy(with_latents(batch)).loss.backward()
    assert all(block.gradient_checkpointing for block in frugal.backbone.language.model.layers)
    for one, other in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-6)
