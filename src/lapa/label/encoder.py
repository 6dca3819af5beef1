"""Pairs of frames through a latent action model, in full batches that are filled across windows and episodes.

Frames go to the device once and pairs are made there. On a GPU a batch is queued while the one before is computed, and
codes come back one batch late, so that the GPU does not wait for this process.
Axes: B batch, T time, C channel, H W image, P pairs, L latent action length, D width.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lapa.latent.model import LatentActionModel


class Encoder:
    """`add` windows of frames, then `finish`. busy: seconds of encoding so far, by the device's own clock.

    precision: fp32, or bf16 by autocast. batch_size: pairs encoded at once, but for the last ones before `finish`.
    embeddings: keep the continuous latents too.
    """

    def __init__(
        self, model: LatentActionModel, horizon: int, batch_size: int, precision: str = "fp32", embeddings: bool = True
    ) -> None:
        self.model, self.horizon, self.batch_size = model, horizon, batch_size
        self.half, self.embeddings = precision == "bf16", embeddings
        self.device = next(model.parameters()).device
        self.busy = 0.0
        self._on_gpu = self.device.type == "cuda"
        self._parts: list[Tensor] = []
        self._num_waiting = 0
        self._codes: list[np.ndarray] = []
        self._z: list[np.ndarray] = []
        self._computed: tuple[Tensor, Tensor, Any] | None = None

    def add(self, frames_THWC: UInt8[np.ndarray, "T H W 3"], starts_P: Int64[np.ndarray, "P"]) -> None:
        """Takes the pairs that begin with these frames; encodes what fills a batch. The frames may change after."""
        if not len(starts_P):
            return
        frames = torch.from_numpy(frames_THWC)
        if self._on_gpu:
            frames = frames.pin_memory().to(self.device, non_blocking=True)
        frames_TCHW, starts = frames.permute(0, 3, 1, 2), torch.from_numpy(starts_P).to(self.device)
        while len(starts):
            taken, starts = starts.tensor_split([self.batch_size - self._num_waiting])
            self._parts.append(torch.stack([frames_TCHW[taken], frames_TCHW[taken + self.horizon]], dim=1))
            self._num_waiting += len(taken)
            if self._num_waiting == self.batch_size:
                self._encode()

    def finish(self) -> tuple[Int64[np.ndarray, "P L"], Float[np.ndarray, "P L D"]]:
        """Codes of all pairs since the last `finish`, in order; continuous latents too, where they are kept."""
        if self._num_waiting:
            self._encode()
        self._fetch()
        config = self.model.config
        none_PLD = np.zeros((0, config.latent_length, config.quant_dim), np.float32)
        codes_PL = np.concatenate([none_PLD[..., 0].astype(np.int64), *self._codes])
        z_PLD = np.concatenate([none_PLD, *self._z])
        self._codes, self._z = [], []
        return codes_PL, z_PLD

    def _encode(self) -> None:
        pairs_BTCHW = torch.cat(self._parts).contiguous()
        self._parts, self._num_waiting = [], 0
        begun = self._now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            action = self.model.encode(pairs_BTCHW)
        assert action.codes_BL is not None
        computing = (action.codes_BL, action.z_BLD.float(), (begun, self._now()))
        self._fetch()
        self._computed = computing

    def _fetch(self) -> None:
        """Waits for the last batch and keeps what it gave."""
        if self._computed is None:
            return
        codes_BL, z_BLD, (begun, ended) = self._computed
        self._codes.append(codes_BL.cpu().numpy())
        if self.embeddings:
            self._z.append(z_BLD.cpu().numpy())
        self.busy += begun.elapsed_time(ended) / 1000 if self._on_gpu else ended - begun
        self._computed = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
