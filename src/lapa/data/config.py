"""Options of the converter, of mixtures of datasets, and of `lapa data info`, `check`, `merge` and `hide-actions`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lapa.config import ReportOptions
from lapa.data.source import Reading
from lapa.ray_cluster import RayConfig

# What the datasets' shares of the draws are in proportion to, apart from their weights (lapa.data.sampling).
MixBy = Literal["frames", "episodes", "equal"]
# Of the values of a code, and of the codes of a latent action.
LARGEST_CODE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Reading):
    """Options of every `lapa data SOURCE`; a command's config adds the source's reading options."""

    out: str
    """Folder of the dataset to write, or its URL on a store (s3://bucket/dataset)."""
    camera: tuple[str, ...] = ()
    """Cameras to keep; by default all."""
    actions: bool = True
    """Store actions and robot states; --no-actions leaves video and instruction only."""
    size: int = 256
    """Height and width of the images, even: the short side is scaled to it, the centre cropped."""
    rate: float | None = None
    """Frames a second of the dataset, to take fewer than the source has; by default the source's."""
    cut_shots: bool = False
    """Cut videos where one shot ends and the next begins (hard cuts, as in web video); each shot is an episode."""
    min_seconds: float = 0.0
    """Leave out episodes shorter than this."""
    min_side: int = 0
    """Leave out items with a camera whose images have fewer pixels than this on their shorter side."""
    min_motion: float = 0.0
    """Leave out episodes without motion: whose brightness, from 0 to 1, changes less than this (RMS) between any two
    frames half a second apart, in all cameras. 0.01 is a start: real robot clips reached 0.06 to 0.21, a still image
    with a sensor's noise 0.004."""
    max_frozen: float = 1.0
    """Leave out episodes of which more than this share of the frames, in all cameras, only repeat the frame before, as
    title cards and stalled streams do; 0.5 is a start for web video."""
    max_text: float = 1.0
    """Leave out episodes of which more than this share of the frames, in all cameras, are mostly of one flat colour, as
    title cards, end cards and slides are; 0.5 is a start for web video. Not for rendered scenes on a plain ground."""
    max_camera_motion: float = 1.0
    """Leave out episodes in which the camera's own motion explains more than this share of the change from frame to
    frame, in all cameras: one shift of the whole image, not zoom or rotation; 0.8 is a start for web video."""
    drop_duplicates: bool = False
    """Leave out episodes that look like an earlier one of the dataset: of about the same length, with almost the same
    images, whatever their size and compression; the first is kept."""
    crop_bars: bool = False
    """Crop black bars, on two opposite sides, before images are scaled; each item is decoded twice."""
    limit: int | None = None
    """Number of items to read (files, records); by default all."""
    # Each source says what it leaves out.
    skip_bad: bool = False
    workers: int = 0
    """Processes that convert; 0: one for each CPU core."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine; ray: the workers of a Ray cluster (lapa-vla[ray]), which must reach the source and `out`, a
    store or a folder on a disk that they share, under the same names."""
    ray: RayConfig = field(default_factory=RayConfig)
    overwrite: bool = False
    """Replace the contents of `out`."""
    resume: bool = False
    """Continue an interrupted run."""


@dataclass(frozen=True)
class InfoConfig(ReportOptions):
    """Show the content of a dataset, and draw a contact sheet of it."""

    data: Annotated[str, tyro.conf.Positional]
    """The dataset: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`."""
    sheet: Path | None = None
    """PNG to draw the contact sheet to; by default contact_sheet.png in the dataset's folder, or, for a source in place
    and for a remote dataset, NAME_contact_sheet.png here."""


@dataclass(frozen=True)
class CheckConfig(ReportOptions):
    """Read every file of a dataset and name the damaged ones; the exit status is 2 where there is one."""

    data: Annotated[str, tyro.conf.Positional]
    """The dataset: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`."""


@dataclass(frozen=True)
class HideActionsConfig:
    """Write a dataset of the same videos without actions and states."""

    data: Annotated[str, tyro.conf.Positional]
    """The dataset's folder."""
    out: Path
    """Folder of the dataset to write."""
    overwrite: bool = False
    """Replace the contents of `out`."""
    resume: bool = False
    """Accept `out` where it is finished; else begin it again."""


@dataclass(frozen=True)
class MergeConfig:
    """Merge datasets of the same cameras, rate and features into one, without touching the videos."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The datasets' folders, or their URLs on stores, in the order of their episodes."""
    out: str
    """Folder of the dataset to write, or its URL on a store; on that of the datasets, videos are copied inside it."""
    overwrite: bool = False
    """Replace the contents of `out`."""
    resume: bool = False
    """Accept `out` where it is finished; else begin it again."""
