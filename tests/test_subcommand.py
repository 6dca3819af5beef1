"""Stages of `lapa demo` and `lapa study`: two at once, in order, locked, logged, and stopped together."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lapa import subcommand
from lapa.files import read_json_lines
from lapa.subcommand import Stage, run_stages

# Each stage runs Python code in place of a `lapa` command.
WRITE = (
    "import pathlib, time; time.sleep({seconds}); print({name!r}); print('  next: lapa'); "
    "pathlib.Path({path!r}).write_text('')"
)


@pytest.fixture(autouse=True)
def python_in_place_of_lapa(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def start(words: list[str], **options: object) -> subprocess.Popen:
        return real([sys.executable, "-c", *words[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)


def writer(folder: Path, name: str, *needs: str, seconds: float = 0.0, lock: Path | None = None) -> Stage:
    code = WRITE.format(seconds=seconds, name=f"{name} prints", path=str(folder / name))
    return Stage(name, [code], folder / name, folder / f"{name}.log", [folder / need for need in needs], lock)


def recorded(stage: Stage, spent: Path) -> Stage:
    return replace(stage, spent=spent, note=lambda: {"title": stage.title})


def outcomes(spent: Path) -> dict[str, bool]:
    return {row["title"]: row["failed"] for row in read_json_lines(spent)}


def test_stages_run_side_by_side_after_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ended: list[str] = []
    stages = [
        writer(tmp_path, "last", "slow", "quick"),
        writer(tmp_path, "slow", seconds=1.5),
        writer(tmp_path, "quick"),
        writer(tmp_path, "after", "quick"),
    ]
    run_stages(stages, lambda stage: ended.append(stage.title), at_once=2)
    assert ended == ["quick", "after", "slow", "last"]
    shown = capsys.readouterr().err
    assert "quick: quick prints" in shown and "quick:   next:" not in shown
    assert (tmp_path / "slow.log").read_text() == "slow prints\n  next: lapa\n"
    run_stages(stages, lambda stage: ended.append("again"), at_once=2)
    assert "again" not in ended


def test_a_stage_has_one_thread_where_two_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for at_once, threads in ((1, "None"), (2, "1")):
        code = f"import os; open({str(tmp_path / 'marker')!r}, 'w').write(str(os.environ.get('OMP_NUM_THREADS')))"
        run_stages([Stage("one", [code], tmp_path / "marker", tmp_path / "log")], at_once=at_once)
        assert (tmp_path / "marker").read_text() == threads
        (tmp_path / "marker").unlink()


def test_a_failing_stage_stops_the_others(tmp_path: Path) -> None:
    stages = [
        writer(tmp_path, "long", seconds=60),
        Stage("broken", ["raise SystemExit(2)"], tmp_path / "x", tmp_path / "broken.log"),
        writer(tmp_path, "after", "long"),
    ]
    spent = tmp_path / "spent.jsonl"
    with pytest.raises(ValueError, match=r"the stage 'broken' failed: see above, and .*broken.log"):
        run_stages([recorded(stage, spent) for stage in stages], at_once=2)
    assert outcomes(spent) == {"broken": True, "long": False}


def test_a_stage_that_leaves_no_artifact_has_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the stage 'empty' failed"):
        run_stages([Stage("empty", ["pass"], tmp_path / "x", tmp_path / "log")])


def test_a_need_that_no_stage_writes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the stage 'one' lacks what it needs"):
        run_stages([writer(tmp_path, "one", "nothing")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_stops_its_stages(tmp_path: Path, number: signal.Signals) -> None:
    """As by `timeout 9m lapa study run`: the signal is passed on, and the next run continues from a checkpoint."""
    spent = tmp_path / "spent.jsonl"
    # Under nohup, SIGHUP is ignored.
    before = signal.signal(number, signal.default_int_handler)
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    stages = [recorded(writer(tmp_path, name, seconds=60), spent) for name in ("first", "second", "third")]
    try:
        with pytest.raises(KeyboardInterrupt):
            run_stages(stages, at_once=2)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert outcomes(spent) == {"first": False, "second": False}


def test_a_stage_that_is_just_being_started_is_stopped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def interrupted(words: list[str], **options: object) -> subprocess.Popen:
        process = start(words, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    stage = writer(tmp_path, "one", seconds=20)
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage])
    assert not stage.artifact.exists()


def test_a_stage_of_another_run_is_waited_for_and_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lock = tmp_path / "lock"
    stage = writer(tmp_path, "one", lock=lock)
    with lock.open("w") as others:
        fcntl.flock(others, fcntl.LOCK_EX)
        threading.Timer(1.0, lambda: (stage.artifact.write_text(""), others.close())).start()
        run_stages([stage], lambda stage: pytest.fail("made twice"))
    assert "waiting for one, which another run is making" in capsys.readouterr().err


def test_a_stage_stays_locked_while_its_command_lives(tmp_path: Path) -> None:
    """A run that is killed outright leaves its command behind, which goes on writing."""
    stage = writer(tmp_path, "one", seconds=60, lock=tmp_path / "lock")
    lock = subcommand._take(stage)
    assert lock is not None
    orphan = subcommand._Running(stage, lock, threads=None)
    lock.close()
    assert subcommand._take(stage) is None
    orphan.send(signal.SIGTERM)
    assert orphan.poll(wait=True) == -signal.SIGTERM
    assert subcommand._take(stage) is not None


def test_the_seconds_and_the_cpu_seconds_of_a_stage_are_recorded(tmp_path: Path) -> None:
    """Those of a process of the stage's, too, and apart for two at once."""
    busy = "import time; until = time.process_time() + 0.7; exec('while time.process_time() < until: pass')"
    code = f"import pathlib, subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}]); "
    stages = [
        Stage(
            "busy",
            [code + f"pathlib.Path({str(tmp_path / 'busy')!r}).write_text('')"],
            tmp_path / "busy",
            tmp_path / "log",
        ),
        writer(tmp_path, "asleep", seconds=0.8),
    ]
    spent = tmp_path / "spent.jsonl"
    run_stages([recorded(stage, spent) for stage in stages], at_once=2)
    rows = {row["title"]: row for row in read_json_lines(spent, seconds=float, cpu_seconds=float)}
    assert rows["busy"]["cpu_seconds"] >= 0.7 and rows["busy"]["seconds"] >= 0.7
    assert rows["asleep"]["seconds"] >= 0.8 and rows["asleep"]["cpu_seconds"] < rows["busy"]["cpu_seconds"]


def test_an_error_where_a_stage_ended_waits_for_the_others(tmp_path: Path) -> None:
    """They have written their checkpoints when the error is reported."""
    written, begun = tmp_path / "checkpoint", f"pathlib.Path({str(tmp_path / 'begun')!r})"
    code = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), "
        f"pathlib.Path({str(written)!r}).write_text(''), sys.exit(0))); "
        f"{begun}.write_text(''); time.sleep(60)"
    )
    waits = f"import pathlib, time\nwhile not {begun}.exists(): time.sleep(0.01)\n"
    quick = Stage(
        "quick",
        [waits + WRITE.format(seconds=0, name="", path=str(tmp_path / "quick"))],
        tmp_path / "quick",
        tmp_path / "log",
    )
    spent = tmp_path / "spent.jsonl"

    def full(stage: Stage) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run_stages(
            [recorded(Stage("slow", [code], tmp_path / "x", tmp_path / "slow.log"), spent), quick], full, at_once=2
        )
    assert written.exists() and outcomes(spent) == {"slow": False}


def test_a_stage_whose_program_was_killed_records_itself(tmp_path: Path) -> None:
    stage, source = writer(tmp_path, "one", seconds=0.5), str(Path(subcommand.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {source!r}); from lapa.subcommand import record_where_orphaned; "
        f"record_where_orphaned(); {stage.command[0]}"
    )
    spent = tmp_path / "spent.jsonl"
    begins = (
        f"import os, signal, sys; sys.path.insert(0, {source!r})\n"
        "from pathlib import Path; from lapa import subcommand\n"
        f"stage = subcommand.Stage('one', [], Path({str(stage.artifact)!r}), Path({str(stage.log)!r}), "
        f"spent=Path({str(spent)!r}), note=lambda: {{'title': 'one'}})\n"
        "real = subcommand.subprocess.Popen\n"
        f"subcommand.subprocess.Popen = lambda words, **options: real([sys.executable, '-c', {code!r}], **options)\n"
        "subcommand._Running(stage, subcommand._take(stage), None); os.kill(os.getpid(), signal.SIGKILL)"
    )
    # A name that the fixture has not replaced.
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", begins]) == -signal.SIGKILL
    for _ in range(600):
        if spent.exists() and spent.read_bytes().endswith(b"\n"):
            break
        time.sleep(0.1)
    (row,) = read_json_lines(spent, seconds=float, cpu_seconds=float)
    assert (row["title"], row["failed"]) == ("one", False) and row["seconds"] >= 0.5


def test_where_a_file_system_has_no_locks_stages_run_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    stage = writer(tmp_path, "one", lock=tmp_path / "lock")
    run_stages([stage])
    assert stage.artifact.exists()
    assert "its file system has no locks (Operation not supported)" in capsys.readouterr().err
