"""Images of latent actions: the effect of each code on an image, and the grids of `lapa latent probe`.

lapa latent show LAM --image IMAGE --rollout 3,1,4,1 2,2,2,2

Axes: B pairs, N cells, C channel, H W image, S steps, L latent action length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from lapa.console import finish
from lapa.data.transforms import read_image, resize_and_crop
from lapa.data.video import encode_clip
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output
from lapa.latent.config import ShowConfig
from lapa.latent.metrics import BATCH, Sample, device_of, other_episodes
from lapa.latent.model import LatentAction, LatentActionModel
from lapa.locks import locks_output

HEADER, GAP = 14, 2
MAX_CHANGES, MAX_CODES = 64, 16


@locks_output
def run(config: ShowConfig) -> None:
    """`lapa latent show`. Raises UserError on bad input."""
    model = LatentActionModel.from_pretrained(config.lam).to(pick_device(config.device)).eval()
    if not model.discrete:
        raise UserError(f"{config.lam}: a continuous model has no codes; `lapa latent probe` draws its latent actions")
    if not model.predicts_pixels:
        raise UserError(f"{config.lam}: predicts features, not pixels; give a model of --targets pixels or both")
    length, num_codes = model.config.latent_length, model.config.codebook_size
    neutral = ",".join([str(num_codes // 2)] * length)
    base_L = parse_codes((config.codes or neutral,), length, num_codes)
    if len(base_L) != 1:
        raise UserError(f"--codes {config.codes} holds {len(base_L)} latent actions; give one, of {length} codes")
    steps_SL = parse_codes(config.rollout, length, num_codes)
    frame_CHW = open_image(config.image, model.config.image_size)
    out = config.out or (config.lam if config.lam.is_dir() else Path()) / f"show_{config.image.stem}"
    complete = (out / "codes.png").exists()
    claim_output(out, complete=complete, overwrite=config.overwrite, resumable=False, inputs=[config.lam, config.image])
    if len(steps_SL):
        frames_THWC = rearrange(roll_out(model, frame_CHW, steps_SL), "t c h w -> t h w c").numpy()
        encode_clip(out / "rollout.mp4", frames_THWC, fps=1 / model.horizon)
    with atomic_path(out / "codes.png") as path:
        each_code(model, frame_CHW, base_L[0]).save(path)
    finish("codes.png and rollout.mp4" if len(steps_SL) else "codes.png", out)


def each_code(model: LatentActionModel, frame_CHW: UInt8[Tensor, "C H W"], base_L: Int64[Tensor, "L"]) -> Image.Image:
    """One row per position: the image, its prediction from the base codes, and from this position set to each code.

    The base's own code is framed in green. Of a larger codebook, 16 codes at even distances are shown.
    """
    num_codes = model.config.codebook_size
    shown = sorted({round(code) for code in np.linspace(0, num_codes - 1, min(MAX_CODES, num_codes))})
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
    """The image, then the prediction of each step from the image before it, on the CPU; T = S + 1."""
    device = device_of(model)
    frames = [frame_CHW[None].to(device)]
    for codes_L in steps_SL.to(device):
        predicted = model.decode(frames[-1], codes_L[None])
        frames.append((predicted.float().clamp(0, 1) * 255).round().byte())
    return torch.cat(frames).cpu()


def parse_codes(texts: tuple[str, ...], length: int, num_codes: int) -> Int64[Tensor, "S L"]:
    """Latent actions from texts such as 3,1,4,1, each holding one or more.

    Raises UserError on a wrong number or range.
    """
    actions = []
    for text in texts:
        try:
            codes = [int(code) for code in text.split(",")]
        except ValueError:
            raise UserError(f"{text!r}: codes must be whole numbers with commas, such as 3,1,4,1") from None
        if len(codes) % length:
            raise UserError(f"{text}: {len(codes)} codes; a latent action of this model has {length}")
        if not 0 <= min(codes) <= max(codes) < num_codes:
            raise UserError(f"{text}: codes of this model lie in 0 to {num_codes - 1}")
        actions.append(torch.tensor(codes).reshape(-1, length))
    return torch.cat(actions) if actions else torch.zeros(0, length, dtype=torch.int64)


def open_image(path: Path, size: int) -> UInt8[Tensor, "C H W"]:
    """An image file, resized as in training. Raises UserError naming the file if it is missing or no image."""
    pixels_HWC = resize_and_crop(read_image(path)[None], size)[0]
    return torch.from_numpy(np.ascontiguousarray(rearrange(pixels_HWC, "h w c -> c h w")))


def probe_sheet(model: LatentActionModel, sample: Sample, encoded: LatentAction, num_rows: int) -> Image.Image:
    """grid.png of `lapa latent probe`: changes of single codes; without codes, transfers; without pixels, frames."""
    if model.predicts_pixels and encoded.codes_BL is not None:
        return code_grid(model, sample.frames_BTCHW[:num_rows], encoded.codes_BL)
    return transfer_grid(model, sample, encoded, num_rows)


@torch.no_grad()
def code_grid(model: LatentActionModel, frames_BTCHW: Tensor, codes_NL: Tensor) -> Image.Image:
    """One row per pair: first frame, true second frame, reconstruction, and every change of a single code.

    Column l:k decodes the pair's own codes with position l set to k; the pair's own code is framed in green.
    codes_NL: codes of the sample, which begins with these pairs; of more than 64 changes, those most used in it are
    shown.
    """
    changes = _changes(codes_NL, model.config.codebook_size)
    rows, marked = [], []
    positions, codes = (torch.tensor(column) for column in zip(*changes, strict=True))
    for frames_TCHW, own_L in zip(frames_BTCHW, codes_NL, strict=False):
        shown = own_L.repeat(1 + len(changes), 1)
        shown[torch.arange(len(changes)) + 1, positions] = codes
        rows.append(torch.cat([_unit(frames_TCHW), decode_each(model, frames_TCHW[0], shown)]))
        marked.append({3 + number for number, (position, code) in enumerate(changes) if own_L[position] == code})
    titles = ["x_t", "x_t+h", "own codes", *(f"{position}:{code}" for position, code in changes)]
    return sheet(rows, titles, marked)


@torch.no_grad()
def transfer_grid(model: LatentActionModel, sample: Sample, encoded: LatentAction, num_rows: int) -> Image.Image:
    """One row per pair: both frames, reconstruction, another pair's action here, another scene, this action there.

    Only the two frames for a model that predicts no pixels.
    """
    num_rows = min(num_rows, len(sample.episodes_B))
    others = torch.from_numpy(other_episodes(sample.episodes_B))[:num_rows]
    pairs, device = sample.frames_BTCHW[:num_rows], device_of(model)
    columns, titles = [_unit(pairs[:, 0]), _unit(pairs[:, 1])], ["x_t", "x_t+h"]
    if model.predicts_pixels:
        first, scene = pairs[:, 0].to(device), sample.frames_BTCHW[others, 0].to(device)
        own, other = encoded.quantized_BLD[:num_rows].to(device), encoded.quantized_BLD[others].to(device)
        predictions = [
            model.predict(frame, action).cpu() for frame, action in ((first, own), (first, other), (scene, own))
        ]
        columns += [predictions[0], predictions[1], _unit(scene.cpu()), predictions[2]]
        titles += ["own", "shuffled", "scene", "transferred"]
    return sheet(list(torch.stack(columns, dim=1)), titles)


@torch.no_grad()
def decode_each(model: LatentActionModel, frame_CHW: Tensor, codes_NL: Tensor) -> Tensor:
    """The second frames [N, C, H, W] that these codes predict from one first frame, on the CPU."""
    frame = frame_CHW[None].to(device_of(model))
    parts = codes_NL.to(device_of(model)).split(BATCH)
    return torch.cat([model.decode(frame.expand(len(part), -1, -1, -1), part).float().cpu() for part in parts])


def sheet(rows: Sequence[Tensor], titles: Sequence[str], marked: Sequence[set[int]] = ()) -> Image.Image:
    """Rows of images [N, C, H, W] in [0, 1] (clamped) under their titles; the marked columns of a row in green."""
    height, width = rows[0].shape[-2:]
    canvas = Image.new("RGB", (len(titles) * (width + GAP), HEADER + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((column * (width + GAP) + 2, 1), title, fill="black")
    for row, cells in enumerate(rows):
        top = HEADER + row * (height + GAP)
        pixels = (rearrange(cells.float().clamp(0, 1), "n c h w -> n h w c") * 255).round().byte().numpy()
        for column, cell in enumerate(pixels):
            canvas.paste(Image.fromarray(cell), (column * (width + GAP), top))
        for column in marked[row] if marked else ():
            left = column * (width + GAP)
            draw.rectangle((left, top, left + width - 1, top + height - 1), outline="lime")
    return canvas


def _changes(codes_NL: Tensor, codebook_size: int) -> list[tuple[int, int]]:
    """(position, code) of at most MAX_CHANGES changes: of the first positions, the codes used most."""
    length = min(codes_NL.shape[1], MAX_CHANGES)
    each = min(codebook_size, MAX_CHANGES // length)
    chosen = []
    for position in range(length):
        counts = torch.bincount(codes_NL[:, position], minlength=codebook_size)
        most_used = counts.argsort(descending=True, stable=True)[:each].sort().values
        chosen += [(position, code) for code in most_used.tolist()]
    return chosen


def _unit(frames: Tensor) -> Tensor:
    return frames.float() / 255
