"""Options of `lapa label`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lapa.ray_cluster import RayConfig


@dataclass(frozen=True)
class LabelConfig:
    """Label a dataset with a latent action model."""

    lam: Path
    """Folder of the latent action model, or its id on the hub."""
    data: str
    """Dataset to label: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`. The key
    horizon=SECONDS changes the horizon."""
    out: str | None = None
    """Folder of the labels, or its URL (s3://...); by default DATASET/labels/FINGERPRINT_OF_THE_LAM."""
    camera: str | None = None
    """Camera whose images are used; by default the dataset's first."""
    embeddings: bool = False
    """Also write the continuous latent actions, before quantisation."""
    lary: bool = False
    """Also write embeddings and actions as the files that LARYBench's code reads, into `out`/lary."""
    min_motion: float = 0.0
    """Leave out pairs of frames whose brightness, from 0 to 1, changes less than this (RMS). 0.01 is a start."""
    skip_bad: bool = False
    """Leave out, and count, episodes that cannot be read; otherwise the first of them stops the command."""
    batch_size: int = 128
    """Pairs encoded at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster on a GPU; a few codes differ from those of fp32."""
    decoders: int | None = None
    """Processes that decode, 0 for a thread; by default chosen by the number of cores and of frames."""
    shard_episodes: int = 64
    """Episodes of one parquet file: at most so many are lost when the run is killed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine, one process or those of torchrun; ray: the workers of a Ray cluster (lapa-vla[ray]),
    which must reach the model, the dataset and `out` under the same names."""
    ray: RayConfig = field(default_factory=RayConfig)
    overwrite: bool = False
    """Replace the contents of `out`."""
    resume: bool = False
    """Continue the run in `out`."""
