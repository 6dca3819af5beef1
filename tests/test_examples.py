"""The examples run as they stand."""

import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapa.data.spec import open_dataset
from lapa.latent.model import LatentActionModel
from lapa.presets import LATENT
from lapa.sources.synthetic import write_synthetic_dataset

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "own_robot.py", tmp_path / "robot")
    dataset = open_dataset(tmp_path / "robot")
    assert (len(dataset.episodes), dataset.action_dim, dataset.cameras) == (3, 4, ("front",))


def test_own_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    write_synthetic_dataset(tmp_path / "videos", episodes=2, frames=12, size=32)
    torch.manual_seed(0)
    LatentActionModel(LATENT["debug"].model).save_pretrained(tmp_path / "lam")
    run(monkeypatch, "own_videos.py", tmp_path / "lam", tmp_path / "videos")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3
    assert lines[0].startswith("episode 0, frames 0 to 3: [")


class RecordingRobot:
    """A made-up robot that keeps what it did, and after how many actions it was asked what it sees."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.acted: list[float] = []
        self.events: list[str] = []

    def observe(self) -> dict[str, Any]:
        self.asked.append(len(self.acted))
        return {"front": np.zeros((8, 8, 3), np.uint8)}

    def act(self, action_A: np.ndarray) -> None:
        self.acted.append(float(action_A[0]))
        self.events.append("act")

    def hold(self) -> None:
        self.events.append("hold")

    def stop(self) -> None:
        self.events.append("stop")


def control(
    answer: Callable[[dict[str, Any]], Any],
    robot: RecordingRobot,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Runs the control loop of the example against a made-up server of a policy of ten periods a second."""
    pytest.importorskip("websockets", reason="the client needs websockets: pip install 'lapa-vla[serve]'")
    from lapa.serve.client import PolicyClient
    from policy_server import FakeServer

    example = runpy.run_path(str(EXAMPLES / "robot_loop.py"))
    with FakeServer(answer, metadata=metadata) as server:
        return example["control"](PolicyClient(server.url), robot, "lift the cup", **options)


def chunks(delay: Callable[[int], float] = lambda number: 0) -> Callable[[dict[str, Any]], Any]:
    """Answers observation n with eight actions, 100 n to 100 n + 7, `delay(n)` seconds later."""
    numbers = iter(range(1000))

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if "reset" in message:
            return {"reset": True}
        assert message["instruction"] == "lift the cup" and message["front"].shape == (8, 8, 3)
        number = next(numbers)
        time.sleep(delay(number))
        return {"actions": np.arange(8.0)[:, None] + 100 * number}

    return answer


def test_robot_loop_asks_before_a_chunk_ends_and_skips_what_has_passed(capsys: pytest.CaptureFixture) -> None:
    robot = RecordingRobot()
    statistics = control(chunks(), robot, seconds=3, ask_ahead=3)
    assert statistics.acted == len(robot.acted) and statistics.acted + statistics.held + statistics.missed >= 30
    assert robot.events[-1] == "stop"
    assert "periods began late by" in capsys.readouterr().out
    assert robot.asked[1] < 8
    # The first chunk is executed until the second one arrives, which begins at the period in which it was asked for.
    first, later = [a for a in robot.acted if a < 100], [a for a in robot.acted if a >= 100]
    assert first == sorted(first)
    assert later == sorted(later) and later[0] > 100


def test_robot_loop_executes_chunks_of_two_actions_and_names_answers_of_one() -> None:
    def of(length: int) -> Callable[[dict[str, Any]], Any]:
        return lambda message: {"actions": np.zeros((length, 1))}

    robot = RecordingRobot()
    assert control(of(2), robot, seconds=1).acted >= 2
    with pytest.raises(ValueError, match="an answer has one action"):
        control(of(1), robot, seconds=60)
    assert robot.events[-1] == "stop"
    assert control(of(1), robot, seconds=0.5, ask_ahead=0).acted >= 1


@pytest.mark.parametrize("metadata", [{}, {"fps": None}])
def test_robot_loop_needs_a_rate(metadata: dict[str, Any]) -> None:
    robot = RecordingRobot()
    with pytest.raises(ValueError, match="the server does not say its policy's rate: give --fps"):
        control(chunks(), robot, metadata, seconds=60)
    assert robot.events == ["stop"]
    statistics = control(chunks(), robot, metadata, seconds=0.5, fps=20)
    assert statistics.acted >= 1 and statistics.acted + statistics.held + statistics.missed >= 10


def test_robot_loop_holds_while_the_server_is_late_and_goes_on(capsys: pytest.CaptureFixture) -> None:
    robot = RecordingRobot()
    statistics = control(chunks(lambda number: 0.8 if number == 1 else 0), robot, seconds=3, stop_after=100)
    assert statistics.held >= 1 and "no action in time, holds (1 in a row)" in capsys.readouterr().out
    held = len(robot.events) - 1 - robot.events[::-1].index("hold")
    assert "act" in robot.events[:held] and "act" in robot.events[held:]


def test_robot_loop_stops_when_the_server_stays_late() -> None:
    robot, never = RecordingRobot(), threading.Event()

    def late(message: dict[str, Any]) -> Any:
        if len(robot.acted):
            never.wait(3)
        return chunks()(message)

    with pytest.raises(TimeoutError, match="no action for 4 periods of 100 ms: stopped"):
        control(late, robot, seconds=60, stop_after=4)
    assert robot.events[-5:] == ["hold"] * 4 + ["stop"]


@pytest.mark.parametrize("line", ["error: unknown camera", "busy: 64 wait"])
def test_robot_loop_stops_the_robot_when_the_first_observation_is_refused(line: str) -> None:
    from lapa.serve.client import ServerError

    robot = RecordingRobot()
    with pytest.raises(ServerError, match=line):
        control(lambda message: line, robot, seconds=60)
    assert robot.events == ["stop"]


def test_robot_loop_goes_on_after_a_busy_server() -> None:
    robot, answers = RecordingRobot(), iter([*["chunk"] * 2, "busy: 64 wait"])
    chunk = chunks()
    statistics = control(
        lambda message: chunk(message) if (kind := next(answers, "chunk")) == "chunk" else kind, robot, seconds=2
    )
    assert statistics.failed == 1 and max(robot.acted) >= 100
