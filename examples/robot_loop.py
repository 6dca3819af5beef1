"""Controls a robot with a policy on another machine: `lapa serve POLICY`, and on the robot's computer

    pip install ./packages/lapa-client
    python examples/robot_loop.py ws://192.168.1.5:8000 "open the drawer" --seconds 60

Replace `Robot` by your own. The loop runs at the policy's rate. Each period it executes one action of the chunk that it
has; before that chunk ends, the next one is asked for in the background, from the newest observation. A chunk begins at
its observation: actions whose period has passed when the answer arrives are skipped. Without an action for a period the
robot holds; after --stop-after such periods in a row, or an answer that no waiting can fix, the loop stops it.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

try:
    from lapa_client import PolicyClient, ServerBusyError, ServerError, ServerLateError
except ModuleNotFoundError:
    from lapa.serve.client import PolicyClient, ServerBusyError, ServerError, ServerLateError


class Robot:
    """A made-up robot with one camera and seven joints: replace its methods."""

    def observe(self) -> dict[str, Any]:
        """Returns what the policy reads now: images [H, W, 3] uint8 by camera, and "state" if the policy has one."""
        return {"front": np.zeros((240, 320, 3), np.uint8), "state": np.zeros(7, np.float32)}

    def act(self, action_A: np.ndarray) -> None:
        """Begins to execute one action; returns at once."""

    def hold(self) -> None:
        """Stays where it is for a period."""

    def stop(self) -> None:
        """Comes to rest, at the end or after an error."""


@dataclass
class Statistics:
    """Periods that acted, held or were missed, requests that failed, and how late each period began, in ms."""

    acted: int = 0
    held: int = 0
    missed: int = 0
    failed: int = 0
    late_ms: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        median, p99, largest = np.percentile(self.late_ms or [0.0], [50, 99, 100])
        return (
            f"{self.acted} actions, {self.held} periods held, {self.missed} missed, {self.failed} requests failed; "
            f"periods began late by {median:.1f} ms (median), {p99:.1f} ms (p99), {largest:.1f} ms (most)"
        )


def control(
    client: PolicyClient,
    robot: Any,
    instruction: str,
    seconds: float,
    ask_ahead: int = 2,
    stop_after: int = 10,
    fps: float | None = None,
) -> Statistics:
    """Controls a robot for some seconds, stops it, closes the client and returns the statistics.

    ask_ahead: periods before the end of a chunk at which the next one is asked for; at least the time of a round trip,
    and less than a chunk.
    fps: actions per second, by default as the server says of its policy.
    stop_after: periods in a row without an action after which it raises TimeoutError. Other errors of the client, such
    as an observation that the server refuses, are raised at once.
    """

    def observe() -> dict[str, Any]:
        return {**robot.observe(), "instruction": instruction}

    statistics, held_in_a_row, now = Statistics(), 0, 0
    request, request_start = None, 0
    with ThreadPoolExecutor(1) as background:
        try:
            rate = fps or client.metadata.get("fps")
            if not rate:
                raise ValueError("the server does not say its policy's rate: give --fps")
            period = 1 / rate
            client.reset()
            chunk_KA, chunk_start = np.atleast_2d(client.infer(observe())), 0
            if ask_ahead and len(chunk_KA) == 1:
                raise ValueError(
                    "an answer has one action, which ends before the next one comes: serve whole chunks (no "
                    "--ensemble, no --reply action), or hold between actions with --ask-ahead 0"
                )
            ask_ahead = min(ask_ahead, len(chunk_KA) - 1)
            begin = time.perf_counter()
            while now * period < seconds:
                time.sleep(max(0.0, begin + now * period - time.perf_counter()))
                statistics.late_ms.append(1000 * (time.perf_counter() - begin - now * period))
                if request is not None and request.done():
                    try:
                        chunk_KA, chunk_start = np.atleast_2d(request.result()), request_start
                    except (ServerBusyError, ServerLateError) as error:
                        statistics.failed += 1
                        print(f"period {now}: {error}")
                    request = None
                if request is None and now >= chunk_start + len(chunk_KA) - ask_ahead:
                    request, request_start = background.submit(client.infer, observe()), now
                if now < chunk_start + len(chunk_KA):
                    robot.act(chunk_KA[now - chunk_start])
                    statistics.acted, held_in_a_row = statistics.acted + 1, 0
                else:
                    robot.hold()
                    statistics.held, held_in_a_row = statistics.held + 1, held_in_a_row + 1
                    print(f"period {now}: no action in time, holds ({held_in_a_row} in a row)")
                    if held_in_a_row >= stop_after:
                        raise TimeoutError(f"no action for {held_in_a_row} periods of {1000 * period:.0f} ms: stopped")
                # Periods that have passed are missed: their actions are not made up for.
                following = max(now + 1, int((time.perf_counter() - begin) / period))
                statistics.missed, now = statistics.missed + following - now - 1, following
        finally:
            robot.stop()
            # A call that the background thread still waits in ends with the connection.
            client.close()
            print(statistics)
    return statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="ws://HOST:PORT of `lapa serve`")
    parser.add_argument("instruction", help='what to do, such as "open the drawer"')
    parser.add_argument("--api-key", help="the server's key")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--ask-ahead", type=int, default=2, help="periods before a chunk ends to ask for the next one")
    parser.add_argument("--stop-after", type=int, default=10, help="periods without an action to give up after")
    parser.add_argument("--fps", type=float, help="actions per second; by default as the server says")
    options = parser.parse_args()
    try:
        client = PolicyClient(options.url, options.api_key)
        control(
            client,
            Robot(),
            options.instruction,
            options.seconds,
            options.ask_ahead,
            options.stop_after,
            options.fps,
        )
    except (ServerError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
