"""The inverse dynamics baseline on made-up videos: it learns what moved, resumes exactly, and labels videos."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lapa.baselines import inverse, pseudo_label
from lapa.baselines.config import InverseConfig, InverseTrainConfig, PseudoLabelConfig
from lapa.baselines.inverse import InverseDynamics, Recording, augmented, held_out_figures, inverse_fingerprint
from lapa.baselines.pseudo_label import merge_pairs, pseudo_actions
from lapa.checksums import SUMS
from lapa.data import replace_actions as rewrite
from lapa.data.config import HideActionsConfig
from lapa.data.dataset import ActionSpace, Dataset
from lapa.data.metadata import EXTRA
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.engine.config import LoopConfig, OptimConfig
from lapa.errors import UserError
from lapa.files import read_json, write_json
from lapa.nn.config import tower_grid
from lapa.nn.vision import residual_tower
from lapa.policy.actions import ActionScale
from lapa.sources.synthetic import write_synthetic_dataset

SMALL = InverseConfig(image_size=32, horizon_seconds=0.3, vision_widths=(16, 32), vision_depth=1, width=64)
SPACE = ActionSpace.named(["x", "grip"], ["grip"], "delta")


def loop(steps: int, **changes) -> LoopConfig:
    optim = OptimConfig(lr=2e-3, betas=(0.9, 0.95), warmup_steps=5)
    return LoopConfig(**{"steps": steps, "batch_size": 16, "optim": optim, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inverse")
    write_synthetic_dataset(root / "robot", episodes=64, frames=8, size=32, actions=True)
    write_synthetic_dataset(root / "truth", episodes=8, frames=10, size=32, actions=True, seed=1)
    rewrite.run(HideActionsConfig(data=root / "truth", out=root / "videos"))
    return root


def train_config(root: Path, out: Path, **changes) -> InverseTrainConfig:
    return InverseTrainConfig(**{"data": (root / "robot",), "out": out, "model": SMALL, "loop": loop(2), **changes})


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    inverse.run(train_config(root, root / "inverse", loop=loop(100)))
    return root / "inverse"


def model(space: ActionSpace = SPACE, horizon: int = 3, config: InverseConfig = SMALL) -> InverseDynamics:
    torch.manual_seed(0)
    actions_TA = np.stack([np.linspace(-1, 3, 50), np.arange(50) % 2], axis=1)
    scale = ActionScale.fit(actions_TA, space.binary)
    return InverseDynamics(config, Recording(horizon, 10.0, "front", space), scale).eval()


def pairs(num: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, 2, 3, size, size), dtype=np.uint8)


def test_it_learns_how_the_square_moves(trained: Path) -> None:
    metrics = read_json(trained / "metrics.json")
    # 0.57 to 0.7, by the first weights that a release of transformers draws.
    assert metrics["held_out_r2"] > 0.4, metrics
    assert {"held_out_action_error", "held_out_r2_right", "held_out_r2_down", "torch"} <= metrics.keys()


def test_its_figures_are_reported(root: Path, trained: Path, capsys: pytest.CaptureFixture) -> None:
    finished = replace(train_config(root, trained, loop=loop(100)), resume=True)
    inverse.run(replace(finished, json=True))
    shown = capsys.readouterr()
    assert json.loads(shown.out) == read_json(trained / "metrics.json") and "next: lapa baseline" in shown.err
    inverse.run(finished)
    assert capsys.readouterr().out.startswith("validation split: action error 0.")


def test_pseudo_labels_are_near_the_truth_of_new_videos(root: Path, trained: Path) -> None:
    before = open_dataset(root / "videos")
    pseudo_label.run(PseudoLabelConfig(inverse=trained, data=root / "videos", out=root / "labelled", device="cpu"))
    labelled, truth = open_dataset(root / "labelled"), open_dataset(root / "truth")
    predicted_NA, true_NA = (np.concatenate([d.actions(e) for e in range(8)]) for d in (labelled, truth))
    constant = np.abs(true_NA - true_NA.mean(0)).mean()
    assert np.abs(predicted_NA - true_NA).mean() < 0.6 * constant
    assert labelled.episodes == truth.episodes and labelled.action_space == truth.action_space
    assert np.array_equal(labelled.frames(3), truth.frames(3)) and labelled.state_dim is None
    assert labelled.extra["inverse_fingerprint"] == inverse_fingerprint(trained)
    assert labelled.extra["source_fingerprint"] == before.fingerprint != labelled.fingerprint


def test_training_resumes_bitwise(root: Path, tmp_path: Path) -> None:
    inverse.run(train_config(root, tmp_path / "whole", loop=loop(4)))
    inverse.run(train_config(root, tmp_path / "parts", loop=loop(4, stop_after=2)))
    assert not (tmp_path / "parts/config.json").exists()
    inverse.run(train_config(root, tmp_path / "parts", loop=loop(4), resume=True))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_cameras_of_other_names_are_learned_from_unless_one_is_named(root: Path, tmp_path: Path) -> None:
    robot = open_dataset(root / "robot")
    names = robot.action_space.names
    writer = DatasetWriter(
        tmp_path / "wrist", fps=10, cameras={"wrist": (32, 32)}, action_names=names, control=robot.action_space.control
    )
    for episode in range(4):
        frames = {"wrist": robot.frames(episode, np.arange(8))}
        writer.add_episode(frames, "move", actions=robot.actions(episode))
    writer.finish()
    config = train_config(root, tmp_path / "out", data=(root / "robot", tmp_path / "wrist"))
    inverse.run(config)
    assert InverseDynamics.from_pretrained(tmp_path / "out").recording.camera == "front"
    with pytest.raises(UserError, match="unknown camera 'front'"):
        inverse.run(replace(config, out=tmp_path / "no", camera="front"))


def test_a_saved_model_predicts_the_same(tmp_path: Path) -> None:
    before = model()
    before.save_pretrained(tmp_path, run={"seed": 0}, metrics={"action_error": 1.0})
    after = InverseDynamics.from_pretrained(tmp_path)
    np.testing.assert_array_equal(after.predict(pairs(3)), before.predict(pairs(3)))
    assert (after.config, after.recording) == (before.config, before.recording)
    assert after.recording == Recording(3, 10.0, "front", SPACE) and after.horizon_frames == 3 and not after.training


def test_the_fingerprint_is_of_weights_and_config_not_of_the_folder(tmp_path: Path) -> None:
    before = model()
    for name in ("one", "other"):
        before.save_pretrained(tmp_path / name, run={"seed": 0}, metrics={"action_error": 1.0})
    with torch.no_grad():
        next(before.parameters()).add_(1)
    before.save_pretrained(tmp_path / "trained", run={"seed": 0}, metrics={"action_error": 1.0})
    one, other, trained = (inverse_fingerprint(tmp_path / name) for name in ("one", "other", "trained"))
    assert one == other != trained


def test_predictions_are_in_the_robots_units_and_switches_are_exact() -> None:
    predicted_BKA = model().predict(torch.from_numpy(pairs(5)))
    assert predicted_BKA.shape == (5, 3, 2) and predicted_BKA.dtype == np.float32
    assert set(np.unique(predicted_BKA[..., 1])) <= {0.0, 1.0} and np.abs(predicted_BKA[..., 0] - 1).max() <= 2.0
    assert model().predict(pairs(0)).shape == (0, 3, 2)


def test_a_prediction_depends_on_its_own_pair_only() -> None:
    together, alone = model().predict(pairs(4)), model().predict(pairs(4)[2:3])
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)


@pytest.mark.parametrize("horizon", [1, 3, 5])
@pytest.mark.parametrize("num_pairs", [1, 2, 7])
def test_pseudo_labels_are_the_weighted_mean_of_all_predictions_of_a_step(horizon: int, num_pairs: int) -> None:
    """The slow, literal twin: for every step, look through all pairs, which count by its distance to their ends."""
    rng = np.random.default_rng(horizon)
    predicted_PKA = np.stack([rng.normal(size=(num_pairs, horizon)), rng.integers(0, 2, (num_pairs, horizon))], axis=-1)
    expected = []
    for step in range(num_pairs + horizon - 1):
        within = {p: step - p for p in range(num_pairs) if p <= step < p + horizon}
        weights = [min(k, horizon - 1 - k) + 1 for k in within.values()]
        x, grip = np.average([predicted_PKA[p, k] for p, k in within.items()], axis=0, weights=weights)
        expected.append([x, float(grip >= 0.5)])
    merged_TA = merge_pairs(predicted_PKA.astype(np.float32), model().scale)
    np.testing.assert_allclose(merged_TA, [*expected, expected[-1]], rtol=1e-5, atol=1e-6)


class Oracle:
    """Knows the true actions of all pairs, in the order in which they are asked for."""

    config = SMALL

    def __init__(self, dataset: Dataset, horizon: int) -> None:
        self.horizon_frames = horizon
        actions = [dataset.actions(episode) for episode in range(len(dataset.lengths))]
        self.scale = ActionScale.fit(np.concatenate(actions))
        self.windows = iter([a[t : t + horizon] for a in actions for t in range(len(a) - horizon)])
        self.largest_batch = 0

    def predict(self, frames_BTCHW: np.ndarray) -> np.ndarray:
        assert frames_BTCHW.shape[1:] == (2, 3, 32, 32)
        self.largest_batch = max(self.largest_batch, len(frames_BTCHW))
        return np.stack([next(self.windows) for _ in frames_BTCHW])


@pytest.mark.parametrize("window", [4, 512])
def test_an_oracles_pseudo_labels_are_the_truth(root: Path, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", window)
    truth = open_dataset(root / "truth")
    oracle = Oracle(truth, horizon=3)
    actions = pseudo_actions(oracle, truth, "front", batch_size=3)
    assert sorted(actions) == list(range(8)) and oracle.largest_batch == 3 and not list(oracle.windows)
    for episode, actions_TA in actions.items():
        # The made-up square's last action is the one before it, as a pseudo-label's is.
        np.testing.assert_allclose(actions_TA, truth.actions(episode), rtol=1e-5)


def test_episodes_too_short_for_a_pair_are_left_out_and_counted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # The only camera of a dataset is read, whatever its name.
    writer = DatasetWriter(tmp_path / "videos", fps=10, cameras={"video": (32, 32)})
    for number, length in enumerate((3, 4, 2, 9)):
        writer.add_episode({"video": np.zeros((length, 32, 32, 3), np.uint8)}, f"task {number}")
    writer.finish()
    config = PseudoLabelConfig(inverse=trained, data=tmp_path / "videos", out=tmp_path / "out", device="cpu")
    pseudo_label.run(config)
    assert "2 of 4 episodes left out" in capsys.readouterr().err
    kept = open_dataset(tmp_path / "out")
    assert [episode.instruction for episode in kept.episodes] == ["task 1", "task 3"]
    assert [len(kept.actions(episode)) for episode in range(2)] == [4, 9]


def test_finished_pseudo_labels_are_accepted_if_they_are_this_models(
    root: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = PseudoLabelConfig(inverse=trained, data=root / "videos", out=tmp_path / "out", device="cpu")
    pseudo_label.run(config)
    pseudo_label.run(replace(config, resume=True))
    assert "already complete" in capsys.readouterr().err
    model(open_dataset(root / "truth").action_space).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"{EXTRA}: begun with other settings"):
        pseudo_label.run(replace(config, inverse=tmp_path / "other", resume=True))
    with pytest.raises(ValueError, match="already holds a finished result"):
        pseudo_label.run(config)


def test_both_frames_are_augmented_alike() -> None:
    """What did not move does not move: the shift is one and the colours change together."""
    first = torch.from_numpy(pairs(6)[:, 0])
    torch.manual_seed(0)
    changed = augmented(torch.stack([first, first], dim=1))
    assert torch.equal(changed[:, 0], changed[:, 1]) and not torch.equal(changed[:, 0], first.float())
    assert changed.shape == (6, 2, 3, 32, 32) and changed.min() >= 0 and changed.max() <= 255
    grey = torch.full((4, 2, 3, 32, 32), 100, dtype=torch.uint8)
    flat = augmented(grey).flatten(3)
    assert (flat.amax(-1) == flat.amin(-1)).all() and len(flat[:, 0, :, 0].unique()) > 4, "each pair its own colours"


def test_augmentation_is_left_out_where_it_is_not_asked_for() -> None:
    batch = {"frames_BTCHW": torch.from_numpy(pairs(4)), "actions_BKA": torch.zeros(4, 3, 2)}
    plain, shaken = (model(config=replace(SMALL, augment=on)) for on in (False, True))
    evaluated, trained = ([m.train(mode)(batch).loss.item() for m in (plain, shaken)] for mode in (False, True))
    assert evaluated[0] == evaluated[1] == trained[0] != trained[1]


def test_held_out_figures_are_those_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs, an action each; the second dimension never changes and so has no R2."""
    true_NKA = np.array([[[0.0, 5.0]], [[2.0, 5.0]]], np.float32)
    predicted_NKA = np.array([[[1.0, 5.0]], [[2.0, 5.0]]], np.float32)

    class Pairs:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict:
            return {"frames_TCHW": pairs(2)[index], "index": index, "episode": 0}

        def actions_between(self, index: int) -> np.ndarray:
            return true_NKA[index]

    trained = model(horizon=1)
    monkeypatch.setattr(trained, "predict", lambda frames_BTCHW: predicted_NKA[: len(frames_BTCHW)])
    figures = held_out_figures(Pairs())(trained)  # type: ignore[arg-type]
    assert figures == {"held_out_action_error": 0.25, "held_out_r2": 0.5, "held_out_r2_x": 0.5}


def test_a_towers_grid_is_what_it_gives() -> None:
    tower = residual_tower((8, 16, 32), 1, in_channels=6)
    features = tower(torch.zeros(1, 6, 48, 48)).last_hidden_state
    assert features.shape == (1, 32, 3, 3) and tower_grid(48, (8, 16, 32)) == 3
    with pytest.raises(ValueError, match="not a multiple of the vision tower's stride 16"):
        tower_grid(40, (8, 16, 32))


def test_nothing_held_out_is_allowed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inverse.run(train_config(root, tmp_path / "all", held_out=0.0))
    assert "nothing is evaluated" in capsys.readouterr().err
    assert not [name for name in read_json(tmp_path / "all/metrics.json") if name.startswith("held_out")]


def test_training_refuses_what_does_not_fit(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no actions"):
        inverse.run(train_config(root, tmp_path / "out", data=(root / "videos",)))
    write_synthetic_dataset(tmp_path / "fast", episodes=2, frames=12, size=32, fps=20.0, actions=True)
    with pytest.raises(ValueError, match=r"fast: 0\.3 s are 6 frames at 20 fps, in .*robot 3 at 10 fps"):
        inverse.run(train_config(root, tmp_path / "out", data=(root / "robot", tmp_path / "fast")))
    with pytest.raises(ValueError, match="unknown camera 'frnt'; did you mean 'front'"):
        inverse.run(train_config(root, tmp_path / "out", camera="frnt"))
    with pytest.raises(ValueError, match="--shard"):
        inverse.run(train_config(root, tmp_path / "out", loop=loop(2, shard=True)))
    with pytest.raises(ValueError, match="is or contains"):
        inverse.run(train_config(root, root / "robot", overwrite=True))
    assert open_dataset(root / "robot")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera": "frnt"}, "unknown camera 'frnt'"),
        ({"model": replace(SMALL, horizon_seconds=2.0)}, "are too short for a horizon of 2 s"),
    ],
)
def test_a_mistake_does_not_cost_the_model_that_was_to_be_replaced(
    root: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    model().save_pretrained(tmp_path)
    before = inverse_fingerprint(tmp_path)
    with pytest.raises(ValueError, match=message):
        inverse.run(train_config(root, tmp_path, overwrite=True, **changes))
    assert inverse_fingerprint(tmp_path) == before


def test_pseudo_labelling_refuses_what_does_not_fit(root: Path, trained: Path, tmp_path: Path) -> None:
    def label(data: Path, **changes) -> None:
        options = {"inverse": trained, "data": data, "out": tmp_path / "out", "device": "cpu", **changes}
        pseudo_label.run(PseudoLabelConfig(**options))

    write_synthetic_dataset(tmp_path / "fast", episodes=2, frames=12, size=32, fps=20.0)
    with pytest.raises(ValueError, match="6 frames at 20 fps, but 3 at the 10 fps of"):
        label(tmp_path / "fast")
    write_synthetic_dataset(tmp_path / "short", episodes=2, frames=3, size=32)
    with pytest.raises(ValueError, match="all 2 episodes are too short"):
        label(tmp_path / "short")
    with pytest.raises(ValueError, match=r"has no camera 'side'.*--camera .front"):
        label(root / "videos", camera="side")
    with pytest.raises(ValueError, match="is or lies inside"):
        label(root / "videos", out=root / "videos" / "labelled")
    with pytest.raises(ValueError, match="no finished inverse dynamics model"):
        label(root / "videos", inverse=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no finished inverse dynamics model"):
        InverseDynamics.from_pretrained(tmp_path)
    model().save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "bare")
    (tmp_path / "bare/actions.safetensors").unlink()
    with pytest.raises(ValueError, match=r"actions\.safetensors: missing"):
        InverseDynamics.from_pretrained(tmp_path / "bare")
    (tmp_path / "model" / SUMS).unlink()
    save_file({"place.weight": torch.zeros(2)}, tmp_path / "model/model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: does not fit"):
        InverseDynamics.from_pretrained(tmp_path / "model")
    write_json(tmp_path / "model/config.json", {"policy": {}})
    with pytest.raises(ValueError, match=r"config\.json: not the config of an inverse dynamics model"):
        InverseDynamics.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "frames", [pairs(2).astype(np.float32), pairs(2)[:, :1], pairs(2)[0], np.zeros((1, 2, 3, 16, 16), np.uint8)]
)
def test_frames_of_another_kind_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 of shape \[B, 2, 3, 32, 32\], got"):
        model().predict(frames)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="stride 8"):
        replace(SMALL, image_size=30)
    with pytest.raises(ValueError, match="must be above 0"):
        replace(SMALL, horizon_seconds=0.0)
