"""A finished run that is resumed: the same options have nothing to do, others are refused, more steps go on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lapa.cli import main
from lapa.files import read_json
from lapa.sources.synthetic import write_synthetic_dataset

SMALL = ("--preset", "debug", "--steps", "2", "--batch-size", "2", "--eval-every", "100")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two datasets with actions, a latent action model, labels, and a policy, by their names."""
    root = tmp_path_factory.mktemp("made")
    for name, seed in (("a", 0), ("b", 1)):
        write_synthetic_dataset(root / name, episodes=4, frames=12, size=32, actions=True, seed=seed)
    lapa("latent", "train", *SMALL, "--data", root / "a", "--out", root / "lam")
    lapa("label", "--lam", root / "lam", "--data", root / "a", "--out", root / "labels")
    lapa("baseline", "inverse", *SMALL, "--data", root / "a", "--out", root / "inverse")
    return root


def lapa(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


# A command that has --resume -> an option that changes what it makes, and how the error names it.
TRAININGS = {
    "latent train --data {a}": ("--lr 0.5", "loop.optim.lr was 0.002, is 0.5"),
    "policy pretrain --data {a} --labels {labels}": ("--freeze-vision", "freeze_vision was False, is True"),
    "policy finetune --from-scratch --data {a}": ("--head chunk", "head was 'bins', is 'chunk'"),
    "baseline inverse --data {a}": ("--seed 7", "loop.seed was 0, is 7"),
    "baseline video --data {a}": ("--held-out 0.5", "held_out was"),
}
OTHERS = {
    "data lerobot {a} --size 16": ("--size 32", "cameras.front was [16, 16], is [32, 32]"),
    "data lerobot {a} --size 16 --workers 1": ("--min-motion 0.001", "extra_info.min_motion was None, is 0.001"),
    "data videos {a}/videos --caption move --size 16": ("--limit 3", "limit was None, is 3"),
    "data synthetic --episodes 2 --frames 4 --size 16": ("--seed 3", "extra_info.seed was 0, is 3"),
    "data hide-actions {a}": ("{b}", "source_fingerprint was"),
    "baseline pseudo-label --inverse {inverse} --data {a}": ("--data {b}", "source_fingerprint was"),
    "label --lam {lam} --data {a}": ("--embeddings", "embeddings was False, is True"),
    "evaluate random --env synthetic --tasks up --episodes 2": ("--episodes 3", "episodes was 2, is 3"),
}


def filled(text: str, made: Path) -> list[str]:
    names = ("a", "b", "lam", "labels", "inverse")
    return [word.format(**{name: made / name for name in names}) for word in text.split()]


@pytest.mark.parametrize("command", [*TRAININGS, *OTHERS])
def test_a_finished_run_is_resumed_under_its_own_options_alone(
    made: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "video --data" in command:
        pytest.importorskip("diffusers")
    out, small = tmp_path / "out", SMALL if command in TRAININGS else ()
    words = [*filled(command, made), *small, "--out", out]
    assert lapa(*words) == 0
    before = contents(out)
    capsys.readouterr()
    assert lapa(*words, "--resume") == 0
    assert "complete" in (said := capsys.readouterr().err) or "already" in said
    change, named = (TRAININGS | OTHERS)[command]
    assert lapa(*changed(words, filled(change, made)), "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert named in error
    assert "--overwrite" in error
    assert contents(out) == before


def changed(words: Sequence[object], change: Sequence[str]) -> list[object]:
    """The command with another option, or another positional input."""
    if change[0].startswith("--"):
        place = words.index(change[0]) if change[0] in words else len(words)
        return [*words[:place], *change, *words[place + len(change) :]]
    return [*words[:2], *change, *words[3:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", TRAININGS)
def test_more_steps_go_on_from_the_last_checkpoint(
    made: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "video --data" in command:
        pytest.importorskip("diffusers")
    out = tmp_path / "out"
    words = [*filled(command, made), *SMALL, "--out", out]
    assert lapa(*words) == 0
    weights = contents(out)
    more = changed(words, ["--steps", "3"])
    assert lapa(*more, "--resume") == 0
    assert "resuming at step 2 of 3" in capsys.readouterr().err
    assert torch.load(out / "training" / "checkpoint.pt", weights_only=True)["step"] == 3
    recorded = read_json(out / "config.json")
    assert recorded.get("run", recorded)["loop"]["steps"] == 3
    now = contents(out)
    assert any(now[name] != content for name, content in weights.items() if name.endswith(".safetensors"))
    # Fewer steps are another run; without its checkpoint a run cannot go on.
    assert lapa(*words, "--resume") == 2
    assert "loop.steps was 3, is 2" in capsys.readouterr().err
    (out / "training" / "checkpoint.pt").unlink()
    assert lapa(*more, "--resume") == 0
    assert lapa(*changed(words, ["--steps", "4"]), "--resume") == 2
    assert "finished after 3 steps, and its checkpoint in" in capsys.readouterr().err.splitlines()[-1]
