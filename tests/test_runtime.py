"""A policy folder acts: what it needs, what it returns, what it refuses."""

import json
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from lapa.data.dataset import ActionSpace
from lapa.policy.actions import ActionBins
from lapa.policy.backbones import TinyConfig, create_backbone
from lapa.policy.checkpoint import PolicyParts, load_policy, save_policy
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Policy
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
    save_policy(root / "pretrained", PolicyParts(pretrained, processor), run={})
    acting = pretrained.grown(
        replace(
            pretrained.config,
            vocabulary=replace(vocabulary, bins=256),
            action_space=SPACE,
            action_bins=tuple(bins.counts_A.tolist()),
            chunk=3,
        )
    )
    save_policy(root / "acting", PolicyParts(acting, processor, bins), run={"loop": {"steps": 1}})
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
    with pytest.raises(ValueError, match=r"observation 1 lacks the camera wrist \(it brings front\)"):
        policy.infer([OBSERVATIONS[0], Observation({"front": picture()}, "open the drawer")])


def test_a_state_that_is_not_finite_is_refused(policy):
    broken = Observation(OBSERVATIONS[0].images, "open the drawer", np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="observation 0: its state is not finite"):
        policy.infer([broken])


def test_a_picture_without_pixels_is_refused(policy):
    with pytest.raises(ValueError, match="camera front: expected a uint8 image"):
        policy.infer([Observation({"front": np.zeros((0, 8, 3), np.uint8), "wrist": picture()}, "")])


def test_a_policy_that_was_only_pretrained_says_so(folders):
    with pytest.raises(ValueError, match=r"only pretrained.*lapa policy finetune"):
        Policy.from_pretrained(folders / "pretrained")


def test_weights_survive_the_folder(folders):
    one, other = load_policy(folders / "pretrained"), load_policy(folders / "acting")
    rows = one.model.config.vocabulary.size
    before, after = (p.model.backbone.language.lm_head.weight for p in (one, other))
    assert torch.equal(after[:rows], before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such policy folder"),
        (lambda folder: (folder / "config.json").unlink(), "unfinished or not a policy"),
        (lambda folder: (folder / "config.json").write_text('{"model": 1}'), "not the config of a policy"),
        (lambda folder: (folder / "model" / "model.safetensors").unlink(), r"model\.safetensors: missing"),
        (
            lambda folder: (folder / "model" / "model.safetensors").write_bytes(b"x" * 99),
            r"model\.safetensors: does not fit",
        ),
        (lambda folder: (folder / "actions.safetensors").unlink(), r"actions\.safetensors: missing"),
        (lambda folder: shutil.rmtree(folder / "processor"), r"no tokenizer\.json"),
    ],
)
def test_a_spoilt_folder_is_named(folders, tmp_path, spoil, message):
    folder = tmp_path / "policy"
    shutil.copytree(folders / "acting", folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(folder)


def test_weights_of_another_size_are_refused(folders, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(folders / "acting", folder)
    written = json.loads((folder / "config.json").read_text())
    written["policy"]["backbone"]["layers"] = 2
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="does not fit the policy's config"):
        Policy.from_pretrained(folder)


def test_a_policy_of_before_there_were_several_statistics_loads(folders, policy, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(folders / "acting", folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["policy"].pop("spaces") == []
    (folder / "config.json").write_text(json.dumps(written))
    again = Policy.from_pretrained(folder, device="cpu")
    np.testing.assert_array_equal(again.infer(OBSERVATIONS), policy.infer(OBSERVATIONS))
    with pytest.raises(ValueError, match=r"policy: has one set of statistics, .* leave out --statistics-key bridge"):
        Policy.from_pretrained(folder, statistics_key="bridge")


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
