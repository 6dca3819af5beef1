"""The plugin packages/lerobot_policy_lapa in LeRobot: its actions and its loss are lapa's own.

Skipped where LeRobot or the plugin is not installed; `make check-lerobot` runs it, and LeRobot's commands.
"""

import json
import shutil
from fnmatch import fnmatch
from importlib.metadata import distribution

import numpy as np
import pytest
import torch

from acting_policies import CAMERAS, INSTRUCTION, acting_policy, observation
from lapa import cli
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.data.writer import DatasetWriter
from lapa.engine.config import OptimConfig
from lapa.engine.optim import build_optimizer, learning_rate
from lapa.errors import UserError
from lapa.policy.config import ExportLeRobotConfig
from lapa.policy.lerobot import export, open_lerobot, processor_steps
from lapa.policy.runtime import Policy, load_policy
from lapa.sources.synthetic import write_synthetic_dataset
from test_policy_training import write_labels

pytest.importorskip("lerobot_policy_lapa", reason="needs LeRobot and its plugin lerobot_policy_lapa")
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot_policy_lapa import LapaConfig, LapaPolicy, make_lapa_pre_post_processors

HEADS = ("bins", "chunk", "flow")
KINDS = [("tiny", head) for head in HEADS] + [("smolvlm", "chunk"), ("gemma3", "bins"), ("lwm", "bins")]


def exported(policy: Policy, folder):
    policy.save_pretrained(folder / "policy", run={})
    export(ExportLeRobotConfig(folder / "policy", folder / "exported"))
    return folder / "exported"


def opened(folder, *options: str) -> LapaPolicy:
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--device=cpu", *options])
    config.pretrained_path = folder
    return get_policy_class(config.type).from_pretrained(folder, config=config)


def as_lerobot(seen: dict) -> dict:
    """One observation as LeRobot's tools give it: CHW floats in [0, 1], without the batch."""
    images = {
        f"observation.images.{name}": torch.from_numpy(seen[name]).permute(2, 0, 1).float() / 255 for name in CAMERAS
    }
    return {**images, "observation.state": torch.from_numpy(seen["state"]), "task": seen["instruction"]}


def batched(observations: list[dict]) -> dict:
    rows = [as_lerobot(seen) for seen in observations]
    return {
        key: [row[key] for row in rows] if key == "task" else torch.stack([row[key] for row in rows]) for key in rows[0]
    }


def test_lerobot_finds_the_plugin_by_its_name() -> None:
    assert distribution("lerobot_policy_lapa").metadata["Name"] == "lerobot_policy_lapa"
    register_third_party_plugins()
    assert PreTrainedConfig.get_choice_class("lapa") is LapaConfig
    assert get_policy_class("lapa") is LapaPolicy


@pytest.mark.parametrize(("backbone", "head"), KINDS)
def test_actions_are_those_of_infer(backbone, head, tmp_path):
    policy = acting_policy(backbone, head, tmp_path)
    folder = exported(policy, tmp_path)
    loaded = opened(folder)
    before, after = make_pre_post_processors(
        loaded.config, pretrained_path=folder, preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    wanted_KA = policy.infer(observation())
    seen = before(as_lerobot(observation()))
    chosen = [after(loaded.select_action(seen))[0].numpy() for _ in range(policy.chunk)]
    np.testing.assert_array_equal(np.stack(chosen), wanted_KA)
    several = [observation(seed) for seed in range(3)]
    chunk_BKA = loaded.predict_action_chunk(batched(several))
    np.testing.assert_array_equal(chunk_BKA.numpy(), policy.infer(several))


@pytest.mark.parametrize(("backbone", "head"), KINDS)
def test_the_loss_is_that_of_finetuning(backbone, head, tmp_path):
    policy = acting_policy(backbone, head, tmp_path)
    loaded = opened(exported(policy, tmp_path))
    rng = np.random.default_rng(0)
    several = [observation(seed) for seed in range(4)]
    actions_BKA = rng.normal(size=(4, policy.chunk, policy.action_dim)).astype(np.float32)
    padded_BK = np.array([[False, False, True]] * 2 + [[False] * 3] * 2)
    items = [
        {
            **{"index": 0, "dataset": "robot", "instruction": INSTRUCTION, "state_S": seen["state"]},
            "images": {name: seen[name] for name in CAMERAS},
            "actions_KA": actions_KA,
            "action_mask_K": ~padded_K,
        }
        for seen, actions_KA, padded_K in zip(several, actions_BKA, padded_BK, strict=True)
    ]
    batch = batched(several) | {"action": torch.from_numpy(actions_BKA), "action_is_pad": torch.from_numpy(padded_BK)}
    torch.manual_seed(7)
    wanted = policy.model(policy.collate(items))
    torch.manual_seed(7)
    loss, parts = loaded(batch)
    assert loss.item() == wanted.loss.item() and set(parts) == set(wanted.parts)
    loss.backward()
    wanted.loss.backward()
    pairs = zip(loaded.model.parameters(), policy.model.parameters(), strict=True)
    for ours, theirs in pairs:
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    # In training the weights have another layout, which adds up in another order.
    torch.manual_seed(7)
    wanted = policy.model.train()(policy.collate(items))
    torch.manual_seed(7)
    again, _ = loaded.train()(batch)
    assert again.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    padded = {**batch, "action_is_pad": torch.zeros_like(batch["action_is_pad"])}
    torch.manual_seed(7)
    assert loaded(padded)[0].item() != pytest.approx(wanted.loss.item(), rel=1e-5)


def test_an_action_queue_ends_with_its_steps_and_with_the_episode(tmp_path):
    policy = acting_policy("tiny", "chunk", tmp_path)
    loaded = opened(exported(policy, tmp_path), "--n_action_steps=2")
    first, second = (batched([observation(seed)]) for seed in range(2))
    one_KA, other_KA = (policy.infer(observation(seed)) for seed in range(2))
    chosen = [loaded.select_action(first) for _ in range(2)] + [loaded.select_action(second)]
    np.testing.assert_array_equal(torch.cat(chosen).numpy(), [*one_KA[:2], other_KA[0]])
    loaded.reset()
    np.testing.assert_array_equal(loaded.select_action(first)[0].numpy(), one_KA[0])


def test_what_is_saved_is_what_was_loaded(tmp_path):
    policy = acting_policy("smolvlm", "chunk", tmp_path)
    folder = exported(policy, tmp_path)
    loaded = opened(folder)
    pipelines = make_lapa_pre_post_processors(loaded.config)
    for one in (loaded, *pipelines):
        one.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(open_lerobot(tmp_path / "saved").infer(observation()), policy.infer(observation()))
    again = opened(tmp_path / "saved").predict_action_chunk(batched([observation()]))
    np.testing.assert_array_equal(again[0].numpy(), policy.infer(observation()))
    for name in processor_steps(({}, {})):
        written, theirs = (json.loads((one / f"{name}.json").read_text()) for one in (folder, tmp_path / "saved"))
        assert written == theirs
    before, after = (json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "saved"))
    assert before.items() <= after.items()


def test_optimizer_and_learning_rate_are_those_of_finetuning(tmp_path):
    policy = acting_policy("tiny", "chunk", tmp_path)
    policy.model.freeze()
    optim = OptimConfig(lr=2e-3, betas=(0.8, 0.9), weight_decay=0.1, warmup_steps=3)
    folder = exported(policy, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values |= {"optimizer_lr": 2e-3, "optimizer_betas": [0.8, 0.9], "optimizer_weight_decay": 0.1}
    (folder / "config.json").write_text(json.dumps(values | {"scheduler_warmup_steps": 3}))
    loaded = opened(folder)
    optimizer = loaded.config.get_optimizer_preset().build(loaded.get_optim_params())
    wanted = build_optimizer(policy.model, optim)
    for ours, theirs in zip(optimizer.param_groups, wanted.param_groups, strict=True):
        assert [p.shape for p in ours["params"]] == [p.shape for p in theirs["params"]]
        assert all(ours[name] == theirs[name] for name in ("lr", "betas", "weight_decay", "eps"))
    scheduler = loaded.config.get_scheduler_preset().build(optimizer, 10)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(optim, step, 10))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("head", HEADS)
def test_a_new_policy_begins_as_one_of_finetuning(head, tmp_path):
    data = write_synthetic_dataset(tmp_path / "squares", episodes=3, frames=8, size=32, actions=True)
    config = LapaConfig(device="cpu", preset="debug", head=head, chunk_size=4, state=True)
    meta = LeRobotDatasetMetadata("somebody/squares", data.root)
    made = make_policy(config, ds_meta=meta)
    assert list(made.policy.statistics) == ["squares"] and made.policy.fps == 10
    assert list(config.input_features) == ["observation.images.front", "observation.state"]
    assert config.action_feature_names == ["right", "down"] and config.action_delta_indices == [0, 1, 2, 3]
    steps = EpisodeSteps([open_dataset(data.root)], 32, chunk=4, state=True)
    items = [steps[0], steps[7]]
    batch = {
        "observation.images.front": torch.stack([torch.from_numpy(one["images"]["front"]) for one in items])
        .permute(0, 3, 1, 2)
        .float()
        / 255,
        "observation.state": torch.stack([torch.from_numpy(one["state_S"]) for one in items]),
        "task": [one["instruction"] for one in items],
        "action": torch.stack([torch.from_numpy(one["actions_KA"]) for one in items]),
        "action_is_pad": torch.stack([torch.from_numpy(~one["action_mask_K"]) for one in items]),
    }
    torch.manual_seed(7)
    loss, _ = made.eval()(batch)
    torch.manual_seed(7)
    assert loss.item() == made.model(made.policy.collate(items)).loss.item()


def test_a_new_policy_starts_from_a_pretrained_one(tmp_path):
    data = write_synthetic_dataset(tmp_path / "squares", episodes=3, frames=8, size=32, actions=True)
    write_labels(tmp_path / "labels", data)
    paths = ["--data", str(data.root), "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "latent")]
    with pytest.raises(SystemExit):
        cli.main(["policy", "pretrain", "--preset", "debug", "--steps", "2", "--device", "cpu", *paths])
    config = LapaConfig(device="cpu", preset="debug", start=str(tmp_path / "latent"), head="chunk")
    made = make_policy(config, ds_meta=LeRobotDatasetMetadata("somebody/squares", data.root))
    pretrained = load_policy(tmp_path / "latent")
    ours, theirs = (one.backbone.language.model.layers[0].mlp.up_proj.weight for one in (made.model, pretrained.model))
    assert torch.equal(ours, theirs) and made.policy.config.latent_length
    assert config.start is None


def test_what_does_not_fit_is_named(tmp_path):
    policy = acting_policy("tiny", "chunk", tmp_path)
    folder = exported(policy, tmp_path)
    loaded = opened(folder)
    batch = batched([observation()])
    lacking = {key: value for key, value in batch.items() if key != "observation.images.wrist"}
    with pytest.raises(UserError, match=r"lacks the camera wrist \(it has observation.images.front\); .*--rename_map"):
        loaded.select_action(lacking)
    with pytest.raises(UserError, match=r"lacks observation.state; this policy reads 2 numbers"):
        loaded.select_action({key: value for key, value in batch.items() if key != "observation.state"})
    with pytest.raises(UserError, match=r"a state of shape \(3,\); this policy reads 2 numbers"):
        loaded.select_action({**batch, "observation.state": torch.zeros(1, 3)})
    with pytest.raises(UserError, match=r"--policy.chunk_size=7: the policy was made with 3; leave the option out"):
        opened(folder, "--chunk_size=7")
    with pytest.raises(UserError, match="n_action_steps is 4; a chunk has 3 actions"):
        opened(folder, "--n_action_steps=4")
    with pytest.raises(UserError, match="did you mean 'chunk'"):
        LapaPolicy(LapaConfig(device="cpu", head="chunks"))
    with pytest.raises(UserError, match="needs at least one camera"):
        LapaPolicy(LapaConfig(device="cpu"))
    data = write_synthetic_dataset(tmp_path / "squares", episodes=2, frames=8, size=32, actions=True)
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--device=cpu"])
    config.pretrained_path = folder
    with pytest.raises(UserError, match=r"predicts actions of 3 dimensions \(x, y, grip\), the dataset .* has 2"):
        make_policy(config, ds_meta=LeRobotDatasetMetadata("somebody/squares", data.root))


def test_a_repository_of_the_hub_needs_only_what_lerobot_pushes(tmp_path, monkeypatch):
    policy = acting_policy("smolvlm", "chunk", tmp_path)
    opened(exported(policy, tmp_path)).save_pretrained(tmp_path / "saved")
    asked = {}

    def snapshot(repo_id: str, allow_patterns: list[str], **options) -> str:
        """As LeRobot pushes: files of three kinds; and as the hub sends them: those that are asked for."""
        asked.update(options, repo_id=repo_id)
        for path in (tmp_path / "saved").rglob("*"):
            name = str(path.relative_to(tmp_path / "saved"))
            pushed = any(fnmatch(name, pattern) for pattern in ("*.safetensors", "*.json", "*.yaml", "*.md"))
            if path.is_file() and pushed and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("lerobot_policy_lapa.modeling_lapa.snapshot_download", snapshot)
    loaded = LapaPolicy.from_pretrained("somebody/policy", revision="v2", token="secret")
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("somebody/policy", "v2", "secret")
    chunk_BKA = loaded.predict_action_chunk(batched([observation()]))
    np.testing.assert_array_equal(chunk_BKA[0].numpy(), policy.infer(observation()))


def test_features_of_one_number_have_no_axis_of_their_own_in_lerobot(tmp_path):
    writer = DatasetWriter(
        tmp_path / "data", fps=10, cameras={"front": (32, 32)}, action_names=["grip"], state_names=["angle"]
    )
    rng = np.random.default_rng(0)
    for _ in range(2):
        frames = {"front": rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)}
        writer.add_episode(frames, "turn", actions=rng.normal(size=(6, 1)), states=rng.normal(size=(6, 1)))
    data = writer.finish()
    dataset = LeRobotDataset("somebody/data", data.root, delta_timestamps={"action": [0.0, 0.1]}, video_backend="pyav")
    config = LapaConfig(device="cpu", preset="debug", chunk_size=2, state=True)
    made = make_policy(config, ds_meta=dataset.meta).eval()
    before, after = make_lapa_pre_post_processors(config)
    batch = before(torch.utils.data.default_collate([dataset[number] for number in (0, 3, 5)]))
    loss, _ = made(batch)
    items = EpisodeSteps([data], 32, chunk=2, state=True)
    wanted = made.model(made.policy.collate([{**items[number], "dataset": "data"} for number in (0, 3, 5)]))
    assert loss.item() == pytest.approx(wanted.loss.item(), rel=1e-3)
    assert after(made.select_action(batch)).shape == (3, 1)
    assert after(made.select_action(before(dataset[0]))).shape[-1] == 1
