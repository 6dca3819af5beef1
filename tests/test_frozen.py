"""What must not change: artifacts made by an earlier version load and behave as before, and so does training.

tests/golden/frozen holds a dataset, a LAM and three policies, and recorded.json what the code of that time made of
them. A change that is not about the maths leaves this file and the recording alone. After one that is:

    python tests/test_frozen.py --record             # figures and losses anew, with the artifacts as they are
    python tests/test_frozen.py --record-artifacts   # the artifacts too: then nothing tests that old ones load

All goes through the command, in this process, and through files; only `codes` and `infer` use Python objects.
Another CPU adds up in another order, hence 1e-4 on losses; where it also turns video into other RGB values than the
recording CPU (swscale, by one level of 255), tolerances are those of `OTHER_PIXELS`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from packaging.version import Version

from lapa import cli

FROZEN = Path(__file__).parent / "golden" / "frozen"
HEADS = ("bins", "chunk", "flow")
LOSS, OTHER_PIXELS = 1e-4, 1e-2
# Releases of transformers before this one may draw other first weights for the residual network of a policy.
SAME_DRAWS = Version(transformers.__version__) >= Version("5.23")
SQUARES = ("--frames", "14", "--size", "32", "--actions")
PROBED = ("reconstruction", "usage", "consistency", "transfer", "action", "information")
STEPS = ("--steps", "4", "--log-every", "1", "--device", "cpu", "--batch-size")
# Given in full, so that presets may size the flow head otherwise.
FLOW = ("--flow.width", "32", "--flow.layers", "1", "--flow.heads", "2")


def codes(lam: Path, frames_BTHWC: np.ndarray) -> np.ndarray:
    """The codes of pairs of frames."""
    from lapa.latent.model import LatentActionModel

    model = LatentActionModel.from_pretrained(lam)
    return model.codes(torch.from_numpy(frames_BTHWC).permute(0, 1, 4, 2, 3).contiguous()).numpy()


def infer(policy: Path, frames_BHWC: np.ndarray, instructions: list[str], states_BS: np.ndarray) -> np.ndarray:
    """The actions for observations [B, K, A]; the state is given to the policies that take it."""
    from lapa.policy.runtime import Policy
    from lapa.types import Observation

    actor = Policy.from_pretrained(policy, device="cpu")
    states = states_BS if actor.state_dim else [None] * len(frames_BHWC)
    rows = zip(frames_BHWC, instructions, states, strict=True)
    return actor.infer([Observation({"front": image}, words, state) for image, words, state in rows])


def lapa(*words: str | Path) -> None:
    """Runs a command in this process."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(word) for word in words])
    assert exit_.value.code in (0, None), words


def many_squares(out: Path) -> Path:
    """Enough episodes for the probe's regressions, made anew: the seed decides."""
    lapa("data", "synthetic", "--out", out, *SQUARES, "--episodes", "96", "--seed", "1")
    return out


def made(out: Path) -> dict[str, Any]:
    """Runs every stage on what is frozen, below `out`; returns what came out, in the form of recorded.json."""
    data, lam = FROZEN / "dataset", FROZEN / "lam"
    lapa("label", "--lam", lam, "--data", data, "--out", out / "labels", "--device", "cpu")
    lapa("data", "lerobot", data, "--out", out / "converted", "--size", "16", "--workers", "1")
    squares = many_squares(out / "squares")
    lapa("latent", "probe", lam, "--data", squares, "--out", out / "probe", "--device", "cpu")
    probe = json.loads((out / "probe" / "probe.json").read_text())
    losses = {}

    def train(*words: str | Path, name: str) -> Path:
        lapa(*words, "--data", data, "--out", out / name)
        losses[name] = losses_of(out / name)
        return out / name

    for preset, batch in {"debug": "16", "tiny": "4"}.items():
        shared = ("--preset", preset, *STEPS, batch)
        train("latent", "train", *shared, name=f"latent-{preset}")
        latent = train("policy", "pretrain", *shared, "--labels", out / "labels", name=f"pretrain-{preset}")
        for head in HEADS:
            flow = FLOW if head == "flow" else ()
            train("policy", "finetune", *shared, "--policy", latent, "--head", head, *flow, name=f"{head}-{preset}")
    return {
        "pixels": {"dataset": digest(pixels_of(data).tobytes()), "squares": digest(pixels_of(squares).tobytes())},
        "losses": losses,
        "labels": labels_of(out / "labels"),
        "probe": {part: probe[part] for part in PROBED},
        "converted": tables_of(out / "converted"),
        "codes": codes(lam, observed()["frames_BTHWC"]).tolist(),
        "actions": {head: acted(head).tolist() for head in HEADS},
    }


def observed() -> dict[str, np.ndarray]:
    """The recorded pairs of frames, instructions and states."""
    with np.load(FROZEN / "observations.npz") as arrays:
        return dict(arrays)


def acted(head: str) -> np.ndarray:
    seen = observed()
    words = [str(instruction) for instruction in seen["instructions_B"]]
    return infer(FROZEN / f"policy-{head}", seen["frames_BTHWC"][:, 0], words, seen["states_BS"])


def losses_of(run: Path) -> list[float]:
    """The training losses of a run, a step each."""
    (log,) = run.rglob("metrics.jsonl")
    return [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]


def labels_of(folder: Path) -> dict[str, Any]:
    """The manifest, the shards' names and schemas, and their rows."""
    shards = {path.name: pq.read_table(path) for path in sorted(folder.glob("*.parquet"))}
    return {
        "manifest": json.loads((folder / "manifest.json").read_text()),
        "schemas": {
            name: dict(zip(t.schema.names, map(str, t.schema.types), strict=True)) for name, t in shards.items()
        },
        "rows": {name: table.to_pydict() for name, table in shards.items()},
    }


def tables_of(dataset: Path) -> dict[str, Any]:
    """Digests of a dataset's tables and meta files, all but what depends on pixels."""
    found = {}
    for path in sorted(dataset.rglob("*")):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            kept = [name for name in table.schema.names if "stats/observation.images" not in name]
            content: Any = [[name, str(table.schema.field(name).type), table[name].to_pylist()] for name in kept]
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            for key in [key for key in content if key.startswith("observation.images")]:
                del content[key]
        elif path.suffix == ".mp4":
            content = None
        else:
            continue
        # The folder that was converted lies elsewhere each time.
        text = json.dumps(content, sort_keys=True).replace(str(FROZEN), "FROZEN")
        found[path.relative_to(dataset).as_posix()] = digest(text.encode())
    return found


def pixels_of(dataset: Path) -> np.ndarray:
    """Every frame of every video, decoded without the package."""
    frames = []
    for path in sorted(dataset.rglob("*.mp4")):
        with av.open(str(path)) as container:
            frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON as one level: {"a.b.0": value}."""
    if not isinstance(values, dict | list):
        return {prefix[:-1]: values}
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    return {name: leaf for key, value in pairs for name, leaf in flat(value, f"{prefix}{key}.").items()}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((FROZEN / "recorded.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frozen")


@pytest.fixture(scope="module")
def now(folder: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return made(folder)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def same_pixels(now: dict[str, Any], recorded: dict[str, Any]) -> bool:
    return now["pixels"]["dataset"] == recorded["pixels"]["dataset"]


def test_first_losses(now: dict[str, Any], recorded: dict[str, Any], same_pixels: bool) -> None:
    assert now["losses"].keys() == recorded["losses"].keys()
    for name, losses in recorded["losses"].items():
        assert len(losses) == len(now["losses"][name]) == 4
        if SAME_DRAWS or name.startswith("latent"):
            assert now["losses"][name] == pytest.approx(losses, rel=LOSS if same_pixels else OTHER_PIXELS), name


def test_labels(now: dict[str, Any], recorded: dict[str, Any], same_pixels: bool) -> None:
    ours, theirs = now["labels"], recorded["labels"]
    assert ours["schemas"] == theirs["schemas"]
    for name, rows in theirs["rows"].items():
        for column in ("episode_index", "frame_index"):
            assert ours["rows"][name][column] == rows[column]
        same = np.equal(ours["rows"][name]["codes"], rows["codes"]).mean()
        assert same == 1 if same_pixels else same > 0.98
    usage = ours["manifest"].pop("code_usage"), theirs["manifest"].pop("code_usage")
    np.testing.assert_allclose(*usage, atol=1e-9 if same_pixels else 0.02)
    assert ours["manifest"] == theirs["manifest"]


def test_a_converted_dataset(folder: Path, now: dict[str, Any], recorded: dict[str, Any]) -> None:
    assert now["converted"] == recorded["converted"]
    with np.load(FROZEN / "converted.npz") as kept:
        ours, theirs = pixels_of(folder / "converted"), kept["every_eighth"]
    assert np.abs(ours[::8].astype(float) - theirs).mean() < 0.5


def test_the_probe(now: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Regressions may be fitted by another library: their figures within 0.05."""
    ours, theirs = now["probe"], recorded["probe"]
    tolerance = 1e-3 if now["pixels"]["squares"] == recorded["pixels"]["squares"] else OTHER_PIXELS
    for part in ("reconstruction", "usage", "consistency"):
        assert flat(ours[part]) == pytest.approx(flat(theirs[part]), rel=tolerance), part

    def regressions(probe: dict[str, Any]) -> dict[str, float]:
        fits = {
            f"{kind} {code}": probe["action"][kind][code]["r2"]
            for kind, used in {
                "linear": ("codes", "quantized", "continuous"),
                "mlp": ("quantized", "continuous"),
            }.items()
            for code in used
        }
        known = {name: probe["information"][name] for name in ("known", "known_joint")}
        return {**fits, **known, "transfer": probe["transfer"]["action_r2"]}

    assert regressions(ours) == pytest.approx(regressions(theirs), abs=0.05)


def test_a_kept_lam_gives_its_codes(recorded: dict[str, Any]) -> None:
    assert codes(FROZEN / "lam", observed()["frames_BTHWC"]).tolist() == recorded["codes"]


@pytest.mark.parametrize("head", HEADS)
def test_a_kept_policy_acts_as_it_did(recorded: dict[str, Any], head: str) -> None:
    actions_BKA = acted(head)
    assert actions_BKA.dtype == np.float32
    np.testing.assert_allclose(actions_BKA, recorded["actions"][head], rtol=1e-3, atol=1e-4)


def record_artifacts() -> None:
    """The dataset, the LAM, the policies and the observations, small enough to be committed."""
    shutil.rmtree(FROZEN, ignore_errors=True)
    lapa("data", "synthetic", "--out", FROZEN / "dataset", *SQUARES, "--episodes", "24")
    with tempfile.TemporaryDirectory() as temporary:
        squares = many_squares(Path(temporary) / "squares")
        long = ("--preset", "debug", "--device", "cpu", "--steps", "1200")
        lapa("latent", "train", *long, "--data", squares, "--out", FROZEN / "lam")
    small = ("--preset", "debug", "--data", FROZEN / "dataset", "--device", "cpu")
    sizes = ("--width", "32", "--layers", "1", "--heads", "2", "--vision-widths", "8", "--num-bins", "16")
    for head in HEADS:
        state = ("--state",) if head == "chunk" else ()
        lapa(
            *("policy", "finetune", *small, "--out", FROZEN / f"policy-{head}", "--from-scratch", "--steps", "150"),
            *("--head", head, *state, *sizes, *FLOW),
        )
    for run in FROZEN.glob("*/training"):
        shutil.rmtree(run)
    frames = pixels_of(FROZEN / "dataset").reshape(24, 14, 32, 32, 3)[::3]
    np.savez_compressed(
        FROZEN / "observations.npz",
        frames_BTHWC=frames[:, [2, 5]],
        instructions_B=np.array(["move right", "move up", "move down-left", "", "fold the shirt", "move", "a", "b"]),
        states_BS=np.linspace(0, 31, 16, dtype=np.float32).reshape(8, 2),
    )


def record() -> None:
    torch.set_num_threads(1)
    if "--record-artifacts" in sys.argv:
        record_artifacts()
    with tempfile.TemporaryDirectory() as temporary:
        facts = made(Path(temporary))
        np.savez_compressed(FROZEN / "converted.npz", every_eighth=pixels_of(Path(temporary) / "converted")[::8])
    (FROZEN / "recorded.json").write_text(json.dumps(facts, sort_keys=True).replace(str(FROZEN), "FROZEN") + "\n")


if __name__ == "__main__":
    if not {"--record", "--record-artifacts"} & set(sys.argv):
        sys.exit("give --record or --record-artifacts; the module's docstring says what they write")
    record()
