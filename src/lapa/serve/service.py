"""What a server does with a message, whatever brought it: reads it, asks the policy, and keeps the figures.

    service = Service(load_actors("POLICY"), ServeConfig(Path("POLICY")))
    reply = await service.reply(Session("127.0.0.1:5000"), message)         # while service.batcher.run() is running

Axes: K action chunk, A action dimensions.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from lapa import __version__
from lapa.console import console, say
from lapa.errors import UserError, out_of_memory, printable, shown, unknown
from lapa.policy.execution import Execution, RecedingHorizon, TemporalEnsemble
from lapa.policy.runtime import Actor, Policy
from lapa.serve.batching import Answer, Batcher, Busy
from lapa.serve.client import pack, unpack
from lapa.serve.config import LEAST_IMAGE, ServeConfig
from lapa.serve.protocols import KeyMap
from lapa.types import Observation

PROTOCOL = 1
# A batch waits for a client for which the policy was asked no longer ago than this.
ACTIVE_SECONDS = 1.0
# Messages above this are read in other threads, so that they do not delay those of others.
LARGE_MESSAGE = 2**20
LATENCIES, SHOWN_LATENCIES, LATENCY_SECONDS, COUNTED_SECONDS = 20_000, 1000, 300.0, 10.0
LONGEST_ERROR = 600
THUMBNAIL = 320


class TooLarge(UserError):
    """A body above --max-message-mib."""


@dataclass(eq=False)
class Session:
    """A client of the websocket. plan: how chunks become actions, if single actions are asked for, under `key`."""

    client: str
    key: str | None = None
    plan: Execution | None = None
    last_asked: float = -math.inf
    previous_ms: float | None = None
    num_requests: int = 0


@dataclass(eq=False)
class Figures:
    """Counts since the start, and the latest latencies: rows of unix time, total ms, infer ms, batch size."""

    started: float = field(default_factory=time.time)
    requests: int = 0
    busy: int = 0
    errors: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros((LATENCIES, 4)))

    def add(self, total_ms: float, infer_ms: float, batch: int) -> None:
        self.rows[self.requests % LATENCIES] = time.time(), total_ms, infer_ms, batch
        self.requests += 1

    def since(self, moment: float) -> np.ndarray:
        """Rows since a unix time, oldest first."""
        first = self.requests % LATENCIES if self.requests >= LATENCIES else 0
        rows = np.roll(self.rows[: self.requests], -first, axis=0)
        return rows[rows[:, 0] >= moment]


class Service:
    """A policy that answers messages. actors: the policy by the key of its statistics, as `load_actors` returns it.

    Raises UserError where the options do not fit the policy.
    """

    def __init__(self, actors: Mapping[str, Actor], config: ServeConfig) -> None:
        self.actors, self.config = dict(actors), config
        if config.statistics_key is not None:
            self._require_key("--statistics-key", config.statistics_key)
        self.statistics_key = config.statistics_key or (next(iter(actors)) if len(actors) == 1 else None)
        self.actor = self.actors[self.statistics_key or next(iter(actors))]
        self._check_fit()
        self.keys = KeyMap(self.actor.cameras, config.map, self.actor.state_dim)
        self.replies_actions = (config.reply or ("chunk" if config.ensemble is None else "action")) == "action"
        self.metadata = self._describe()
        self.figures = Figures()
        self.sessions: set[Session] = set()
        self.batcher = Batcher(
            self.actors, self._num_active, config.max_batch, config.batch_window_ms, config.max_queue
        )
        self.num_running = 0
        self.stopping = False
        self._last: tuple[float, str, Observation, np.ndarray] | None = None
        # When the policy was last asked for each host without a session.
        self._hosts: dict[str, float] = {}
        self._last_complaint = -math.inf

    async def warm_up(self) -> None:
        """Asks the policy once, so that the first request is as fast as others. Raises what the policy raises."""
        blank = np.zeros((224, 224, 3), np.uint8)
        state = np.zeros(self.actor.state_dim, np.float32) if self.actor.state_dim else None
        observation = Observation(dict.fromkeys(self.actor.cameras, blank), "", state)
        await self.batcher.infer(self.statistics_key or next(iter(self.actors)), observation)

    async def reply(self, session: Session, data: bytes | Exception | None) -> bytes | str:
        """The reply to a message of the websocket: a packed map, or one line about what is wrong.

        data: an error where the message was refused on its way, None where a text came.
        """
        begun = time.perf_counter()
        session.num_requests += 1
        try:
            if isinstance(data, Exception):
                raise data
            if data is None:
                raise UserError("a text message; expected a binary one, a msgpack map")
            message = await self._offloaded(len(data), self._unpacked, data)
            if _flag(message, "reset"):
                session.plan = None
                if not message:
                    return pack({"reset": True})
            key = self._key(message)
            observation = await self._offloaded(len(data), self._observed, message, key)
            if self.replies_actions:
                actions_KA, answer = await self._next_action(session, key, observation)
            else:
                answer = await self._asked(session, key, observation)
                actions_KA = answer.actions_KA[: self.config.steps_per_call]
        except Exception as error:
            return self.complaint(error, session.client)[0]
        timing = _timing(begun, answer)
        if session.previous_ms is not None:
            timing["prev_total_ms"] = session.previous_ms
        packed = pack({"actions": np.ascontiguousarray(actions_KA), "server_timing": timing})
        session.previous_ms = self._count(begun, answer, session.client, observation, actions_KA)
        return packed

    async def chunk(
        self, client: str, size: int, read: Callable[[], dict[str, Any]]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The chunk for an observation without a session, and its timing. read: returns the message, of `size` bytes.

        Raises Busy, UserError, and what the policy raises.
        """
        begun = time.perf_counter()
        self._hosts[client.rpartition(":")[0]] = begun
        message = await self._offloaded(size, read)
        key = self._key(message)
        observation = await self._offloaded(size, self._observed, message, key)
        answer = await self.batcher.infer(key, observation)
        timing = _timing(begun, answer)
        self._count(begun, answer, client, observation, answer.actions_KA)
        return answer.actions_KA, timing

    def complaint(self, error: Exception, client: str) -> tuple[str, int]:
        """Counts an error, and returns its one line and the status of HTTP."""
        if isinstance(error, Busy):
            self.figures.busy += 1
            return f"busy: {error}; try again", 503
        self.figures.errors += 1
        if shortage := out_of_memory(error):
            line, status = f"error: the server is out of memory ({shortage})", 500
        elif isinstance(error, UserError):
            line, status = f"error: {error}", 413 if isinstance(error, TooLarge) else 400
        else:
            line, status = f"error: the server failed ({type(error).__name__}); its log has more", 500
        line = printable(line)[:LONGEST_ERROR]
        # One a second: a client that only errs does not fill the log.
        if time.monotonic() - self._last_complaint > 1:
            self._last_complaint = time.monotonic()
            say(f"{client}: {line}")
            if status == 500:
                console.print("".join(traceback.format_exception(error)), soft_wrap=True)
        return line, status

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request as one that runs, until its reply is sent."""
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    async def status(self) -> dict[str, Any]:
        """Counts, latencies of the last minutes, and the last observation with its actions."""
        now, last = time.time(), self._last
        rows = self.figures.since(now - LATENCY_SECONDS)
        # The latest are all shown, so that they can be counted; of those before, as many as a plot has room for.
        before = int(np.searchsorted(rows[:, 0], now - COUNTED_SECONDS))
        rows = np.concatenate([rows[: before : max(1, math.ceil(before / SHOWN_LATENCIES))], rows[before:]])
        return {
            "uptime_s": round(now - self.figures.started, 3),
            "requests": self.figures.requests,
            "busy": self.figures.busy,
            "errors": self.figures.errors,
            "clients": len(self.sessions),
            "queue": self.batcher.waiting,
            "latency": [[round(value, 3) for value in row] for row in rows.tolist()],
            "last": None if last is None else await asyncio.to_thread(_as_shown, *last),
        }

    def summary(self, seconds: float) -> str:
        """Counts since the start and latencies of the last seconds, as one line."""
        figures, rows = self.figures, self.figures.since(time.time() - seconds)
        p50, p99 = np.percentile(rows[:, 1], (50, 99)) if len(rows) else (0.0, 0.0)
        return (
            f"{figures.requests} requests ({len(rows)} in the last {seconds:g} s), p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
            f"{figures.busy} busy, {figures.errors} errors, {len(self.sessions)} clients"
        )

    async def _next_action(
        self, session: Session, key: str, observation: Observation
    ) -> tuple[np.ndarray, Answer | None]:
        """The action to execute now, [1, A], and the answer of the policy if it was asked."""
        if session.plan is None or session.key != key:
            session.key, session.plan = key, self._plan(self.actors[key])
        answer = await self._asked(session, key, observation) if session.plan.due else None
        chunk_KA = np.zeros((0, 0), np.float32) if answer is None else answer.actions_KA
        return session.plan.next(lambda: chunk_KA)[None], answer

    async def _asked(self, session: Session, key: str, observation: Observation) -> Answer:
        """The policy's answer to a session, which others' batches wait for from now on."""
        session.last_asked = time.perf_counter()
        return await self.batcher.infer(key, observation)

    def _plan(self, actor: Actor) -> Execution:
        if self.config.ensemble is None:
            return RecedingHorizon(self.config.steps_per_call)
        return TemporalEnsemble(self.config.ensemble, self.config.steps_per_call or 1, actor.action_space.binary)

    async def _offloaded(self, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `work` on a message of `size` bytes, in another thread where it is large."""
        if self.stopping:
            raise Busy("the server is stopping")
        if size > LARGE_MESSAGE:
            return await asyncio.to_thread(work, *arguments)
        return work(*arguments)

    def _unpacked(self, data: bytes) -> dict[Any, Any]:
        try:
            return unpack(data, self.config.max_message_mib * 2**20)
        except ValueError as error:
            raise UserError(error) from None

    def _key(self, message: dict[Any, Any]) -> str:
        """Takes `unnorm_key` from a message, and returns the key of the statistics to act with."""
        key = message.pop("unnorm_key", None)
        if key is not None:
            return self._require_key("unnorm_key", key)
        if self.statistics_key is None:
            keys = ", ".join(self.actors)
            raise UserError(f"the policy has statistics of several datasets; give unnorm_key: {keys}")
        return self.statistics_key

    def _require_key(self, name: str, key: Any) -> str:
        known = [each for each in self.actors if each]
        if not known:
            raise UserError(f"the policy has no statistics of datasets; leave out {name}")
        if not isinstance(key, str) or key not in known:
            raise unknown(name, str(key)[:100], known)
        return key

    def _observed(self, message: Mapping[Any, Any], key: str) -> Observation:
        """A message as an observation that the policy can act on. Raises UserError where it is none."""
        found = self.keys.observation(message)
        for camera in self.actor.cameras:
            _check_image(found[camera], camera, self.config.max_image)
        instruction, most = found.get("instruction", ""), self.config.max_instruction
        if isinstance(instruction, str) and len(instruction) > most:
            raise UserError(f"an instruction of {len(instruction)} characters; at most {most} (--max-instruction)")
        try:
            return self.actors[key].checked([found])[0]
        except UserError as error:
            raise UserError(str(error).removeprefix("observation 0: ")) from None

    def _count(
        self, begun: float, answer: Answer | None, client: str, observation: Observation, actions_KA: np.ndarray
    ) -> float:
        """Keeps the figures of an answered request. Returns its milliseconds."""
        timing = _timing(begun, answer)
        self.figures.add(timing["server_ms"], timing["infer_ms"], timing["batch"])
        self._last = time.time(), client, observation, actions_KA
        return timing["server_ms"]

    def _num_active(self) -> int:
        """Clients for which the policy was asked within ACTIVE_SECONDS."""
        since = time.perf_counter() - ACTIVE_SECONDS
        self._hosts = {host: moment for host, moment in self._hosts.items() if moment >= since}
        return len(self._hosts) + sum(session.last_asked >= since for session in self.sessions)

    def _check_fit(self) -> None:
        """Raises UserError where the options do not fit the policy's chunk."""
        steps, chunk = self.config.steps_per_call, self.actor.chunk
        if steps is not None and steps > chunk:
            raise UserError(f"--steps-per-call {steps} is more than the policy's chunk of {chunk}")
        if self.config.ensemble is not None and (steps or 1) >= chunk:
            raise UserError(
                f"--ensemble: a chunk of {chunk} ends before the next one starts, so there is nothing to average; "
                "give a smaller --steps-per-call, or a policy with a longer chunk"
            )

    def _describe(self) -> dict[str, Any]:
        """The metadata that clients are sent."""
        actor, config, space = self.actor, self.config, self.actor.action_space
        return {
            "protocol_version": PROTOCOL,
            "lapa_version": __version__,
            "policy": config.policy.name,
            "kind": actor.config.backbone.kind if isinstance(actor, Policy) else type(actor).__name__.lower(),
            "device": str(getattr(actor, "device", "cpu")),
            "cameras": list(actor.cameras),
            "keys": {**self.keys.images, **{camera: camera for camera in self.keys.unnamed}},
            "state_keys": list(self.keys.state),
            "state_dim": actor.state_dim,
            "instruction": True,
            "chunk": actor.chunk,
            "reply": "action" if self.replies_actions else "chunk",
            "reply_steps": 1 if self.replies_actions else config.steps_per_call or actor.chunk,
            "action_dim": actor.action_dim,
            "action_names": list(space.names),
            "binary": list(space.binary),
            "control": space.control,
            "fps": actor.fps,
            "statistics_key": self.statistics_key or None,
            "statistics_keys": [name for name in self.actors if name],
            "max_message_bytes": config.max_message_mib * 2**20,
            "max_image": config.max_image,
            "max_instruction": config.max_instruction,
        }


def _flag(message: dict[Any, Any], name: str) -> bool:
    """Takes a flag from a message; False where there is none. Raises UserError for what is neither true nor false."""
    flag = message.pop(name, False)
    if not isinstance(flag, bool | np.bool_):
        raise UserError(f"{name} is {shown(flag)}; expected true or false")
    return bool(flag)


def _timing(begun: float, answer: Answer | None) -> dict[str, Any]:
    """infer_ms: of the policy for the whole batch; 0 where a plan had the action. server_ms: since the message came."""
    infer_ms, batch = (0.0, 0) if answer is None else (answer.infer_ms, answer.batch)
    return {"infer_ms": infer_ms, "server_ms": 1000 * (time.perf_counter() - begun), "batch": batch}


def _check_image(image: Any, camera: str, most: int) -> None:
    """Raises UserError for what is no array, and for a height or width that no camera has."""
    if not isinstance(image, np.ndarray):
        raise UserError(f"camera {camera}: got {type(image).__name__}, expected an array of an RGB image")
    sides = sorted(image.shape)[1:]
    if image.ndim == 3 and 3 in image.shape and (min(sides) < LEAST_IMAGE or max(sides) > most):
        raise UserError(
            f"camera {camera}: an image of shape {list(image.shape)}; height and width must be {LEAST_IMAGE} to {most} "
            "(--max-image)"
        )


def _as_shown(moment: float, client: str, observation: Observation, actions_KA: np.ndarray) -> dict[str, Any]:
    """The last observation and its actions for the page; images as small JPEG."""
    images = {}
    for camera, image_HWC in observation.images.items():
        image = Image.fromarray(np.ascontiguousarray(image_HWC))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(file := io.BytesIO(), "JPEG", quality=85)
        images[camera] = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {
        "time": moment,
        "client": client,
        "images": images,
        "instruction": observation.instruction,
        "state": None if observation.state is None else observation.state.tolist(),
        "actions": actions_KA.tolist(),
    }
