"""The released latent policy: the golden of the authors' code, its mistakes, and the backbone made of it."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch

from lapa.errors import UserError
from lapa.policy.config import LwmConfig, VQGANConfig
from lapa.policy.vocabulary import Vocabulary
from lapa.released import from_released, lwm
from lapa.released import lapa7b as released
from lapa.released.lapa7b import TABLES, pairs_to_halves
from lapa.released.lwm import LwmBackbone, LwmProcessor
from literal_lapa7b import literal_policy
from released_files import IMAGE_CODES, VISION_ROWS, golden

FACTS, TENSORS, PARAMS = golden("vla_delta")
SIZES = FACTS["config"]
NAMES = {"tokens_BT": "tokens", "vision_mask_BT": "vision_masks", "latent_mask_BT": "delta_masks"}
INPUTS = {ours: TENSORS[f"in.input_{theirs}"] for ours, theirs in NAMES.items()}
TARGETS = {ours: TENSORS[f"in.target_{theirs}"] for ours, theirs in NAMES.items()}
TARGETS["loss_mask_BT"] = TENSORS["in.loss_masks"]
START = (TENSORS["gen.input_ids"], TENSORS["gen.vision_masks"], TENSORS["gen.attention_mask"])
SMALL_VQGAN = VQGANConfig(
    resolution=16,
    hidden_channels=32,
    channel_mult=(1, 1, 1),
    num_res_blocks=1,
    z_channels=4,
    quantized_embed_dim=4,
    num_embeddings=IMAGE_CODES,
)
SMALL = LwmConfig(
    width=32,
    inner_width=64,
    layers=2,
    heads=2,
    vqgan=SMALL_VQGAN,
    vision_rows=VISION_ROWS,
    end_of_frame=126,
    end_of_vision=127,
)


@pytest.fixture(params=["released", "fixed"])
def layout(request) -> str:
    return request.param


def test_logits_of_all_heads_are_those_of_the_released_code():
    logits = from_released(PARAMS, SIZES).logits(*INPUTS.values())
    for segment, theirs in (("text", "text"), ("vision", "vision"), ("latent", "delta")):
        torch.testing.assert_close(logits[segment], TENSORS[f"out.{theirs}_logits"], atol=5e-5, rtol=0)
    assert "bins" not in logits


def test_logits_in_bfloat16_stay_near_those_of_the_released_code():
    logits = from_released(PARAMS, SIZES).bfloat16().logits(*INPUTS.values())["latent"].float()
    ours, theirs = ((x - TENSORS["out.delta_logits"]).norm() for x in (logits, TENSORS["out.delta_logits_bf16"]))
    assert ours < 1.5 * theirs


def test_losses_and_gradients_are_those_of_the_released_code():
    model = literal_policy(PARAMS, SIZES, "released")
    losses = model.shifted_losses(INPUTS, TARGETS)
    assert losses["latent"].item() == pytest.approx(FACTS["losses"]["delta"], rel=1e-5)
    assert losses["text"].item() == pytest.approx(FACTS["losses"]["text"], rel=1e-5)
    assert losses["vision"].item() == 0
    assert losses["total"].item() == pytest.approx(FACTS["loss_total"], rel=1e-5)
    losses["total"].backward()
    norms = released_gradient_norms(model)
    assert norms.keys() == FACTS["grad_norms"].keys()
    for name, norm in FACTS["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    assert math.hypot(*norms.values()) == pytest.approx(FACTS["grad_norm_global"], rel=1e-4)


def released_gradient_norms(model) -> dict[str, float]:
    gradients = {name: parameter.grad for name, parameter in model.language.named_parameters()}
    norms = {released.FINAL_NORM: gradients["model.norm.weight"].norm().item()}
    for theirs, ours in released.LAYER.items():
        layers = [gradients[f"model.layers.{layer}.{ours}"].norm().item() for layer in range(2)]
        norms[f"{released.STACKED}/{theirs}"] = math.hypot(*layers)
    for segment, (table, head, _) in TABLES.items():
        if rows := model.vocabulary.rows(segment):
            norms[table] = gradients["model.embed_tokens.weight"][rows.start : rows.stop].norm().item()
            norms[head] = gradients["lm_head.weight"][rows.start : rows.stop].norm().item()
    return norms


def test_the_misplaced_parenthesis_is_of_the_released_layout_alone():
    theirs, fixed = (literal_policy(PARAMS, SIZES, name) for name in ("released", "fixed"))
    with torch.no_grad():
        bug, right = theirs.shifted_losses(INPUTS, TARGETS), fixed.shifted_losses(INPUTS, TARGETS)
        logits = fixed.logits(*INPUTS.values())["text"].log_softmax(-1)
    assert bug["latent"] == right["latent"] and bug["text"] != right["text"]
    by_hand = []
    for row in range(3):
        counted = TARGETS["loss_mask_BT"][row].bool() & ~TARGETS["latent_mask_BT"][row].bool()
        by_hand.append(-logits[row][counted, TARGETS["tokens_BT"][row][counted].long()].mean())
    torch.testing.assert_close(right["text"], torch.stack(by_hand).mean())


def test_whole_sequences_give_the_loss_of_shifted_ones(layout):
    model = literal_policy(PARAMS, SIZES, layout)
    whole = {name: torch.cat([INPUTS[name][:, :1], TARGETS[name]], dim=1) for name in NAMES}
    whole["loss_mask_BT"] = torch.nn.functional.pad(TARGETS["loss_mask_BT"], (1, 0))
    with torch.no_grad():
        torch.testing.assert_close(model.losses(whole)["total"], model.shifted_losses(INPUTS, TARGETS)["total"])


def test_greedy_codes_are_those_of_the_released_code(layout):
    """The golden's three decodings say the same codes: which layout is which shows in the next test alone."""
    model = literal_policy(PARAMS, SIZES, layout)
    expected = TENSORS["gen.generate_eos2" if layout == "released" else "gen.nocache_greedy"]
    assert torch.equal(model.generate(*START, length=4), expected.long())


def test_code_2_ends_the_sequence_in_the_released_layout_alone():
    # The golden's own weights say no code 2; the head that they lack is made to say it second.
    model = literal_policy(PARAMS, SIZES, "fixed")
    rows = model.vocabulary.rows("latent")
    with torch.no_grad():
        head = model.language.lm_head.weight
        head[[rows.start + 2, rows.start + 4]] = head[[rows.start + 4, rows.start + 2]].clone()
        free = model.generate(*START, length=4)
        model.layout = "released"
        ended = model.generate(*START, length=4)
    assert (free == 2).any()
    for codes, cut in zip(free.tolist(), ended.tolist(), strict=True):
        first = codes.index(2) if 2 in codes else 3
        assert cut == codes[: first + 1] + [0] * (3 - first)
    # The same rule on the authors' demonstration, whose weights were not kept.
    demo = FACTS["generation"]["eos_demo"]
    for codes, cut in zip(demo["nocache_greedy"], demo["generate_eos2"], strict=True):
        first = codes.index(2) if 2 in codes else 3
        assert cut == codes[: first + 1] + [0] * (3 - first)


def test_layers_may_be_stacked_or_apart():
    apart = {name: tensor for name, tensor in PARAMS.items() if released.STACKED not in name}
    for name in released.LAYER:
        for layer in range(2):
            apart[f"transformer/h/{layer}/{name}"] = PARAMS[f"{released.STACKED}/{name}"][layer].numpy()
    with torch.no_grad():
        logits = [from_released(params, SIZES).logits(*INPUTS.values()) for params in (PARAMS, apart)]
    assert torch.equal(logits[0]["latent"], logits[1]["latent"])


def test_a_finetuned_checkpoint_has_robot_actions_and_lwm_has_no_latent_ones():
    finetuned = {
        **PARAMS,
        "transformer/ate/embedding": torch.randn(16, 64),
        "action_head/kernel": torch.randn(64, 16),
    }
    model = literal_policy(finetuned, {**SIZES, "action_vocab_size": 16})
    action_mask = INPUTS["latent_mask_BT"]
    logits = model.logits(INPUTS["tokens_BT"], INPUTS["vision_mask_BT"], torch.zeros_like(action_mask), action_mask)
    assert logits["bins"].shape[-1] == 16
    mask = TARGETS["latent_mask_BT"]
    inputs = {**INPUTS, "latent_mask_BT": torch.zeros_like(mask), "action_mask_BT": action_mask}
    targets = {**TARGETS, "latent_mask_BT": torch.zeros_like(mask), "action_mask_BT": mask}
    losses = model.shifted_losses(inputs, targets)
    assert losses["total"] == losses["bins"] > 0

    chat = {name: tensor for name, tensor in PARAMS.items() if "dte" not in name and "delta" not in name}
    model = literal_policy(chat, SIZES)
    assert model.vocabulary == Vocabulary(text=256, vision=128)
    none = torch.zeros_like(INPUTS["latent_mask_BT"])
    assert set(model.logits(INPUTS["tokens_BT"], INPUTS["vision_mask_BT"], none)) == {"text", "vision"}
    with pytest.raises(ValueError, match="no latent segment"):
        model.logits(*INPUTS.values())
    inputs, targets = ({**given, "latent_mask_BT": none} for given in (INPUTS, TARGETS))
    assert set(model.shifted_losses(inputs, targets)) == {"text", "vision"}


def test_robot_actions_are_as_many_as_the_tables_have_unless_the_config_has_it():
    tables = {"transformer/ate/embedding": torch.zeros(245, 64), "action_head/kernel": torch.zeros(64, 245)}
    sizes = {key: value for key, value in SIZES.items() if key != "action_vocab_size"}
    assert released.check_weights({**PARAMS, **tables}, sizes).bins == 245
    with pytest.raises(ValueError, match=r"ate/embedding: shape .245, 64., expected .256, 64."):
        released.check_weights({**PARAMS, **tables}, {**sizes, "action_vocab_size": 256})
    tables["action_head/kernel"] = torch.zeros(64, 244)
    with pytest.raises(ValueError, match=r"action_head/kernel: shape .64, 244., expected .64, 245."):
        released.check_weights({**PARAMS, **tables}, sizes)


@pytest.mark.parametrize(
    "key, value",
    [("num_attention_heads", 0), ("hidden_size", "64"), ("num_hidden_layers", 2.0), ("theta", "x"), ("eof_token", -1)],
)
def test_sizes_that_are_no_sizes_are_named(key, value):
    with pytest.raises(ValueError, match=f"{key} of the released config must be"):
        released.checked_config({**SIZES, key: value})


def test_every_tensor_that_does_not_fit_is_named():
    wrong = {**PARAMS, "transformer/zte/embedding": torch.zeros(1), "lm_head/kernel": torch.zeros(64, 255)}
    del wrong["delta_head/kernel"], wrong["transformer/ln_f/kernel"]
    with pytest.raises(ValueError) as error:
        from_released(wrong, SIZES)
    for complaint in (
        "delta_head/kernel: missing, expected shape (64, 8)",
        "transformer/ln_f/kernel: missing",
        "transformer/zte/embedding: not a name of the released policy",
        "lm_head/kernel: shape (64, 255), expected (64, 256)",
    ):
        assert complaint in str(error.value)
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        from_released(PARAMS, {**SIZES, "hiden_size": 3})
    with pytest.raises(ValueError, match="needs the keys num_attention_heads"):
        from_released(PARAMS, {key: value for key, value in SIZES.items() if key != "num_attention_heads"})


def test_reordered_rows_rotate_alike():
    # A rotation of pairs (x, y) as the authors do it, against one of halves as Llama does it in transformers.
    x = torch.randn(1, 8)
    angle = torch.rand(4)
    turned = torch.view_as_real(torch.view_as_complex(x.view(4, 2)) * torch.polar(torch.ones(4), angle)).view(1, 8)
    first, second = pairs_to_halves(x, 1).chunk(2, dim=-1)
    halves = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    torch.testing.assert_close(pairs_to_halves(turned, 1), halves)


def test_the_published_model_has_the_published_number_of_parameters():
    sizes = {**released.PUBLISHED, "action_vocab_size": 256}
    vocabulary = Vocabulary(text=32000, vision=8448, latent=8)
    shapes = released.released_shapes(sizes, vocabulary, stacked=True)
    assert sum(map(math.prod, shapes.values())) == 6_807_687_168
    llama = released.llama_shapes(released.released_llama(sizes, vocabulary))
    assert sum(map(math.prod, llama.values())) == 6_807_687_168


TAGS = {"<vision>": [3, 4, 5], "</vision>": [6, 4, 5], "<delta>": [3, 7, 5], "</delta>": [6, 7, 5]}


class StubTokenizer:
    """The golden's: known tags of three tokens, and a number for each word."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        if text in TAGS:
            return TAGS[text]
        return [1 if word == "<s>" else zlib.crc32(word.encode()) % 240 + 16 for word in text.split()]


def test_sequences_are_those_that_the_released_model_was_trained_on():
    processor = LwmProcessor(StubTokenizer(), SMALL, first_code=256)
    assert SMALL.vqgan.num_tokens == FACTS["n_tokens_per_frame"]
    opening, closing = processor.tags("latent")
    for example, sequence in zip(FACTS["examples"], FACTS["sequences"], strict=True):
        tokens, vision = np.array(sequence["tokens"]), np.array(sequence["vision_mask"], bool)
        ours = np.array([*processor.tokens(example["instruction"], 1), *opening, *map(int, example["delta"]), *closing])
        assert np.array_equal(ours >= 256, vision)
        assert np.array_equal(ours[~vision], tokens[~vision])
        places = ours[vision] - 256
        assert places.tolist() == [0] * 16 + [FACTS["eov"]]
    several = processor.tokens("", 3)
    ends = [token - 256 for token in several if token > 256]
    assert ends == [FACTS["eof"], FACTS["eof"], FACTS["eov"]]


@pytest.fixture
def small() -> tuple[LwmBackbone, LwmProcessor, Vocabulary]:
    torch.manual_seed(0)
    return lwm.create(SMALL, texts=["open the drawer", "close it"], num_cameras=2, segments={"latent": 8})


def images(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in ((16, 16, 3), (20, 30, 3))]


def test_the_backbone_reads_the_codes_of_the_images(small):
    backbone, processor, vocabulary = small
    batch = processor([images(0), images(1)], ["open the drawer", ""])
    tokens = backbone.tokens(batch)
    codes = backbone.vqgan.encode(batch["images_BVHWC"].flatten(0, 1)).view(2, 2, 16)
    for row in range(2):
        vision = [token for token in tokens[row].tolist() if token in vocabulary.rows("vision")]
        codes_read = [token - vocabulary.rows("vision").start for token in vision]
        assert codes_read == [*codes[row, 0].tolist(), 126, *codes[row, 1].tolist(), 127]
    assert len(codes.unique()) > 3


def test_a_padded_batch_equals_single_ones_and_caching_equals_reading_at_once(small):
    backbone, processor, vocabulary = small
    both = processor([images(0), images(1)], ["open the drawer", ""])
    tokens = torch.tensor([[vocabulary.rows("latent").start + code for code in (1, 5, 2)]] * 2)
    with torch.no_grad():
        hidden, mask = backbone.read(both, tokens)
        first, memory = backbone.begin(both, both["tokens_BT"][:, :0], room=3)
        cached = torch.cat([first, backbone.advance(memory, tokens)], dim=1)
        torch.testing.assert_close(cached, hidden[:, -4:], atol=1e-5, rtol=1e-4)
        for row, prompt in enumerate(["open the drawer", ""]):
            alone, _ = backbone.read(processor([images(row)], [prompt]), tokens[:1])
            torch.testing.assert_close(hidden[row][mask[row].bool()], alone[0], atol=1e-5, rtol=1e-4)


def test_a_saved_backbone_comes_back_and_grows_without_changing_old_rows(small, tmp_path):
    backbone, processor, vocabulary = small
    backbone.save(tmp_path / "model")
    processor.save(tmp_path / "processor")
    loaded, its_processor = lwm.load(
        SMALL, tmp_path / "model", tmp_path / "processor", vocabulary=vocabulary, num_cameras=2
    )
    batch, again = (p([images(0)], ["open the drawer"]) for p in (processor, its_processor))
    none = torch.zeros(1, 0, dtype=torch.long)
    with torch.no_grad():
        expected = backbone.read(batch, none)[0]
        assert torch.equal(loaded.read(again, none)[0], expected)
        loaded.resize(Vocabulary(vocabulary.text, vocabulary.vision, vocabulary.latent, bins=11))
        assert loaded.language.get_output_embeddings().weight.shape[0] == vocabulary.size + 11
        assert torch.equal(loaded.read(again, none)[0], expected)
    assert not any(parameter.requires_grad for parameter in loaded.vision.parameters())
    assert loaded.blocks[-1] is loaded.vision


def test_a_model_folder_that_lacks_weights_is_refused(small, tmp_path):
    backbone, processor, vocabulary = small
    backbone.save(tmp_path / "model")
    processor.save(tmp_path / "processor")

    def load(rows: Vocabulary = vocabulary) -> None:
        lwm.load(SMALL, tmp_path / "model", tmp_path / "processor", vocabulary=rows, num_cameras=2)

    with pytest.raises(ValueError, match="rows, but the policy's vocabulary has"):
        load(Vocabulary(vocabulary.text, vocabulary.vision, vocabulary.latent, bins=3))
    other = lwm.renew(LwmConfig(**{**vars(SMALL), "layers": 1}), vocabulary, 2)
    other.save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing, left over or misshapen: model\.layers\.1"):
        load()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="no complete Llama"):
        load()
    weights.unlink()
    with pytest.raises(UserError, match="no complete Llama"):
        load()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(UserError, match="no complete Llama"):
        load()


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="heads of an even width"):
        LwmConfig(width=33)
    with pytest.raises(ValueError, match="two codes after"):
        LwmConfig(end_of_frame=10)
