"""From continuous latent actions to a few codes: NSVQ (the paper's) and finite scalar quantisation.

NSVQ: Vali and Backstrom 2022, https://doi.org/10.1109/ACCESS.2022.3186995; used by LAPA, https://arxiv.org/abs/2410.11758.
FSQ: Mentzer et al. 2023, https://arxiv.org/abs/2309.15505, from vector-quantize-pytorch.

    pytest tests/test_latent_model.py

Every quantiser has the same interface:
    forward(z_BLD, noise=None) -> Quantized    differentiable; in training it also keeps its own state up to date
    codes(z_BLD) -> BL int64                   deterministic, changes nothing
    embed(codes_BL) -> BLD                     what the decoder is given for these codes
    initialise(z_BLD)                          fits the state to the scale of real data, once, before training
Axes: B batch, L latent action length, D width, K codebook size, R rows (B times L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from vector_quantize_pytorch import FSQ

REPLACE_EVERY = 64  # training forwards
DEAD_SHARE = 0.02  # of the uses a code would have if all were used equally
REPLACEMENT_NOISE = 0.1  # of the spread of z: what keeps replacements apart
KMEANS_STEPS = 10
NORM_FLOOR = 1e-24
MOMENTUM = 0.05
VARIANCE_FLOOR = 1e-8


@dataclass(frozen=True)
class Quantized:
    """quantized_BLD: what the decoder sees (noisy for NSVQ in training); codes_BL: int64 in [0, K)."""

    quantized_BLD: Tensor
    codes_BL: Tensor


class NSVQ(nn.Module):
    """Noise substitution: training replaces the quantisation error by random noise of the same length.

    Needs no other loss term. Against the released code, codes that are hardly used are really replaced: uses are
    counted sample by sample, and a dead code moves to a random latent of the current batch. The change is made
    before the codebook enters the graph, and every process makes the same one.
    """

    uses_K: Tensor
    num_forwards: Tensor

    def __init__(self, dim: int, codebook_size: int, standardize: Standardize | None = None):
        super().__init__()
        self.codebook_size = codebook_size
        self.standardize = standardize
        self.codebook_KD = nn.Parameter(torch.randn(codebook_size, dim))
        self.register_buffer("uses_K", torch.zeros(codebook_size))
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, z_BLD: Tensor, noise: Tensor | None = None) -> Quantized:
        """noise: standard normal, of as many elements as z; drawn here in training, and left out in evaluation."""
        with torch.autocast(z_BLD.device.type, enabled=False):
            z = _standardized(self.standardize, z_BLD.float(), train=self.training)
            if self.training:
                self._replace_dead_codes(z.detach())
            codes = _nearest(z, self.codebook_KD)
            nearest = self.codebook_KD[codes]
            if noise is None and not self.training:
                return Quantized(nearest, codes)
            noise = torch.randn_like(z) if noise is None else noise.reshape(z.shape).to(z)
            quantized = z + _norm(z - nearest) / _norm(noise) * noise
        return Quantized(quantized, codes)

    @torch.no_grad()
    def codes(self, z_BLD: Tensor) -> Tensor:
        with torch.autocast(z_BLD.device.type, enabled=False):
            return _nearest(_standardized(self.standardize, z_BLD.float()), self.codebook_KD)

    def embed(self, codes_BL: Tensor) -> Tensor:
        return self.codebook_KD[codes_BL]

    @torch.no_grad()
    def initialise(self, z_BLD: Tensor) -> None:
        """k-means from seeds that lie far apart."""
        if self.standardize is not None:
            self.standardize.train_step(z_BLD.float(), momentum=1.0)
        rows = rearrange(_standardized(self.standardize, z_BLD.float()), "b l d -> (b l) d")
        codebook = rows[:1]
        while len(codebook) < self.codebook_size:
            codebook = torch.cat((codebook, rows[_distances(rows, codebook).amin(-1).argmax()][None]))
        for _ in range(KMEANS_STEPS):
            member_RK = nn.functional.one_hot(_nearest(rows, codebook), self.codebook_size).to(rows)
            sizes_K = member_RK.sum(0)
            means = member_RK.T @ rows / sizes_K.clamp(min=1)[:, None]
            codebook = torch.where(sizes_K[:, None] > 0, means, codebook + _jitter(rows, codebook))
        self.codebook_KD.copy_(_same_everywhere(codebook))

    @torch.no_grad()
    def _replace_dead_codes(self, z_BLD: Tensor) -> None:
        """Counts this batch; every REPLACE_EVERY forwards, moves dead codes. Branch-free: no wait for the device."""
        rows = rearrange(z_BLD, "b l d -> (b l) d")
        self.num_forwards.add_(1)
        self.uses_K.add_(
            _sum_everywhere(torch.bincount(_nearest(rows, self.codebook_KD), minlength=self.codebook_size).float())
        )
        due = self.num_forwards % REPLACE_EVERY == 0
        dead_K = due & (self.uses_K < DEAD_SHARE * self.uses_K.mean())
        chosen_K = torch.randint(len(rows), (self.codebook_size,), device=rows.device)
        fresh = rows[chosen_K] + _jitter(rows, self.codebook_KD)
        revived = torch.where(dead_K[:, None], fresh, self.codebook_KD)
        self.codebook_KD.copy_(_same_everywhere(revived))
        self.uses_K.mul_(~due)


class FiniteScalar(nn.Module):
    """FSQ: z is projected to a few scalars, each rounded to one of its levels, straight-through gradient.

    The codebook is fixed, so no code can starve; `standardize` keeps the scalars spread over the levels.
    """

    def __init__(self, dim: int, levels: tuple[int, ...], standardize: Standardize | None = None):
        super().__init__()
        self.project_in = nn.Linear(dim, len(levels))
        self.standardize = standardize
        self.levels = FSQ(list(levels), preserve_symmetry=True)
        self.project_out = nn.Linear(len(levels), dim)

    def forward(self, z_BLD: Tensor, noise: Tensor | None = None) -> Quantized:
        """noise: not used; rounding is deterministic."""
        with torch.autocast(z_BLD.device.type, enabled=False):
            scalars = _standardized(self.standardize, self.project_in(z_BLD.float()), train=self.training)
            rounded, codes = self.levels(scalars)
            return Quantized(self.project_out(rounded), codes.long())

    @torch.no_grad()
    def codes(self, z_BLD: Tensor) -> Tensor:
        with torch.autocast(z_BLD.device.type, enabled=False):
            return self.levels(_standardized(self.standardize, self.project_in(z_BLD.float())))[1].long()

    def embed(self, codes_BL: Tensor) -> Tensor:
        return self.project_out(self.levels.indices_to_codes(codes_BL))

    @torch.no_grad()
    def initialise(self, z_BLD: Tensor) -> None:
        if self.standardize is not None:
            self.standardize.train_step(self.project_in(z_BLD.float()), momentum=1.0)


class Standardize(nn.Module):
    """Zero mean and unit variance for each position and dimension, over the batch of all processes.

    Training uses the batch's own moments, with their gradient, and follows them with running ones; evaluation uses
    the running ones. (Training on running moments, followed at 0.01 a step, had one code left at step 300.)
    """

    mean_LD: Tensor
    variance_LD: Tensor

    def __init__(self, latent_length: int, dim: int):
        super().__init__()
        self.register_buffer("mean_LD", torch.zeros(latent_length, dim))
        self.register_buffer("variance_LD", torch.ones(latent_length, dim))

    def forward(self, z_BLD: Tensor) -> Tensor:
        return self._scale(z_BLD, self.mean_LD, self.variance_LD)

    def train_step(self, z_BLD: Tensor, momentum: float = MOMENTUM) -> Tensor:
        """Standardises by the batch's moments and moves the running ones towards them."""
        mean = _mean_everywhere(z_BLD.mean(0))
        variance = _mean_everywhere((z_BLD - mean).square().mean(0))
        with torch.no_grad():
            self.mean_LD.lerp_(mean, momentum)
            self.variance_LD.lerp_(variance, momentum)
        return self._scale(z_BLD, mean, variance)

    @staticmethod
    def _scale(z_BLD: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (z_BLD - mean) * (variance + VARIANCE_FLOOR).rsqrt()


def _standardized(standardize: Standardize | None, z_BLD: Tensor, *, train: bool = False) -> Tensor:
    if standardize is None:
        return z_BLD
    return standardize.train_step(z_BLD) if train else standardize(z_BLD)


def _norm(x: Tensor) -> Tensor:
    """Length of the last axis, with a finite gradient (zero) at zero."""
    return x.square().sum(-1, keepdim=True).clamp(min=NORM_FLOOR).sqrt()


def _distances(rows: Tensor, codebook_KD: Tensor) -> Tensor:
    return (rows[..., None, :] - codebook_KD).square().sum(-1)


def _nearest(rows: Tensor, codebook_KD: Tensor) -> Tensor:
    return _distances(rows, codebook_KD).argmin(-1)


def _jitter(rows_RD: Tensor, codebook_KD: Tensor) -> Tensor:
    return REPLACEMENT_NOISE * rows_RD.std(0, correction=0) * torch.randn_like(codebook_KD)


def _sum_everywhere(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def _mean_everywhere(x: Tensor) -> Tensor:
    """Mean over processes with equal batches; its gradient flows back to each of them."""
    if dist.is_available() and dist.is_initialized():
        return all_reduce(x) / dist.get_world_size()
    return x


def _same_everywhere(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        x = x.contiguous()
        dist.broadcast(x, src=0)
    return x
