"""Plays episodes in many simulators at once, with one call of the policy for all of them.

Each worker process holds several simulators of one task and executes the actions that it receives; the parent process
holds the policy. Episodes need a new chunk of actions at the same steps: the observations of all running episodes are
one batch for the policy. Each OpenGL context needs a process of its own; light environments run in the parent.
Axes: B batch of running episodes, K action chunk, A action dimensions.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np

from lapa.console import say, warn
from lapa.data.workers import interrupts_held
from lapa.envs import Environment, episode_seed, kind_of, make
from lapa.errors import UserError, place_and_reason
from lapa.policy.execution import Execution, RecedingHorizon, TemporalEnsemble
from lapa.types import Observation

# Approximate frame rate of recorded videos, in the environment's time.
VIDEO_FPS = 20

# A process that is silent for so long hangs. One reply may be a whole episode of an expert, or a first image with a
# driver that compiles its shaders on busy cores. After SLOW_SECONDS the others no longer wait for it.
HANG_SECONDS, SLOW_SECONDS = 600, 60
# Where so many episodes, of every task, end in one and the same error before any is played, the simulator is broken.
FEW_ERRORS = 3

Infer = Callable[[Sequence[Observation]], np.ndarray]


@dataclass(frozen=True)
class RolloutSettings:
    """What every worker is started with.

    actor: who chooses the actions: the parent's policy, or in the worker random actions, zeros or the expert.
    num_parallel: simulators in one worker. max_steps: by default each task's own. steps_per_call, ensemble: as in
    EvaluateConfig. binary: for each action dimension, whether it has two values, among which an ensemble votes.
    num_recorded: episodes of each task recorded for the video.
    """

    env: str
    size: int
    cameras: tuple[str, ...]
    seed: int
    max_steps: int | None
    actor: Literal["policy", "random", "zero", "expert"]
    num_parallel: int
    steps_per_call: int | None = None
    ensemble: float | None = None
    binary: tuple[bool, ...] = ()
    num_recorded: int = 0

    @cached_property
    def video_every(self) -> int:
        """Steps between two recorded frames."""
        return max(1, round(kind_of(self.env).fps / VIDEO_FPS))

    def execution(self) -> Execution:
        """Returns what turns one episode's chunks into single actions."""
        if self.ensemble is None:
            return RecedingHorizon(self.steps_per_call)
        return TemporalEnsemble(self.ensemble, self.steps_per_call or 1, self.binary)


@dataclass(frozen=True)
class TaskEpisodes:
    """Episodes of one task for one worker."""

    task: str
    episodes: tuple[int, ...]


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode ended. frames: its recorded images, HWC uint8; instruction: its own, where it was observed.

    error: why it could not be played to its end, twice; then it is neither a success nor a failure.
    """

    task: str
    episode: int
    seed: int
    success: bool
    steps: int
    error: str = ""
    frames: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)
    instruction: str = field(default="", repr=False, compare=False)


class LostProcessError(Exception):
    """A simulator process has died, hangs, or ended with an exception."""


@dataclass(frozen=True)
class WorkerReply:
    """observations: of the running episodes. results: of those that ended since the last reply. done: all have."""

    observations: tuple[Observation, ...]
    results: tuple[EpisodeResult, ...]
    done: bool


def play_episodes(
    settings: RolloutSettings,
    assignments: Sequence[TaskEpisodes],
    infer: Infer | None,
    num_workers: int,
    *,
    stop_early: bool = True,
) -> Iterator[EpisodeResult]:
    """Plays all episodes and yields their results as they end.

    infer: observations [B] -> actions [B, K, A], for the actor `policy`. num_workers: processes, 0 to play in this one.
    The episodes of a process that dies, hangs or fails are repeated one by one in a new process, and are errors where
    that one is lost too. stop_early: raises UserError where the first few, of every task, all end in the same error.
    """
    queue, repeated = deque(assignments), set[TaskEpisodes]()
    tasks, ended = {assignment.task for assignment in assignments}, list[EpisodeResult]()
    with ExitStack() as stack:
        kind = _ProcessWorker if num_workers else _LocalWorker
        workers = [stack.enter_context(closing(kind(settings))) for _ in range(max(1, num_workers))]
        active = workers[: len(queue)]
        for worker in active:
            worker.send(queue.popleft())
        while active:
            answered, replies = _answered(active), []
            for worker in answered:
                try:
                    replies.append(worker.receive())
                except LostProcessError as loss:
                    replies.append(_after_loss(worker, loss, settings, queue, repeated))
            for result in (result for reply in replies for result in reply.results):
                ended.append(result)
                if stop_early and result.error and len({each.error for each in ended}) == 1:
                    failed = {each.task for each in ended}
                    if len(ended) >= FEW_ERRORS and failed == tasks:
                        raise UserError(
                            f"the first {len(ended)} episodes all ended in the same error: {result.error}; no other is "
                            f"played. Make `lapa envs {settings.env}` work, then --resume, which plays all the others"
                        )
                    # The other tasks first.
                    queue = deque(sorted(queue, key=lambda each: each.task in failed))
                yield result
            observations = [observation for reply in replies for observation in reply.observations]
            actions_BKA = infer(observations) if infer is not None and observations else np.zeros((0, 0, 0))
            if not np.isfinite(actions_BKA).all():
                raise UserError("the policy predicted actions that are not finite; its checkpoint is damaged")
            first = 0
            for worker, reply in zip(answered, replies, strict=True):
                if not reply.done:
                    worker.send(actions_BKA[first : first + len(reply.observations)])
                    first += len(reply.observations)
                elif queue:
                    worker.send(queue.popleft())
                else:
                    active.remove(worker)


def _answered(workers: Sequence[_LocalWorker | _ProcessWorker]) -> list[_LocalWorker | _ProcessWorker]:
    """Waits until all workers have replied, and returns them; or those that have, where others are slow."""
    ready: set[int] = set()
    while not ready:
        until = time.monotonic() + SLOW_SECONDS
        for worker in sorted(workers, key=lambda each: each.slow):
            patience = 0.0 if worker.slow and ready else until - time.monotonic()
            if worker.replied(max(0.0, patience)):
                ready.add(id(worker))
            elif not worker.slow:
                worker.slow = True
                task, episodes = worker.assignment.task, ", ".join(map(str, worker.assignment.episodes[:4]))
                say(
                    f"a simulator process is silent for {SLOW_SECONDS} s ({task}, episodes {episodes}); the "
                    f"others go on, and after {HANG_SECONDS} s it is started again"
                )
    return [worker for worker in workers if id(worker) in ready]


def _after_loss(
    worker: _LocalWorker | _ProcessWorker,
    loss: LostProcessError,
    settings: RolloutSettings,
    queue: deque[TaskEpisodes],
    repeated: set[TaskEpisodes],
) -> WorkerReply:
    """Queues the episodes that a lost process had not finished, and returns a last reply in its place.

    Those that it had begun come alone, since any of them may be the cause; one that was lost so before is an error.
    """
    task, unfinished = worker.assignment.task, [n for n in worker.assignment.episodes if n not in worker.finished]
    begun, waiting = unfinished[: settings.num_parallel], tuple(unfinished[settings.num_parallel :])
    alone = [TaskEpisodes(task, (number,)) for number in begun]
    if worker.assignment in repeated:
        warn(f"{loss}, again in episode {begun[0]} of {task}, which counts as an error")
        seed = episode_seed(settings.seed, "evaluation", task, begun[0])
        return WorkerReply((), (EpisodeResult(task, begun[0], seed, False, 0, error=str(loss)),), done=True)
    warn(f"{loss}; to be repeated one by one: {task}, episode {', '.join(map(str, begun))}")
    repeated.update(alone)
    queue.extendleft(reversed([*alone, *([TaskEpisodes(task, waiting)] if waiting else [])]))
    return WorkerReply((), (), done=True)


class _Episode:
    """One episode in one environment."""

    def __init__(self, settings: RolloutSettings, environment: Environment, task: str, number: int) -> None:
        self.settings, self.environment, self.task, self.number = settings, environment, task, number
        self.seed = episode_seed(settings.seed, "evaluation", task, number)
        self.steps, self.success = 0, False
        self._kind = kind_of(settings.env)
        self._max_steps = settings.max_steps or self._kind.parse_tasks(task)[task].max_steps
        self._execution = settings.execution()
        self._recorded = number < settings.num_recorded
        self._frames: list[np.ndarray] = []
        self._observation: Observation | None = None
        self._instruction = ""
        environment.reset(self.seed, number)

    @property
    def done(self) -> bool:
        return (self.success and self._kind.stops_at_success) or self.steps >= self._max_steps

    def observe(self) -> Observation:
        if self._observation is None:
            self._observation = self.environment.observe()
            self._instruction = self._observation.instruction
        return self._observation

    def execute(self, actions_KA: np.ndarray) -> None:
        """Executes a new chunk until the next is due or the episode is done."""
        while True:
            self._step(self._execution.next(lambda: actions_KA))
            if self.done or self._execution.due:
                return

    def play_baseline(self) -> None:
        """Plays the whole episode by random actions, zeros or the expert."""
        rng = np.random.default_rng([self.seed, 3])
        while not self.done:
            if self.settings.actor == "expert":
                self._step(self.environment.expert_action())
            elif self.settings.actor == "zero":
                self._step(np.zeros(len(self._kind.action_low)))
            else:
                self._step(rng.uniform(self._kind.action_low, self._kind.action_high))

    def result(self) -> EpisodeResult:
        if self._recorded:
            self._record()
        frames, instruction = tuple(self._frames), self._instruction
        return EpisodeResult(
            self.task, self.number, self.seed, self.success, self.steps, frames=frames, instruction=instruction
        )

    def _step(self, action: np.ndarray) -> None:
        if self._recorded and self.steps % self.settings.video_every == 0:
            self._record()
        self.success = self.environment.step(action)
        self.steps, self._observation = self.steps + 1, None

    def _record(self) -> None:
        self._frames.append(self.observe().images[self.settings.cameras[0]])


class _LocalWorker:
    """Plays the episodes that it is sent, then executes actions for the observations of its last reply.

    Each message is answered by a reply. Keeps its environments until episodes of another task come.
    """

    def __init__(self, settings: RolloutSettings) -> None:
        self._settings = settings
        self._task = ""
        self._environments: list[Environment] = []
        self._playing: Generator[WorkerReply, np.ndarray, None]
        self._reply: WorkerReply
        self.assignment: TaskEpisodes
        self.finished: set[int] = set()
        self.slow = False

    def send(self, message: TaskEpisodes | np.ndarray) -> None:
        if isinstance(message, TaskEpisodes):
            self.assignment = message
            self._playing = self._play(message)
            self._reply = next(self._playing)
        else:
            self._reply = self._playing.send(message)

    def replied(self, timeout: float) -> bool:
        return True

    def receive(self) -> WorkerReply:
        return self._reply

    def close(self) -> None:
        while self._environments:
            self._environments.pop().close()

    def _play(self, assignment: TaskEpisodes) -> Generator[WorkerReply, np.ndarray, None]:
        waiting = deque(assignment.episodes)
        settings, task = self._settings, assignment.task
        if task != self._task:
            self.close()
            self._task = task
        num = min(settings.num_parallel, len(waiting))
        free = self._environments[:num]
        running: list[_Episode] = []
        results: tuple[EpisodeResult, ...] = ()
        while waiting or running:
            # Before the next episode begins, so that a process that it ends has returned the results of all others.
            if settings.actor != "policy":
                yield WorkerReply((), results, done=False)
            while waiting and len(running) < num:
                environment = free.pop() if free else self._make()
                running.append(_Episode(settings, environment, task, waiting.popleft()))
            if settings.actor == "policy":
                observations = tuple(episode.observe() for episode in running)
                actions_BKA = yield WorkerReply(observations, results, done=False)
                for episode, actions_KA in zip(running, actions_BKA, strict=True):
                    episode.execute(actions_KA)
            else:
                running[0].play_baseline()
            ended = [episode for episode in running if episode.done]
            running = [episode for episode in running if not episode.done]
            results = tuple(episode.result() for episode in ended)
            free += [episode.environment for episode in ended]
        yield WorkerReply((), results, done=True)

    def _make(self) -> Environment:
        settings = self._settings
        environment = make(settings.env, self._task, size=settings.size, cameras=settings.cameras)
        self._environments.append(environment)
        return environment


class _ProcessWorker:
    """A `_LocalWorker` in a process of its own, with its methods.

    assignment: what it plays; finished: the episodes of it whose results have come. slow: whether it is known to be
    silent for long.
    """

    def __init__(self, settings: RolloutSettings) -> None:
        self._settings = settings
        self.assignment: TaskEpisodes
        self.finished: set[int] = set()
        self._sent_at, self.slow = time.monotonic(), False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._settings), daemon=True)
        with interrupts_held():
            self._process.start()
        theirs.close()

    def send(self, message: TaskEpisodes | np.ndarray) -> None:
        if isinstance(message, TaskEpisodes):
            self.assignment, self.finished = message, set()
        self._sent_at, self.slow = time.monotonic(), False
        # A process that has died is noticed where its reply is missing.
        with suppress(ConnectionError):
            self._connection.send(message)

    def replied(self, timeout: float) -> bool:
        """Waits for at most so many seconds. True also where the process hangs, which `receive` then raises."""
        left = max(0.0, self._sent_at + HANG_SECONDS - time.monotonic())
        return self._connection.poll(min(timeout, left)) or left <= timeout

    def receive(self) -> WorkerReply:
        """Waits for the reply, and returns it.

        Raises LostProcessError where the process has died, hangs or failed, having started a new one, and UserError
        where that was raised in it.
        """
        try:
            if not self._connection.poll(max(0.0, self._sent_at + HANG_SECONDS - time.monotonic())):
                raise LostProcessError(f"a simulator process hung ({HANG_SECONDS} s without a reply)")
            reply = self._connection.recv()
        except LostProcessError:
            self._restart()
            raise
        # OSError: a process that is killed while it sends leaves a part of its reply.
        except (EOFError, OSError):
            self._process.join(timeout=10)
            code = self._process.exitcode
            self._restart()
            raise LostProcessError(f"a simulator process died (exit code {code}), perhaps for lack of memory") from None
        if isinstance(reply, LostProcessError):
            self._restart()
        if isinstance(reply, Exception):
            raise reply
        self.finished |= {result.episode for result in reply.results}
        return reply

    def _restart(self) -> None:
        self._process.kill()
        self.close()
        self._start()

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, settings: RolloutSettings) -> None:
    """The main loop of a worker process, until the parent closes the pipe. Errors go to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Simulators print what they do, from C as well, and standard output has the results of the command.
    os.dup2(2, 1)
    worker = _LocalWorker(settings)
    try:
        while True:
            worker.send(connection.recv())
            connection.send(worker.receive())
    except (EOFError, ConnectionError):
        worker.close()
    except UserError as error:
        connection.send(error)
    except Exception as error:
        connection.send(LostProcessError(f"a simulator process failed ({place_and_reason(error)})"))
