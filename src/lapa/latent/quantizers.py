"""From continuous latent actions to a few codes: NSVQ (the paper's), EMA-VQ, FSQ, and none at all.

NSVQ: Vali and Backstrom 2022, https://doi.org/10.1109/ACCESS.2022.3186995; used by LAPA, https://arxiv.org/abs/2410.11758.
VQ: van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, with moving averages, from vector-quantize-pytorch.
FSQ: Mentzer et al. 2023, https://arxiv.org/abs/2309.15505, from vector-quantize-pytorch.
Continuous: a Gaussian pulled to the unit normal with a small weight, as a beta-VAE, https://openreview.net/forum?id=Sy2fzU9gl.

    lapa latent train --quantizer fsq --latent-length 16 --codebook-size 8 --data DATASET --out LAM

Axes: B batch, L latent action length, D width, K codebook size, R rows (B times L).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from vector_quantize_pytorch import FSQ, VectorQuantize

from lapa.errors import UserError
from lapa.latent.config import LatentModelConfig

# Of the running moments: the share of a batch falls from the first to the second, as SETTLING over the step. Where
# latents form clusters, moments that waver would push clusters to and fro over the border between two codes.
FIRST_MOMENTUM, LAST_MOMENTUM, SETTLING = 0.05, 0.005, 10
VARIANCE_FLOOR = 1e-8
REPLACE_EVERY = 64  # training forwards
DEAD_SHARE = 0.02  # of the uses a code would have if all were used equally
REPLACEMENT_NOISE = 0.1  # of the spread of z; keeps replacements apart
KMEANS_STEPS = 10
NORM_FLOOR = 1e-24
EMA_DECAY = 0.99
EMA_DEAD_USES = 0.5  # of a code in a batch, on average
LARGEST_LOG_VARIANCE = 10.0
NO_CODES = "a continuous latent action model has no codes; train one with --quantizer fsq for codes"


@dataclass(frozen=True)
class Quantized:
    """quantized_BLD: input of the decoder; codes_BL: int64 in [0, K), or None; loss: the quantizer's own loss."""

    quantized_BLD: Tensor
    codes_BL: Tensor | None
    loss: Tensor | None = None


class Quantizer(nn.Module):
    """The interface. A subclass implements `learn`, `look_up`, `embed` and, if it has state to fit, `fit`.

    forward    differentiable, by `learn` in training or where noise is given, else by `look_up`
    quantize   deterministic, changes nothing
    embed      the decoder's input for these codes
    initialise fits scale and state to real latents, once, before training
    """

    discrete = True

    def __init__(self, standardize: Standardize | None):
        super().__init__()
        self.standardize = standardize

    def forward(self, z_BLD: Tensor, noise: Tensor | None = None) -> Quantized:
        """noise: standard normal, of as many elements as z, for the quantizers that draw it; drawn here if absent."""
        with torch.autocast(z_BLD.device.type, enabled=False):
            z = self._standardized(self.project(z_BLD.float()), train=self.training)
            return self.learn(z, noise) if self.training or noise is not None else self.look_up(z)

    @torch.no_grad()
    def quantize(self, z_BLD: Tensor) -> Quantized:
        with torch.autocast(z_BLD.device.type, enabled=False):
            return self.look_up(self._standardized(self.project(z_BLD.float()), train=False))

    @torch.no_grad()
    def initialise(self, z_BLD: Tensor) -> None:
        z = self.project(z_BLD.float())
        if self.standardize is not None:
            self.standardize.initialise(z)
        self.fit(self._standardized(z, train=False))

    def project(self, z_BLD: Tensor) -> Tensor:
        """To the space in which it quantises; by default the latents' own."""
        return z_BLD

    def learn(self, z_BLD: Tensor, noise: Tensor | None) -> Quantized:
        raise NotImplementedError

    def look_up(self, z_BLD: Tensor) -> Quantized:
        raise NotImplementedError

    def embed(self, codes_BL: Tensor) -> Tensor:
        raise NotImplementedError

    def fit(self, z_BLD: Tensor) -> None:
        """Fits the state to standardised latents; nothing by default."""

    def _standardized(self, z_BLD: Tensor, *, train: bool) -> Tensor:
        if self.standardize is None:
            return z_BLD
        return self.standardize.train_step(z_BLD) if train else self.standardize(z_BLD)


class Standardize(nn.Module):
    """Zero mean and unit variance for each position and dimension, over the batch of all processes.

    Values are scaled by running moments, in training as in evaluation, so that a pair has the same code whatever
    batch it is in; the gradient is that of scaling by the batch's own moments (batch renormalisation, Ioffe 2017,
    https://arxiv.org/abs/1702.03275, without its bounds). Running moments without that gradient collapse.
    """

    mean_LD: Tensor
    variance_LD: Tensor
    num_steps: Tensor

    def __init__(self, latent_length: int, dim: int):
        super().__init__()
        self.register_buffer("mean_LD", torch.zeros(latent_length, dim))
        self.register_buffer("variance_LD", torch.ones(latent_length, dim))
        self.register_buffer("num_steps", torch.zeros(()))

    def forward(self, z_BLD: Tensor) -> Tensor:
        return self._scale(z_BLD, self.mean_LD, self.variance_LD)

    def initialise(self, z_BLD: Tensor) -> None:
        """Takes the moments of these latents."""
        self.mean_LD.copy_(mean_everywhere(z_BLD.mean(0)))
        self.variance_LD.copy_(mean_everywhere((z_BLD - self.mean_LD).square().mean(0)))

    def train_step(self, z_BLD: Tensor) -> Tensor:
        """Moves the running moments towards the batch's, then standardises."""
        mean = mean_everywhere(z_BLD.mean(0))
        variance = mean_everywhere((z_BLD - mean).square().mean(0))
        with torch.no_grad():
            self.num_steps += 1
            momentum = (SETTLING / self.num_steps).clamp(LAST_MOMENTUM, FIRST_MOMENTUM)
            self.mean_LD.lerp_(mean, momentum)
            self.variance_LD.lerp_(variance, momentum)
        by_batch = self._scale(z_BLD, mean, variance)
        return by_batch + (self(z_BLD) - by_batch).detach()

    @staticmethod
    def _scale(z_BLD: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (z_BLD - mean) * (variance + VARIANCE_FLOOR).rsqrt()


def sum_everywhere(x: Tensor) -> Tensor:
    """Sum over processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean_everywhere(x: Tensor) -> Tensor:
    """Mean over processes with equal batches; its gradient flows back to each of them."""
    if dist.is_available() and dist.is_initialized():
        return all_reduce(x) / dist.get_world_size()
    return x


def same_everywhere(x: Tensor) -> Tensor:
    """The main process's value, in every process."""
    if dist.is_available() and dist.is_initialized():
        x = x.contiguous()
        dist.broadcast(x, src=0)
    return x


class NSVQ(Quantizer):
    """Noise substitution: training replaces the quantisation error by random noise of the same length.

    No other loss term is needed. Unlike in the released code, dead codes are replaced: uses are counted by sample, and
    a dead code moves to a random latent of the current batch. The change is made before the codebook enters the graph,
    the same in every process.
    """

    uses_K: Tensor
    num_forwards: Tensor

    def __init__(self, dim: int, codebook_size: int, standardize: Standardize | None = None):
        super().__init__(standardize)
        self.codebook_size = codebook_size
        self.codebook_KD = nn.Parameter(torch.randn(codebook_size, dim))
        self.register_buffer("uses_K", torch.zeros(codebook_size))
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))

    def learn(self, z_BLD: Tensor, noise: Tensor | None) -> Quantized:
        if self.training:
            self._replace_dead_codes(z_BLD.detach())
        codes = _nearest(z_BLD, self.codebook_KD)
        noise = torch.randn_like(z_BLD) if noise is None else noise.reshape(z_BLD.shape).to(z_BLD)
        return Quantized(z_BLD + _norm(z_BLD - self.codebook_KD[codes]) / _norm(noise) * noise, codes)

    def look_up(self, z_BLD: Tensor) -> Quantized:
        codes = _nearest(z_BLD, self.codebook_KD)
        return Quantized(self.codebook_KD[codes], codes)

    def embed(self, codes_BL: Tensor) -> Tensor:
        return self.codebook_KD[codes_BL]

    def fit(self, z_BLD: Tensor) -> None:
        """k-means from seeds that lie far apart."""
        rows = rearrange(z_BLD, "b l d -> (b l) d")
        codebook = rows[:1]
        while len(codebook) < self.codebook_size:
            codebook = torch.cat((codebook, rows[_distances(rows, codebook).amin(-1).argmax()][None]))
        for _ in range(KMEANS_STEPS):
            member_RK = nn.functional.one_hot(_nearest(rows, codebook), self.codebook_size).to(rows)
            sizes_K = member_RK.sum(0)
            means = member_RK.T @ rows / sizes_K.clamp(min=1)[:, None]
            codebook = torch.where(sizes_K[:, None] > 0, means, codebook + _jitter(rows, codebook))
        self.codebook_KD.copy_(same_everywhere(codebook))

    @torch.no_grad()
    def _replace_dead_codes(self, z_BLD: Tensor) -> None:
        """Counts this batch; every REPLACE_EVERY forwards, moves dead codes. Branch-free: no wait for the device."""
        rows = rearrange(z_BLD, "b l d -> (b l) d")
        self.num_forwards.add_(1)
        self.uses_K.add_(
            sum_everywhere(nn.functional.one_hot(_nearest(rows, self.codebook_KD), self.codebook_size).sum(0).float())
        )
        due = self.num_forwards % REPLACE_EVERY == 0
        dead_K = due & (self.uses_K < DEAD_SHARE * self.uses_K.mean())
        chosen_K = torch.randint(len(rows), (self.codebook_size,), device=rows.device)
        fresh = rows[chosen_K] + _jitter(rows, self.codebook_KD)
        revived = torch.where(dead_K[:, None], fresh, self.codebook_KD)
        self.codebook_KD.copy_(same_everywhere(revived))
        self.uses_K.mul_(~due)


class MovingAverages(Quantizer):
    """EMA-VQ: codes follow the mean of the latents they are nearest to; straight-through gradient, commitment loss."""

    def __init__(
        self, dim: int, codebook_size: int, standardize: Standardize | None = None, *, commitment_weight: float = 0.25
    ):
        super().__init__(standardize)
        self.codebook = VectorQuantize(
            dim,
            codebook_size,
            decay=EMA_DECAY,
            kmeans_init=True,
            threshold_ema_dead_code=EMA_DEAD_USES,
            commitment_weight=commitment_weight,
            rotation_trick=False,
            # Asked for by torchrun's own variable, since the processes meet only after the model is built.
            sync_codebook=int(os.environ.get("WORLD_SIZE", "1")) > 1,
        )

    def learn(self, z_BLD: Tensor, noise: Tensor | None) -> Quantized:
        quantized, codes, loss = self.codebook(z_BLD)
        return Quantized(quantized, codes, loss.sum())

    def look_up(self, z_BLD: Tensor) -> Quantized:
        quantized, codes, _ = self.codebook(z_BLD, freeze_codebook=True)
        return Quantized(quantized, codes)

    def embed(self, codes_BL: Tensor) -> Tensor:
        return self.codebook.get_codes_from_indices(codes_BL)

    def fit(self, z_BLD: Tensor) -> None:
        """k-means, which the codebook runs on the first latents it is given in training."""
        self.codebook.train()(z_BLD)
        self.codebook.train(self.training)


class FiniteScalar(Quantizer):
    """FSQ: z is projected to a few scalars, each rounded to one of its levels, straight-through gradient.

    The codebook is fixed, so no code can starve; `standardize` keeps the scalars spread over the levels.
    """

    def __init__(self, dim: int, levels: tuple[int, ...], standardize: Standardize | None = None):
        super().__init__(standardize)
        self.project_in = nn.Linear(dim, len(levels))
        # It reads its own tensors as it is built, which those without memory (`lapa.nn.saved`) do not allow.
        with torch.device("cpu"):
            self.levels = FSQ(list(levels), preserve_symmetry=True)
        self.project_out = nn.Linear(len(levels), dim)

    def project(self, z_BLD: Tensor) -> Tensor:
        return self.project_in(z_BLD)

    def learn(self, z_BLD: Tensor, noise: Tensor | None) -> Quantized:
        rounded, codes = self.levels(z_BLD)
        return Quantized(self.project_out(rounded), codes.long())

    def look_up(self, z_BLD: Tensor) -> Quantized:
        return self.learn(z_BLD, None)

    def embed(self, codes_BL: Tensor) -> Tensor:
        return self.project_out(self.levels.indices_to_codes(codes_BL))


class Continuous(Quantizer):
    """No codes: a Gaussian for each latent, sampled in training, its mean in evaluation; pulled to the unit normal."""

    discrete = False

    def __init__(self, dim: int, standardize: Standardize | None = None, *, kl_weight: float = 1e-4):
        super().__init__(standardize)
        self.moments, self.kl_weight = nn.Linear(dim, 2 * dim), kl_weight

    def learn(self, z_BLD: Tensor, noise: Tensor | None) -> Quantized:
        mean, log_variance = self.moments(z_BLD).chunk(2, dim=-1)
        log_variance = log_variance.clamp(max=LARGEST_LOG_VARIANCE)
        noise = torch.randn_like(mean) if noise is None else noise.reshape(mean.shape).to(mean)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return Quantized(mean + (0.5 * log_variance).exp() * noise, None, self.kl_weight * divergence)

    def look_up(self, z_BLD: Tensor) -> Quantized:
        return Quantized(self.moments(z_BLD).chunk(2, dim=-1)[0], None)

    def embed(self, codes_BL: Tensor) -> Tensor:
        raise UserError(NO_CODES)


def build_quantizer(config: LatentModelConfig) -> Quantizer:
    """The quantizer of a config."""
    width = len(config.levels) if config.quantizer == "fsq" else config.quant_dim
    standardize = Standardize(config.latent_length, width) if config.standardize_z else None
    if config.quantizer == "nsvq":
        return NSVQ(config.quant_dim, config.codebook_size, standardize)
    if config.quantizer == "vq":
        return MovingAverages(
            config.quant_dim, config.codebook_size, standardize, commitment_weight=config.commitment_weight
        )
    if config.quantizer == "fsq":
        return FiniteScalar(config.quant_dim, config.levels, standardize)
    return Continuous(config.quant_dim, standardize, kl_weight=config.kl_weight)


def _norm(x: Tensor) -> Tensor:
    """Length of the last axis, with a finite gradient (zero) at zero."""
    return x.square().sum(-1, keepdim=True).clamp(min=NORM_FLOOR).sqrt()


def _distances(rows: Tensor, codebook_KD: Tensor) -> Tensor:
    return (rows[..., None, :] - codebook_KD).square().sum(-1)


def _nearest(rows: Tensor, codebook_KD: Tensor) -> Tensor:
    return _distances(rows, codebook_KD).argmin(-1)


def _jitter(rows_RD: Tensor, codebook_KD: Tensor) -> Tensor:
    return REPLACEMENT_NOISE * rows_RD.std(0, correction=0) * torch.randn_like(codebook_KD)
