"""Options of `lapa serve`; imports neither torch nor a web server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

# The least height and width of an image: no camera is that small.
LEAST_IMAGE = 8


@dataclass(frozen=True)
class ServeConfig:
    """Serves a policy to the clients of robots, over openpi's websocket and OpenVLA's REST."""

    policy: Annotated[Path, tyro.conf.Positional]
    """Folder of a finetuned policy, or its id on the hub."""
    port: int = 8000
    """Port; 0 for a free one."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 for this machine only, 0.0.0.0 for its whole network."""
    api_key_file: Path | None = None
    """File whose one line clients must send as `Authorization: Api-Key KEY`; readable by its owner only (chmod 600)."""
    statistics_key: str | None = None
    """Dataset whose statistics the policy acts by where a request names none, if it learned from several with
    actions."""
    map: tuple[str, ...] = ()
    """Keys that clients send: libero, droid, aloha, bridge, or KEY=camera (also KEY=state, KEY=instruction) for each
    that is named otherwise. The policy's own names always work."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    reply: Literal["chunk", "action"] | None = None
    """What a websocket request returns: the chunk of actions, or the one to execute now; by default the chunk, and with
    --ensemble the action."""
    steps_per_call: int | None = None
    """Actions of each chunk that are executed; by default all, or with --ensemble one."""
    ensemble: float | None = None
    """Average overlapping chunks' predictions of one moment, the i-th oldest weighted exp(-ENSEMBLE * i): 0.01 is
    usual."""
    max_batch: int = 16
    """Largest number of concurrent requests that the policy answers at once; 1 to answer one by one."""
    batch_window_ms: float = 5.0
    """Longest wait for the requests of other active clients before a batch is begun; 0 not to wait."""
    max_queue: int = 64
    """Requests that may wait; further ones are answered with `busy`."""
    max_message_mib: int = 64
    """Largest message or body."""
    max_image: int = 4096
    """Largest height and width of an image."""
    max_instruction: int = 2000
    """Longest instruction, in characters."""
