"""One bit of one file is flipped, as disks and networks do; then the artifact is used.

A flip is held where the use is refused in one line, or gives what it gives without the flip.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fault_groups.interrupted import words
from fault_groups.made import Case, contents
from fault_groups.processes import Ended, Fault, ask, lapa, start_lapa
from lapa import cli

# Of each artifact, so many videos are flipped.
VIDEOS = 2
CONVERTED = "videos/observation.images.video/chunk-000"


@dataclass(frozen=True)
class Artifact:
    """What is flipped. folder: makes it, or returns where it is; use: what comes of it there; names: of its files."""

    folder: Callable[[], Path]
    use: Callable[[Path], Ended]
    names: Sequence[str]


# Parts of a model's folder; the rest is its training, which is over.
MODEL = ("SHA256SUMS", "config", "actions", "head", "model", "processor")
# Files in which a flip passed unseen most often, or that hold most of what was computed.
OFTEN = ("checkpoint.pt", "journal.jsonl", "model.safetensors")
# Commands that are stopped half way: the file whose growth is waited for, and the files that are flipped.
HALVES = {
    "convert": ("meta/journal.jsonl", ("meta/journal.jsonl", f"{CONVERTED}/file-000.mp4")),
    "train": ("training/checkpoint.pt", ("training/checkpoint.pt",)),
    "finetune": ("training/checkpoint.pt", ("training/checkpoint.pt",)),
    "label": ("episodes-*.parquet", ("episodes-000000-000001.parquet",)),
    "evaluate": ("episodes.jsonl", ("episodes.jsonl", "config.json")),
}


def flips(made: Path, quick: bool) -> list[Case]:
    """Every file of every artifact, finished and half made."""
    uses = {
        "robot": (read_dataset, ("",)),
        "convert": (read_dataset, ("",)),
        "labels": (read_labels, ("",)),
        "lam": (use_lam, MODEL),
        "latent_policy": (use_policy, MODEL),
        "policy": (use_policy, MODEL),
        "inverse": (use_inverse, MODEL),
    }
    artifacts = {
        title: Artifact(partial(Path, made / title), partial(_asked, use), names_in(made / title, only))
        for title, (use, only) in uses.items()
    }
    resumed = partial(_resumed, made, "evaluate")
    artifacts["evaluate"] = Artifact(partial(Path, made / "evaluate"), resumed, ("results.json", "config.json"))
    for name, (_, files) in HALVES.items():
        artifacts[f"half of {name}"] = Artifact(partial(half, made, name), partial(_resumed, made, name), files)
    cases = [
        Case(f"{title}: {name} {number}", partial(_flip, artifact, name))
        for title, artifact in artifacts.items()
        for name in artifact.names
        for number in range(12 if name.endswith(OFTEN) else 4)
    ]
    return Random(0).sample(cases, 40) if quick else cases


def names_in(folder: Path, only: tuple[str, ...]) -> list[str]:
    """The files that are flipped: those whose names begin so, and of videos a few."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    videos = [path for path in found if path.suffix == ".mp4"][VIDEOS:]
    names = [path.relative_to(folder).as_posix() for path in found if path not in videos]
    return [name for name in names if name.startswith(only)]


@cache
def half(made: Path, name: str) -> Path:
    """The output of a command that was killed half way."""
    out, pattern = made / f"half-{name}-{os.getpid()}", HALVES[name][0]
    for _ in range(30):
        shutil.rmtree(out, ignore_errors=True)
        process = start_lapa(*words(name), "--out", out, folder=made)
        while not _begun(out, pattern) and not _ended(process.pid):
            time.sleep(0.002)
        process.kill()
        if process.wait().status < 0 and _begun(out, pattern):
            return out
    raise Fault(f"{name} was never stopped half way")


def _begun(out: Path, pattern: str) -> bool:
    found = list(out.glob(pattern))
    if pattern.endswith(".jsonl"):
        return bool(found) and found[0].read_bytes().count(b"\n") >= 4
    return len(found) > ("*" in pattern)


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _flip(artifact: Artifact, name: str, folder: Path, chance: Random) -> None:
    whole, copy = _whole(artifact.folder, artifact.use), folder / "copy"
    shutil.copytree(artifact.folder(), copy)
    data = bytearray((copy / name).read_bytes())
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    data[place] ^= 1 << bit
    (copy / name).write_bytes(data)
    ended = artifact.use(copy)
    if ended.refused() or ended.answer == whole:
        return
    if name.endswith(".mp4") and _checks_refuse(copy):
        return
    raise Fault(f"bit {bit} of byte {place} of {len(data)} gives another result without a word")


def _checks_refuse(dataset: Path) -> bool:
    """Whether `lapa data check`, which reads videos to their ends, refuses the dataset."""
    verbs = {verb.name for verb in cli.VERBS}
    return "data check" in verbs and lapa("data", "check", dataset, folder=dataset.parent).refused() is not None


@cache
def _whole(made: Callable[[], Path], use: Callable[[Path], Ended]) -> object:
    """What comes of the artifact without a flip."""
    folder = made()
    copy = folder.with_name(f"{folder.name}-whole-{os.getpid()}")
    shutil.copytree(folder, copy)
    ended = use(copy)
    ended.require_done()
    shutil.rmtree(copy)
    return ended.answer


def _asked(read: Callable[[Path], str], folder: Path) -> Ended:
    return ask(lambda: read(folder), folder.parent)


def _resumed(made: Path, name: str, folder: Path) -> Ended:
    """Resumes a command in the folder; the answer is the contents in the end, without the journals."""
    ended = lapa(*words(name), "--out", folder, "--resume", folder=made)
    found = contents(folder) if ended.status == 0 else {}
    return Ended(ended.status, ended.output, ended.seconds, ended.memory, found)


def digest(*values: object) -> str:
    """A hash of arrays and plain values."""
    total = hashlib.sha256()
    for value in values:
        total.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return total.hexdigest()


def read_dataset(folder: Path) -> str:
    """Reads all of a dataset that commands read."""
    from lapa.data.spec import open_dataset

    dataset = open_dataset(folder)
    values: list[object] = [dataset.fps, dataset.cameras, dataset.action_space, dataset.lengths.tolist()]
    for number in range(len(dataset)):
        values += [dataset.instruction(number), *(dataset.frames(number, None, camera) for camera in dataset.cameras)]
        if dataset.action_space is not None:
            values += [dataset.actions(number), dataset.states(number)]
    return digest(*values)


def read_labels(folder: Path) -> str:
    """Reads codes and embeddings."""
    from lapa.data.labels import Labels

    labels = Labels.open(folder)
    manifest = labels.manifest
    values: list[object] = [manifest.horizon_seconds, manifest.codebook_size, manifest.lam_fingerprint, manifest.camera]
    for episode in range(manifest.num_episodes):
        values += [*labels.codes(episode), labels.embeddings(episode)]
    return digest(*values)


def use_lam(folder: Path) -> str:
    """Encodes pairs of frames, and decodes."""
    import torch

    from lapa.latent.model import LatentActionModel

    model = LatentActionModel.from_pretrained(folder)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 2, 3, 32, 32), np.uint8))
    with torch.no_grad():
        action = model.encode(frames)
        assert action.codes_BL is not None
        decoded = model.decode(frames[:, 0], action.codes_BL)
    return digest(model.horizon, action.codes_BL.numpy(), action.z_BLD.numpy(), decoded.numpy(), *weights(model))


def use_policy(folder: Path) -> str:
    """Acts, or predicts codes where the policy has not learned to act."""
    from lapa.policy.runtime import load_policy

    policy = load_policy(folder).to("cpu")
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    seen = {"front": image, "instruction": "move up-left"}
    if not policy.acts:
        return digest(policy.predict_codes([seen]), *weights(policy.model))
    state = {"state": np.ones(policy.state_dim, np.float32)} if policy.state_dim else {}
    return digest(policy.fps, policy.action_space, policy.infer({**seen, **state}), *weights(policy.model))


def use_inverse(folder: Path) -> str:
    """Predicts the actions between two frames."""
    from lapa.baselines.inverse import InverseDynamics

    model = InverseDynamics.from_pretrained(folder)
    side = model.config.image_size
    frames = np.random.default_rng(0).integers(0, 255, (2, 2, 3, side, side), np.uint8)
    return digest(model.recording, model.predict(frames), *weights(model))


def weights(model: Any) -> list[np.ndarray]:
    """All of a model's weights, also those that a few predictions do not need."""
    return [tensor.numpy() for tensor in model.state_dict().values()]
