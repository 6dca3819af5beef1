"""Plays episodes in many simulators at once, so that one call of the policy serves all of them.

Each worker process holds several simulators of one task and steps them through the actions it is sent; the parent
holds the policy. They meet where episodes need a chunk of actions, all at the same steps: observations of all live
episodes go up as one batch, and chunks come down. A worker of its own (spawn) for each OpenGL context; light
environments play in the parent.
Axes: B batch of live episodes, K action chunk, A action dimensions, H W image, C channel.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Literal, Protocol

import numpy as np

from lapa.envs.metaworld.simulator import episode_seed
from lapa.envs.registry import Environment, kind_of, make
from lapa.errors import UserError
from lapa.policy.execution import Execution, RecedingHorizon, TemporalEnsemble
from lapa.types import Observation

# Recorded videos show about this many frames a second of the environment's own time.
VIDEO_FPS = 20

Infer = Callable[[Sequence[Observation]], np.ndarray]


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know. actor: who chooses the actions; `policy` is the parent's, the others are here.

    ensemble: the decay with which overlapping chunks are averaged, binary: the dimensions in which they vote.
    """

    env: str
    size: int
    cameras: tuple[str, ...]
    seed: int
    max_steps: int
    actor: Literal["policy", "random", "expert"]
    slots: int
    steps_per_call: int | None = None
    ensemble: float | None = None
    binary: tuple[bool, ...] = ()
    num_recorded: int = 0

    @property
    def video_every(self) -> int:
        """Steps between two recorded frames."""
        return max(1, round(kind_of(self.env).fps / VIDEO_FPS))

    def execution(self) -> Execution:
        """What makes single actions of a policy's chunks, for one episode."""
        if self.ensemble is None:
            return RecedingHorizon(self.steps_per_call)
        return TemporalEnsemble(self.ensemble, self.steps_per_call or 1, self.binary)


@dataclass(frozen=True)
class Job:
    """Episodes of one task for one worker."""

    task: str
    episodes: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """How one episode ended. frames: what was recorded of it, HWC uint8."""

    task: str
    episode: int
    seed: int
    success: bool
    steps: int
    frames: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Round:
    """What a worker reports: live episodes' observations, episodes that ended since, whether the job is over."""

    observations: tuple[Observation, ...]
    outcomes: tuple[Outcome, ...]
    over: bool


def play_all(setup: Setup, jobs: Sequence[Job], infer: Infer | None, workers: int) -> Iterator[Outcome]:
    """Plays every job and yields outcomes as episodes end.

    infer: observations [B] -> actions [B, K, A], for the actor `policy`; workers: processes, 0 to play in this one.
    """
    queue = deque(jobs)
    with ExitStack() as stack:
        players: list[_Player] = [_LocalPlayer(setup)] if workers == 0 else [_Worker(setup) for _ in range(workers)]
        for player in players:
            stack.callback(player.close)
        active = []
        for player in players[: len(queue)]:
            player.send(queue.popleft())
            active.append(player)
        while active:
            rounds = [player.receive() for player in active]
            for finished in rounds:
                yield from finished.outcomes
            observations = [observation for part in rounds for observation in part.observations]
            actions_BKA = infer(observations) if infer is not None and observations else np.zeros((0, 0, 0))
            if not np.isfinite(actions_BKA).all():
                raise UserError("the policy gave actions that are not finite; its checkpoint is damaged")
            playing, first = [], 0
            for player, part in zip(active, rounds, strict=True):
                if not part.over:
                    player.send(actions_BKA[first : first + len(part.observations)])
                    first += len(part.observations)
                elif queue:
                    player.send(queue.popleft())
                else:
                    continue
                playing.append(player)
            active = playing


class _Episode:
    """One episode in one environment."""

    def __init__(self, setup: Setup, environment: Environment, task: str, number: int) -> None:
        self.setup, self.environment, self.task, self.number = setup, environment, task, number
        self.seed = episode_seed(setup.seed, "evaluation", task, number)
        self.steps, self.success = 0, False
        self._execution = setup.execution()
        self._rng = np.random.default_rng([self.seed, 3])
        self._recorded = number < setup.num_recorded
        self._frames: list[np.ndarray] = []
        self._seen: Observation | None = None
        environment.reset(self.seed)

    @property
    def over(self) -> bool:
        return self.success or self.steps >= self.setup.max_steps

    def observe(self) -> Observation:
        if self._seen is None:
            self._seen = self.environment.observe()
        return self._seen

    def execute(self, actions_KA: np.ndarray) -> None:
        """Goes on with a chunk that begins now, until another is due or the episode is over."""
        self._step(self._execution.next(lambda: actions_KA))
        while not self.over and not self._execution.due:
            self._step(self._execution.next(lambda: actions_KA))

    def play_alone(self) -> None:
        """Plays to the end without a policy."""
        kind = kind_of(self.setup.env)
        while not self.over:
            if self.setup.actor == "expert":
                self._step(self.environment.expert_action())
            else:
                self._step(self._rng.uniform(-kind.action_limit, kind.action_limit, kind.action_dim))

    def outcome(self) -> Outcome:
        if self._recorded:
            self._record()
        return Outcome(self.task, self.number, self.seed, self.success, self.steps, tuple(self._frames))

    def _step(self, action: np.ndarray) -> None:
        if self._recorded and self.steps % self.setup.video_every == 0:
            self._record()
        self.success = self.environment.step(action)
        self.steps, self._seen = self.steps + 1, None

    def _record(self) -> None:
        self._frames.append(self.observe().images[self.setup.cameras[0]])


class _Player(Protocol):
    """Takes a Job or the actions for the last round's observations, and answers each with a Round."""

    def send(self, message: Job | np.ndarray) -> None: ...
    def receive(self) -> Round: ...
    def close(self) -> None: ...


class _LocalPlayer:
    """Plays in this process. Keeps its environments until a job for another task comes."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._task = ""
        self._environments: list[Environment] = []
        self._game: Generator[Round, np.ndarray, None] | None = None
        self._actions: np.ndarray | None = None

    def send(self, message: Job | np.ndarray) -> None:
        if isinstance(message, Job):
            self._game, self._actions = self._play(message), None
        else:
            self._actions = message

    def receive(self) -> Round:
        assert self._game is not None, "a job comes first"
        return next(self._game) if self._actions is None else self._game.send(self._actions)

    def close(self) -> None:
        for environment in self._environments:
            environment.close()
        self._environments = []

    def _play(self, job: Job) -> Generator[Round, np.ndarray, None]:
        waiting = deque(job.episodes)
        free = self._ready(job.task, min(self._setup.slots, len(waiting)))
        live: list[_Episode] = []
        outcomes: tuple[Outcome, ...] = ()
        while waiting or live:
            while waiting and free:
                live.append(_Episode(self._setup, free.pop(), job.task, waiting.popleft()))
            if self._setup.actor == "policy":
                actions_BKA = yield Round(tuple(episode.observe() for episode in live), outcomes, over=False)
                for episode, actions_KA in zip(live, actions_BKA, strict=True):
                    episode.execute(actions_KA)
            else:
                yield Round((), outcomes, over=False)
                live[0].play_alone()
            ended = [episode for episode in live if episode.over]
            live = [episode for episode in live if not episode.over]
            free += [episode.environment for episode in ended]
            outcomes = tuple(episode.outcome() for episode in ended)
        yield Round((), outcomes, over=True)

    def _ready(self, task: str, num: int) -> list[Environment]:
        if task != self._task:
            self.close()
            self._task = task
        while len(self._environments) < num:
            setup = self._setup
            self._environments.append(make(setup.env, task, size=setup.size, cameras=setup.cameras))
        return self._environments[:num]


class _Worker:
    """Plays in a process of its own."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message: Job | np.ndarray) -> None:
        self._connection.send(message)

    def receive(self) -> Round:
        try:
            message = self._connection.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"a simulator process died (exit code {self._process.exitcode}), perhaps for lack of memory; "
                "go on with --resume and a smaller --parallel"
            ) from None
        if isinstance(message, str):
            raise RuntimeError(f"a simulator process failed:\n{message}")
        return message

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, setup: Setup) -> None:
    """A worker's life: until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    player = _LocalPlayer(setup)
    try:
        while True:
            player.send(connection.recv())
            connection.send(player.receive())
    except (EOFError, ConnectionError):
        player.close()
    except Exception:
        connection.send(traceback.format_exc())
