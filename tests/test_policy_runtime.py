"""A policy folder acts: what it needs, what it returns, what it refuses."""

import json
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from lapa.checksums import SUMS
from lapa.data.dataset import ActionSpace
from lapa.errors import UserError
from lapa.policy.actions import ActionBins, KeyedSpace, Statistics
from lapa.policy.backbones import create_backbone
from lapa.policy.config import TinyConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Policy, load_policy
from lapa.types import Observation

RNG = np.random.default_rng(0)
ACTIONS = np.stack([np.clip(RNG.normal(size=900), -1, 1), RNG.choice([-1.0, 1.0], 900)], axis=1)
SPACE = ActionSpace(("lift", "gripper"), (False, True))
SMALL = TinyConfig(image_size=32, vision_widths=(16, 32), width=32, layers=1, heads=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two saved policies with untrained weights: one pretrained only, one that has robot actions."""
    root = tmp_path_factory.mktemp("policies")
    torch.manual_seed(0)
    bins = ActionBins.fit(ACTIONS, binary=SPACE.binary)
    backbone, processor, vocabulary = create_backbone(
        SMALL, texts=["open the drawer"], num_cameras=2, segments={"latent": 8}
    )
    pretrained = LatentPolicy(PolicyConfig(vocabulary, ("front", "wrist"), SMALL, latent_length=4), backbone)
    Policy(pretrained, processor).save_pretrained(root / "pretrained", run={})
    acting = pretrained.grown(
        replace(
            pretrained.config,
            vocabulary=replace(vocabulary, bins=256),
            spaces=(KeyedSpace("robot", SPACE),),
            action_bins=tuple(bins.counts_A.tolist()),
            chunk=3,
        )
    )
    Policy(acting, processor, {"robot": Statistics(bins)}).save_pretrained(root / "acting", run={"loop": {"steps": 1}})
    return root


@pytest.fixture(scope="module")
def policy(folders) -> Policy:
    return Policy.from_pretrained(folders / "acting", device="cpu")


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


OBSERVATIONS = [
    Observation({"front": picture(), "wrist": picture(32, 32)}, "open the drawer"),
    Observation({"front": picture(90, 50), "wrist": picture()}, ""),
    Observation({"front": picture(), "wrist": picture(), "spare": picture()}, "ouvre-le 抽屉", np.zeros(4)),
]


def test_actions_are_in_the_robots_units(policy):
    actions_BKA = policy.infer(OBSERVATIONS)
    assert actions_BKA.shape == (3, 3, 2) and actions_BKA.dtype == np.float32
    assert (np.abs(actions_BKA) <= 1).all() and set(actions_BKA[..., 1].ravel()) <= {-1.0, 1.0}
    assert policy.cameras == ("front", "wrist") and policy.chunk == 3 and policy.action_dim == 2


def test_a_batch_equals_its_observations_alone(policy):
    together = policy.infer(OBSERVATIONS)
    alone = [policy.infer([observation])[0] for observation in OBSERVATIONS]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_no_observations_give_no_actions(policy):
    assert policy.infer([]).shape == (0, 3, 2)


def test_the_folder_is_all_that_is_needed(folders, policy, tmp_path):
    shutil.copytree(folders / "acting", tmp_path / "moved")
    moved = Policy.from_pretrained(str(tmp_path / "moved"), device="cpu")
    np.testing.assert_array_equal(moved.infer(OBSERVATIONS), policy.infer(OBSERVATIONS))


def test_a_missing_camera_is_named(policy):
    with pytest.raises(ValueError, match=r"observation 1 lacks the camera wrist \(it has front\)"):
        policy.infer([OBSERVATIONS[0], Observation({"front": picture()}, "open the drawer")])


def test_a_state_that_is_not_finite_is_refused(policy):
    broken = Observation(OBSERVATIONS[0].images, "open the drawer", np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="observation 0: its state is not finite"):
        policy.infer([broken])


def test_a_picture_without_pixels_is_refused(policy):
    with pytest.raises(ValueError, match="camera front: expected an RGB image"):
        policy.infer([Observation({"front": np.zeros((0, 8, 3), np.uint8), "wrist": picture()}, "")])


def test_a_policy_that_was_only_pretrained_says_so(folders):
    with pytest.raises(ValueError, match=r"only pretrained.*lapa policy finetune"):
        Policy.from_pretrained(folders / "pretrained")


def test_weights_survive_the_folder(folders):
    one, other = load_policy(folders / "pretrained"), load_policy(folders / "acting")
    rows = one.model.config.vocabulary.size
    before, after = (p.model.backbone.language.lm_head.weight for p in (one, other))
    assert torch.equal(after[:rows], before)


# The last is what the tokenizers library refuses with a plain Exception.
DAMAGED = ("", "[]", "{}", "[" * 99_999, '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": ["a"]}}')


def damage_tokenizer(folder, text):
    (folder / "processor" / "tokenizer.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "not a policy, it has no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model": 1}'), "not the config of a policy"),
        (lambda folder: (folder / "model" / "model.safetensors").unlink(), r"model\.safetensors: missing"),
        (
            lambda folder: (folder / "model" / "model.safetensors").write_bytes(b"x" * 99),
            r"model\.safetensors: damaged or changed",
        ),
        (lambda folder: (folder / "actions.safetensors").unlink(), r"actions\.safetensors: missing"),
        (lambda folder: shutil.rmtree(folder / "processor"), r"processor/.*: missing"),
        *(
            (lambda folder, text=text: damage_tokenizer(folder, text), r"tokenizer\.json: damaged or changed")
            for text in DAMAGED
        ),
    ],
)
def test_a_spoilt_folder_is_named(folders, tmp_path, spoil, message):
    folder = tmp_path / "policy"
    shutil.copytree(folders / "acting", folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(folder)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_tokenizer_of_an_earlier_version_is_named(folders, tmp_path, text):
    folder = tmp_path / "policy"
    shutil.copytree(folders / "acting", folder)
    (folder / SUMS).unlink()
    damage_tokenizer(folder, text)
    with pytest.raises(ValueError, match=r"tokenizer\.json: damaged, or"):
        Policy.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model/model.safetensors", "actions.safetensors"])
def test_numbers_that_are_not_finite_are_refused(folders, tmp_path, name, value):
    folder = tmp_path / "policy"
    shutil.copytree(folders / "acting", folder)
    (folder / SUMS).unlink()
    arrays = {key: array.copy() for key, array in load_file(folder / name).items()}
    key = next(key for key, array in arrays.items() if array.dtype == np.float32 and not key.endswith("edges"))
    arrays[key].reshape(-1)[-1] = value
    save_file(arrays, folder / name)
    with pytest.raises(ValueError, match=rf"{name}: {key} holds numbers that are not finite"):
        Policy.from_pretrained(folder)


def test_weights_of_another_size_are_refused(folders, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(folders / "acting", folder)
    (folder / SUMS).unlink()
    written = json.loads((folder / "config.json").read_text())
    written["policy"]["backbone"]["layers"] = 2
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="does not fit the config next to it"):
        Policy.from_pretrained(folder)


def test_files_that_a_kill_left_half_written_are_no_part_of_a_policy(policy, tmp_path):
    for folder in (tmp_path, tmp_path / "model"):
        folder.mkdir(exist_ok=True)
        (folder / ".model.123.partial.safetensors").write_bytes(b"half")
    policy.save_pretrained(tmp_path)
    assert "partial" not in (tmp_path / SUMS).read_text()
    for folder in (tmp_path, tmp_path / "model"):
        (folder / ".model.124.partial.safetensors").write_bytes(b"half")
    assert load_policy(tmp_path).config == policy.config


def test_a_policy_saved_before_statistics_had_names_loads(folders, policy, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(folders / "acting", folder)
    (folder / SUMS).unlink()
    written = json.loads((folder / "config.json").read_text())
    (space,) = written["policy"].pop("spaces")
    written["policy"]["action_space"] = space["space"]
    (folder / "config.json").write_text(json.dumps(written))
    save_file(
        {name.split("/")[1]: array for name, array in load_file(folder / "actions.safetensors").items()},
        folder / "actions.safetensors",
    )
    again = Policy.from_pretrained(folder, device="cpu")
    np.testing.assert_array_equal(again.infer(OBSERVATIONS), policy.infer(OBSERVATIONS))
    with pytest.raises(ValueError, match=r"policy: unknown --statistics-key 'bridge'.*known: default"):
        Policy.from_pretrained(folder, statistics_key="bridge")


def test_one_observation_is_a_dict_of_images_of_any_kind(policy):
    front, wrist = picture(), picture()
    expected = policy.infer([Observation({"front": front, "wrist": wrist}, "open the drawer")])[0]
    for one, other in (
        (front, wrist),
        (Image.fromarray(front), Image.fromarray(wrist)),
        (torch.from_numpy(front), np.moveaxis(wrist, -1, 0)),
        (front / 255, torch.from_numpy(np.moveaxis(wrist, -1, 0).copy()).float() / 255),
    ):
        actions_KA = policy.infer({"front": one, "wrist": other, "instruction": "open the drawer"})
        np.testing.assert_array_equal(actions_KA, expected)
    assert policy.infer({"front": front, "wrist": wrist}).shape == (3, 2), "no instruction is an empty one"


def test_steps_go_through_each_chunk_and_a_reset_begins_anew(policy):
    observation = {"front": picture(), "wrist": picture(), "instruction": "open the drawer"}
    expected_KA = policy.infer(observation)
    other = {**observation, "front": picture()}
    policy.reset()
    for step in range(3):
        np.testing.assert_array_equal(policy.select_action(observation if step == 0 else other), expected_KA[step])
    np.testing.assert_array_equal(policy.select_action(other), policy.infer(other)[0])
    policy.reset()
    np.testing.assert_array_equal(policy.select_action(observation), expected_KA[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("open the drawer", "takes an observation or a list of them, got str"),
        (3, "takes an observation or a list of them, got int"),
        ([3], "observation 0 is a int; give a dict such as {'front': image"),
        ({"front": np.zeros((8, 8, 3), np.uint8)}, "lacks the camera wrist"),
        (
            {"front": np.zeros((8, 8), np.uint8), "wrist": picture()},
            r"camera front: expected an RGB image.*got uint8 \[8, 8\]",
        ),
        ({"front": np.full((8, 8, 3), 255.0), "wrist": picture()}, r"floats must lie in \[0, 1\], got 255 to 255"),
        ({"front": picture(), "wrist": picture(), "instruction": None}, "its instruction is None"),
        ({"front": picture(), "wrist": picture(), "state": "up"}, "not numbers"),
    ],
)
def test_what_is_no_observation_is_named(policy, wrong, message):
    with pytest.raises(UserError, match=message):
        policy.infer(wrong)


def test_a_policy_describes_itself(policy):
    text = repr(policy)
    assert all(words in text for words in ("front, wrist", "4 codes of 8", "3 x 2 actions by bins", "robot")), text
    assert policy.fps is None, "the rate of its data is not known"


def test_a_full_disk_is_named_with_the_folder(folders, tmp_path):
    """A file-size limit stands for it; the tokenizers library raises a bare Exception then."""
    processor = load_policy(folders / "pretrained").processor
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="full: could not be written"):
            processor.save(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
