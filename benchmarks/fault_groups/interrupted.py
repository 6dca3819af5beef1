"""Commands that are killed, that find another writer, that are repeated under load, or resumed with other options."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random

from fault_groups.made import COMMANDS, SIDE, Case, block, contents, require_same, require_tidy
from fault_groups.processes import Ended, Fault, ask, lapa, start, start_lapa

# Options that give another result, for each command.
OTHER: dict[str, tuple[object, ...]] = {
    "convert": ("--limit", 3),
    "train": ("--seed", 5),
    "label": ("--precision", "bf16"),
    "pretrain": ("--seed", 5),
    "finetune": ("--seed", 5),
    "inverse": ("--seed", 5),
    "pseudo-label": ("--data", "robot"),
    "hide-actions": ("videos",),
    "evaluate": ("--seed", 5),
}


def kills(made: Path, quick: bool) -> list[Case]:
    """A kill at any moment, perhaps another one while resuming; then a resume to the end."""
    return [
        Case(f"kill {name} {number}", partial(_kill, made, name))
        for number in range(1 if quick else 8)
        for name in COMMANDS
    ]


def writers(made: Path, quick: bool) -> list[Case]:
    """Two commands that write one folder: begun at once or one while the other runs, alike or not, both resuming."""
    return [
        Case(f"{way} {name} {number}", partial(_two, made, name, way))
        for number in range(1 if quick else 3)
        for way in ("alike", "unlike", "resumed")
        for name in COMMANDS
    ]


def repeats(made: Path, quick: bool) -> list[Case]:
    """The same conversion again and again while other processes keep the cores busy."""
    sides = (SIDE, 96, 256) if quick else (SIDE, 50, 90, 96, 160, 224, 256, 300)
    return [
        *(Case(f"encode {side} px", partial(_encodings, side)) for side in sides),
        *(Case(f"convert {number}", partial(_again, made)) for number in range(2 if quick else 10)),
    ]


def options(made: Path, quick: bool) -> list[Case]:
    """--resume of a finished run: with the same options it is complete, with others refused."""
    return [
        *(Case(f"same {name}", partial(_finished, made, name)) for name in COMMANDS),
        *(Case(f"other {name}", partial(_others, made, name)) for name in OTHER),
        *(Case(f"more steps {name}", partial(_more_steps, made, name)) for name in ("train", "pretrain", "finetune")),
        *(Case(f"wrong labels {number}", partial(_wrong_labels, made)) for number in range(2 if quick else 12)),
    ]


def words(name: str, other: bool = False) -> tuple[object, ...]:
    """The command `name`; other: with options that give another result."""
    given = COMMANDS[name]
    if not other:
        return given
    changed = OTHER[name]
    if not str(changed[0]).startswith("--"):
        return (*given[:2], *changed)
    if changed[0] in given:
        place = given.index(changed[0])
        return (*given[:place], *changed, *given[place + 2 :])
    return (*given, *changed)


@cache
def undisturbed(made: Path, name: str, other: bool = False) -> tuple[dict[str, str], float]:
    """The contents that the command gives when nothing happens to it, and its seconds."""
    out = f"undisturbed-{name}-{'other' if other else 'same'}-{os.getpid()}"
    ended = lapa(*words(name, other), "--out", out, folder=made)
    ended.require_done()
    return contents(made / out), ended.seconds


def _kill(made: Path, name: str, folder: Path, chance: Random) -> None:
    expected, seconds = undisturbed(made, name)
    out = folder / "out"
    for number in range(chance.choice((1, 1, 2, 3))):
        process = start_lapa(*words(name), "--out", out, *["--resume"] * (number > 0), folder=made)
        time.sleep(chance.uniform(0, 1.1 * seconds))
        process.kill()
        ended = process.wait()
        if ended.status not in (0, -signal.SIGKILL):
            ended.require_done()
    lapa(*words(name), "--out", out, "--resume", folder=made).require_done()
    require_same(contents(out), expected)
    require_tidy(out)


def _two(made: Path, name: str, way: str, folder: Path, chance: Random) -> None:
    expected, seconds = undisturbed(made, name)
    out, resume = folder / "out", []
    if way == "resumed":
        process = start_lapa(*words(name), "--out", out, folder=made)
        time.sleep(chance.uniform(0.3, 0.8) * seconds)
        process.kill()
        process.wait()
        resume = ["--resume"]
    first = start_lapa(*words(name), "--out", out, *resume, folder=made)
    time.sleep(chance.choice((0, chance.uniform(0, 0.8 * seconds))))
    second = start_lapa(*words(name, way == "unlike"), "--out", out, *resume, folder=made)
    ends = [first.wait(), second.wait()]
    lines = [ended.refused() for ended in ends]
    done = [number for number, line in enumerate(lines) if line is None]
    # Where one had finished, the other, which resumes, has nothing to do.
    if len(done) != 1 and not (resume and len(done) == 2 and any(map(_idle, ends))):
        raise Fault(f"{len(done)} of two writers were done: {lines}")
    if len(done) == 1:
        line, pid = lines[1 - done[0]], (first, second)[done[0]].pid
        if str(pid) not in str(line) and "finished" not in str(line) and "not empty" not in str(line):
            raise Fault(f"does not name the writer, process {pid}: {line}")
    other = way == "unlike" and done == [1]
    require_same(contents(out), undisturbed(made, name, True)[0] if other else expected)
    require_tidy(out)


def _encodings(side: int, folder: Path, chance: Random) -> None:
    """Encodes one clip 40 times under load."""
    from lapa.data.video import encode_clip

    frames = [block(step, 1, side) for step in range(6)]

    def encode() -> list[int]:
        kinds = set()
        for number in range(40):
            encode_clip(folder / f"{number}.mp4", frames, 10.0)
            kinds.add((folder / f"{number}.mp4").read_bytes())
        return [len(kinds)]

    ended = _under_load(lambda: ask(encode, folder), folder)
    ended.require_done()
    if ended.answer != [1]:
        raise Fault(f"40 encodings of one clip gave {ended.answer[0]} results")


def _again(made: Path, folder: Path, chance: Random) -> None:
    expected, _ = undisturbed(made, "convert")
    _under_load(lambda: lapa(*words("convert"), "--out", folder / "out", folder=made), folder).require_done()
    require_same(contents(folder / "out"), expected)


def _under_load(run: Callable[[], Ended], folder: Path) -> Ended:
    def burn() -> None:
        while True:
            pass

    burners = [start(burn, folder) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        return run()
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def _finished(made: Path, name: str, folder: Path, chance: Random) -> None:
    out = folder / "out"
    lapa(*words(name), "--out", out, folder=made).require_done()
    before = contents(out)
    ended = lapa(*words(name), "--out", out, "--resume", folder=made)
    ended.require_done()
    if not _idle(ended):
        raise Fault(f"does not report that it is complete: {ended.output[-200:]}")
    require_same(contents(out), before)


def _idle(ended: Ended) -> bool:
    """Whether a command found the finished artifact, or a training that had taken its last step."""
    return bool({"complete", "already"} & {*ended.output.split()}) or "resuming at step 8 of 8" in ended.output


def _others(made: Path, name: str, folder: Path, chance: Random) -> None:
    out = folder / "out"
    lapa(*words(name), "--out", out, folder=made).require_done()
    before = contents(out)
    lapa(*words(name, other=True), "--out", out, "--resume", folder=made).require_refused()
    require_same(contents(out), before)


def _more_steps(made: Path, name: str, folder: Path, chance: Random) -> None:
    """More steps go on from the last checkpoint, or are refused; "complete" would be wrong."""
    out, more = folder / "out", [12 if word == 8 else word for word in words(name)]
    lapa(*words(name), "--out", out, folder=made).require_done()
    before = contents(out)
    if lapa(*more, "--out", out, "--resume", folder=made).refused():
        require_same(contents(out), before)
        return
    steps = json.loads((out / "metrics.json").read_text()) and [
        json.loads(line).get("step") for line in (out / "training" / "metrics.jsonl").read_text().splitlines()
    ]
    if max(steps) != 12 or contents(out) == before:
        raise Fault(f"was accepted, and ended at step {max(steps)} of 12")


def _wrong_labels(made: Path, folder: Path, chance: Random) -> None:
    """Two labels folders for one dataset are one line, however the threads stand at the exit."""
    given = (*words("pretrain"), "labels", "--out", folder / "out")
    lapa(*given, folder=made).require_refused("labels")
