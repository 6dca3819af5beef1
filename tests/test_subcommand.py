"""Stages of `lapa demo` and `lapa study`: two at once, in order, locked, logged, and stopped together."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lapa import subcommand
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


def ignore(stage: Stage, seconds: float, failed: bool) -> None:
    pass


def test_stages_run_side_by_side_after_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ended: list[str] = []
    stages = [
        writer(tmp_path, "last", "slow", "quick"),
        writer(tmp_path, "slow", seconds=1.5),
        writer(tmp_path, "quick"),
        writer(tmp_path, "after", "quick"),
    ]
    run_stages(stages, lambda stage, seconds, failed: ended.append(stage.title), at_once=2)
    assert ended == ["quick", "after", "slow", "last"]
    shown = capsys.readouterr().err
    assert "quick: quick prints" in shown and "quick:   next:" not in shown
    assert (tmp_path / "slow.log").read_text() == "slow prints\n  next: lapa\n"
    run_stages(stages, lambda stage, seconds, failed: ended.append("again"), at_once=2)
    assert "again" not in ended


def test_a_stage_has_one_thread_where_two_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for at_once, threads in ((1, "None"), (2, "1")):
        code = f"import os; open({str(tmp_path / 'marker')!r}, 'w').write(str(os.environ.get('OMP_NUM_THREADS')))"
        run_stages([Stage("one", [code], tmp_path / "marker", tmp_path / "log")], ignore, at_once)
        assert (tmp_path / "marker").read_text() == threads
        (tmp_path / "marker").unlink()


def test_a_failing_stage_stops_the_others(tmp_path: Path) -> None:
    stages = [
        writer(tmp_path, "long", seconds=60),
        Stage("broken", ["raise SystemExit(2)"], tmp_path / "x", tmp_path / "broken.log"),
        writer(tmp_path, "after", "long"),
    ]
    outcomes: dict[str, bool] = {}
    with pytest.raises(ValueError, match=r"the stage 'broken' failed: see above, and .*broken.log"):
        run_stages(stages, lambda stage, seconds, failed: outcomes.update({stage.title: failed}), at_once=2)
    assert outcomes == {"broken": True, "long": False}


def test_a_stage_that_leaves_no_artifact_has_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the stage 'empty' failed"):
        run_stages([Stage("empty", ["pass"], tmp_path / "x", tmp_path / "log")], ignore)


def test_a_need_that_no_stage_writes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the stage 'one' lacks what it needs"):
        run_stages([writer(tmp_path, "one", "nothing")], ignore)


def test_a_stopped_run_stops_its_stages(tmp_path: Path) -> None:
    """As by `timeout 9m lapa study run`: SIGTERM is passed on, and the next run continues from a checkpoint."""
    outcomes: dict[str, bool] = {}
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    stages = [writer(tmp_path, name, seconds=60) for name in ("first", "second", "third")]
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, lambda stage, seconds, failed: outcomes.update({stage.title: failed}), at_once=2)
    assert outcomes == {"first": False, "second": False}
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stage_that_is_just_being_started_is_stopped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def interrupted(words: list[str], **options: object) -> subprocess.Popen:
        process = start(words, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    stage = writer(tmp_path, "one", seconds=20)
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage], ignore)
    assert not stage.artifact.exists()


def test_a_stage_of_another_run_is_waited_for_and_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lock = tmp_path / "lock"
    stage = writer(tmp_path, "one", lock=lock)
    with lock.open("w") as others:
        fcntl.flock(others, fcntl.LOCK_EX)
        threading.Timer(1.0, lambda: (stage.artifact.write_text(""), others.close())).start()
        run_stages([stage], lambda stage, seconds, failed: pytest.fail("made twice"))
    assert "waiting for one, which another run is making" in capsys.readouterr().err


def test_a_stage_stays_locked_while_its_command_lives(tmp_path: Path) -> None:
    """A run that is killed outright leaves its command behind, which goes on writing."""
    stage = writer(tmp_path, "one", seconds=60, lock=tmp_path / "lock")
    lock = subcommand._take(stage)
    assert lock is not None
    orphan = subcommand._Running(stage, lock, threads=None)
    lock.close()
    assert subcommand._take(stage) is None
    orphan.terminate()
    while orphan.poll() is None:
        pass
    assert subcommand._take(stage) is not None
