"""Concurrent requests become batches of the policy, which runs in a thread of its own.

A batch is what waits when the policy is free, up to `max_batch`. Where the policy was asked for other clients within
the last second, a batch waits for them up to `window_ms`, so that clients in step are answered together; one client
alone never waits. An observation on which the policy fails does not spoil the others: all are then answered one by
one.

Axes: K action chunk, A action dimensions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Float

from lapa.errors import UserError
from lapa.policy.runtime import Actor
from lapa.types import Observation


class Busy(Exception):
    """More requests wait than --max-queue, or the server is stopping."""


@dataclass(frozen=True)
class Answer:
    """infer_ms: how long the policy took for the batch of `batch` requests."""

    actions_KA: Float[np.ndarray, "K A"]
    infer_ms: float
    batch: int


@dataclass(frozen=True, eq=False)
class _Request:
    key: str
    observation: Observation
    answer: asyncio.Future[Answer]


class Batcher:
    """Answers requests with the policies `actors`, which share weights: one for each key of statistics.

    num_active: the clients for which it was asked lately, those that wait included.
    """

    def __init__(
        self,
        actors: dict[str, Actor],
        num_active: Callable[[], int],
        max_batch: int,
        window_ms: float,
        max_queue: int,
    ) -> None:
        self._actors, self._num_active = actors, num_active
        self._max_batch, self._window = max_batch, window_ms / 1000
        self._queue: asyncio.Queue[_Request] = asyncio.Queue(max_queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    async def infer(self, key: str, observation: Observation) -> Answer:
        """The chunk for an observation that `Actor.checked` has returned. Raises Busy, and what the policy raises."""
        answer = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait(_Request(key, observation, answer))
        except asyncio.QueueFull:
            raise Busy(f"{self._queue.maxsize} requests wait already") from None
        return await answer

    async def run(self) -> None:
        """Answers requests until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = [request for request in await self._next_batch() if not request.answer.done()]
                for key, group in groupby(sorted(batch, key=lambda request: request.key), lambda each: each.key):
                    requests = list(group)
                    observations = [request.observation for request in requests]
                    answers = await loop.run_in_executor(self._thread, act, self._actors[key], observations)
                    for request, answer in zip(requests, answers, strict=True):
                        if request.answer.done():
                            continue
                        if isinstance(answer, Answer):
                            request.answer.set_result(answer)
                        else:
                            request.answer.set_exception(answer)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _next_batch(self) -> list[_Request]:
        batch = [await self._queue.get()]
        deadline = asyncio.get_running_loop().time() + self._window
        while len(batch) < self._max_batch:
            if self._queue.empty() and len(batch) >= self._num_active():
                break
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(self._queue.get_nowait() if not self._queue.empty() else await self._queue.get())
            except TimeoutError:
                break
        return batch


def act(actor: Actor, observations: Sequence[Observation]) -> list[Answer | Exception]:
    """Returns an answer or the error of each observation; they are one batch, unless the policy fails on that."""
    started = time.perf_counter()
    try:
        actions_BKA = actor.act(observations)
        finite_B = np.isfinite(actions_BKA).all(axis=(1, 2))
    except Exception as error:
        if len(observations) == 1:
            return [error]
        return [answer for observation in observations for answer in act(actor, [observation])]
    spent_ms = 1000 * (time.perf_counter() - started)
    damaged = UserError("the policy predicted actions that are not finite; its checkpoint is damaged")
    return [
        Answer(actions_KA, spent_ms, len(observations)) if finite else damaged
        for actions_KA, finite in zip(actions_BKA, finite_B, strict=True)
    ]
