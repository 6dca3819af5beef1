"""What the codes of a latent action model do to an image: a grid, and a short video of codes one after the other.

lapa latent show LAM --image PICTURE --rollout 3,1,4,1 2,2,2,2

Axes: C channel, H W image, S steps, L latent action length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from einops import rearrange
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lapa.console import finish
from lapa.data.transforms import resize_and_crop
from lapa.data.video import encode_clip
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output
from lapa.latent.figures import device_of
from lapa.latent.model import LatentActionModel
from lapa.latent.pictures import decode_each, sheet


@dataclass(frozen=True)
class ShowConfig:
    """Draw what each code does to an image."""

    lam: tyro.conf.Positional[Path]
    """Folder of the latent action model, or its id on the hub."""
    image: Path
    """Picture to start from; its short side is scaled to the model's size, the centre cropped."""
    out: Path | None = None
    """Folder of the results; by default LAM/show_IMAGE, or show_IMAGE for a model from the hub."""
    codes: str | None = None
    """Codes of the positions that are not changed, as 3,1,4,1; by default the middle of the codebook everywhere."""
    rollout: tuple[str, ...] = ()
    """Latent actions to apply one after the other, as 3,1,4,1 2,2,2,2 or in one as 3,1,4,1,2,2,2,2."""
    max_codes: int = 16
    """Codes shown of each position; of a larger codebook, this many at even distances."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace what `out` holds."""


def run(config: ShowConfig) -> None:
    """`lapa latent show`. Raises UserError on bad input."""
    model = LatentActionModel.from_pretrained(config.lam).to(pick_device(config.device)).eval()
    if not model.discrete:
        raise UserError(f"{config.lam}: has continuous latent actions and no codes; `lapa latent probe` draws those")
    if not model.predicts_pixels:
        raise UserError(f"{config.lam}: predicts features and no pixels; there is no picture to show")
    if config.max_codes < 1:
        raise UserError(f"max_codes is {config.max_codes}; it must be at least 1")
    length, num_codes = model.config.latent_length, model.config.codebook_size
    neutral = ",".join([str(num_codes // 2)] * length)
    base_L = parse_codes((config.codes or neutral,), length, num_codes)
    if len(base_L) != 1:
        raise UserError(f"--codes {config.codes} holds {len(base_L)} latent actions; give one, of {length} codes")
    steps_SL = parse_codes(config.rollout, length, num_codes)
    frame_CHW = read_image(config.image, model.config.image_size)
    out = config.out or (config.lam if config.lam.is_dir() else Path()) / f"show_{config.image.stem}"
    complete = (out / "codes.png").exists()
    claim_output(out, complete=complete, overwrite=config.overwrite, resumable=False, inputs=[config.lam, config.image])
    if len(steps_SL):
        frames_THWC = rearrange(roll_out(model, frame_CHW, steps_SL), "t c h w -> t h w c").numpy()
        encode_clip(out / "rollout.mp4", frames_THWC, fps=1 / model.horizon)
    with atomic_path(out / "codes.png") as path:
        each_code(model, frame_CHW, base_L[0], config.max_codes).save(path)
    finish("codes.png and rollout.mp4" if len(steps_SL) else "codes.png", out)


def each_code(
    model: LatentActionModel, frame_CHW: UInt8[Tensor, "C H W"], base_L: Int64[Tensor, "L"], max_codes: int
) -> Image.Image:
    """One row a position: the image, what the base codes make of it, and this position set to each code.

    The base's own code is framed in green.
    """
    num_codes = model.config.codebook_size
    shown = sorted({round(code) for code in np.linspace(0, num_codes - 1, min(max_codes, num_codes))})
    rows, marked = [], []
    for position, own in enumerate(base_L.tolist()):
        changed = base_L.repeat(1 + len(shown), 1)
        changed[1:, position] = torch.tensor(shown)
        rows.append(torch.cat([frame_CHW[None].float() / 255, decode_each(model, frame_CHW, changed)]))
        marked.append({2 + number for number, code in enumerate(shown) if code == own})
    return sheet(rows, ["image", "base", *map(str, shown)], marked)


@torch.no_grad()
def roll_out(
    model: LatentActionModel, frame_CHW: UInt8[Tensor, "C H W"], steps_SL: Int64[Tensor, "S L"]
) -> UInt8[Tensor, "T C H W"]:
    """The image and what each step makes of the picture before it, on the CPU: T is one more than the steps."""
    device = device_of(model)
    frames = [frame_CHW[None].to(device)]
    for codes_L in steps_SL.to(device):
        predicted = model.decode(frames[-1], codes_L[None])
        frames.append((predicted.float().clamp(0, 1) * 255).round().byte())
    return torch.cat(frames).cpu()


def parse_codes(texts: tuple[str, ...], length: int, num_codes: int) -> Int64[Tensor, "S L"]:
    """Latent actions from texts such as 3,1,4,1, each of one or more. UserError on a wrong number or range."""
    actions = []
    for text in texts:
        try:
            codes = [int(code) for code in text.split(",")]
        except ValueError:
            raise UserError(f"{text!r}: codes are whole numbers with commas between, such as 3,1,4,1") from None
        if len(codes) % length:
            raise UserError(f"{text}: {len(codes)} codes; a latent action of this model has {length}")
        if not 0 <= min(codes) <= max(codes) < num_codes:
            raise UserError(f"{text}: codes of this model lie in 0 to {num_codes - 1}")
        actions.append(torch.tensor(codes).reshape(-1, length))
    return torch.cat(actions) if actions else torch.zeros(0, length, dtype=torch.int64)


def read_image(path: Path, size: int) -> UInt8[Tensor, "C H W"]:
    """A picture file as the model sees it. UserError naming the file where there is none or it is no picture."""
    try:
        with Image.open(path) as picture:
            pixels_HWC = np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --image must name a picture") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: not a readable picture ({error}); give a PNG or JPEG file") from None
    pixels_HWC = resize_and_crop(pixels_HWC[None], size)[0]
    return torch.from_numpy(np.ascontiguousarray(rearrange(pixels_HWC, "h w c -> c h w")))
