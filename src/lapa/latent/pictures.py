"""Picture sheets of latent actions: what each pair, each code and each transfer looks like.

`lapa latent probe` and `lapa latent show` draw them. Axes: B pairs, N cells, C channel, H W image, L latent length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from lapa.latent.figures import BATCH, Sample, device_of, other_episodes
from lapa.latent.model import LatentAction, LatentActionModel

HEADER, GAP = 14, 2
MAX_CHANGES = 64


def probe_sheet(model: LatentActionModel, sample: Sample, encoded: LatentAction, num_rows: int) -> Image.Image:
    """The sheet of `lapa latent probe`: code changes for a model with codes, else transfers, or frames alone."""
    if model.predicts_pixels and encoded.codes_BL is not None:
        return code_grid(model, sample.frames_BTCHW[:num_rows], encoded.codes_BL)
    return transfer_grid(model, sample, encoded, num_rows)


@torch.no_grad()
def code_grid(model: LatentActionModel, frames_BTCHW: Tensor, codes_NL: Tensor) -> Image.Image:
    """One row a pair: first frame, true second frame, reconstruction, and every single-code change.

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
    """One row a pair: both frames, reconstruction, another pair's action here, another scene, this action there.

    A model that predicts no pixels has the two frames only.
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
    """Rows of pictures [N, C, H, W] in [0, 1] (clamped) under their titles; the marked columns of a row in green."""
    height, width = rows[0].shape[-2:]
    picture = Image.new("RGB", (len(titles) * (width + GAP), HEADER + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((column * (width + GAP) + 2, 1), title, fill="black")
    for row, cells in enumerate(rows):
        top = HEADER + row * (height + GAP)
        pixels = (rearrange(cells.float().clamp(0, 1), "n c h w -> n h w c") * 255).round().byte().numpy()
        for column, cell in enumerate(pixels):
            picture.paste(Image.fromarray(cell), (column * (width + GAP), top))
        for column in marked[row] if marked else ():
            left = column * (width + GAP)
            draw.rectangle((left, top, left + width - 1, top + height - 1), outline="lime")
    return picture


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
