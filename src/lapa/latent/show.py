"""Images of latent actions: the effect of each code on an image, and the grids of `lapa latent probe`.

lapa latent show LAM --image IMAGE --rollout 3,1,4,1 2,2,2,2

Axes: B pairs, D drawn pairs, N images, C channel, H W image, S steps, T frames of a rollout, L latent action length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from lapa.console import finish
from lapa.data.transforms import read_image, resize_and_crop
from lapa.data.video import encode_clip
from lapa.drawing import Row, captioned, grid, heat_map, largest, save_animation
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output
from lapa.latent.config import ShowConfig
from lapa.latent.metrics import BATCH, Sample, device_of, other_episodes
from lapa.latent.model import LatentAction, LatentActionModel
from lapa.locks import locks_output

PAIRS = 6  # rows of grid.png
# At most so many codes and positions are shown, and images in a row of a rollout.
MAX_CODES, MAX_POSITIONS, ACROSS = 8, 8, 6
# How often codes.webp applies each code, and for how long it shows each step; the width of rollout.mp4.
STEPS, STEP_SECONDS, VIDEO_WIDTH = 4, 0.7, 256


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
    files = "codes.png and codes.webp"
    if len(steps_SL):
        save_rollout(out, pixels(roll_out(model, frame_CHW, steps_SL) / 255), steps_SL, model.horizon)
        files = "codes.png, codes.webp, rollout.png and rollout.mp4"
    each = EachCode(model, frame_CHW, base_L[0])
    save_animation(out / "codes.webp", each.animation(), STEP_SECONDS)
    with atomic_path(out / "codes.png") as path:
        each.still().save(path)
    finish(files, out)


class EachCode:
    """What each code does to an image: one row for each position, the other positions keeping the base's codes.

    The base's own code is framed in green. Of a longer action the first 8 positions are shown, of a larger codebook 8
    codes at even distances.
    """

    def __init__(self, model: LatentActionModel, frame_CHW: UInt8[Tensor, "C H W"], base_L: Int64[Tensor, "L"]):
        num_codes = model.config.codebook_size
        self.model, self.frame_CHW, self.base_L = model, frame_CHW, base_L
        self.codes = sorted({round(code) for code in np.linspace(0, num_codes - 1, min(MAX_CODES, num_codes))})
        self.positions = range(min(len(base_L), MAX_POSITIONS))
        self.actions_NL = base_L.repeat(len(self.positions) * len(self.codes), 1)
        for number, position in enumerate(self.positions):
            first = number * len(self.codes)
            self.actions_NL[first : first + len(self.codes), position] = torch.tensor(self.codes)

    def still(self) -> Image.Image:
        """Draws the predictions, and below each its difference from the base's."""
        frame_1HWC = pixels(self.frame_CHW[None] / 255)
        base_1HWC, images_NHWC = (
            pixels(decode_each(self.model, self.frame_CHW[None], actions_NL))
            for actions_NL in (self.base_L[None], self.actions_NL)
        )
        change_1HW, changes_NHW = difference(frame_1HWC, base_1HWC), difference(images_NHWC, base_1HWC)
        most = largest(np.concatenate([change_1HW, changes_NHW]))
        captions = ["image", f"predicted with {written(self.base_L)}", "difference of these two"]
        rows = [Row("", [frame_1HWC[0], base_1HWC[0], heat_map(change_1HW[0], most)], captions)]
        for row, changes in zip(self._rows(images_NHWC), self._split(changes_NHW), strict=True):
            rows += [row, Row("", [heat_map(change_HW, most) for change_HW in changes])]
        note = (
            f"Predicted {self.model.horizon:.3g} s ahead, one code of {written(self.base_L)} replaced; below each, its "
            "difference from the prediction with these codes, which are framed in green."
        )
        return grid(rows, "What each code does to the image", note, heat=most)

    def animation(self) -> list[Image.Image]:
        """Draws the predictions of 0 to 4 steps, each from the one before by the same code."""
        frames_NCHW, images = self.frame_CHW.repeat(len(self.actions_NL), 1, 1, 1), []
        for step in range(STEPS + 1):
            after = f"{step} of {STEPS} steps, {step * self.model.horizon:.3g} s"
            images.append(grid(self._rows(pixels(frames_NCHW / 255)), f"Each code again and again: {after}"))
            frames_NCHW = in_bytes(decode_each(self.model, frames_NCHW, self.actions_NL))
        return images

    def _rows(self, images_NHWC: np.ndarray) -> list[Row]:
        others = written(self.base_L)
        rows = []
        for position, images in zip(self.positions, self._split(images_NHWC), strict=True):
            title = f"Position {position + 1} of {len(self.base_L)}, the others as in {others}"
            own = {number for number, code in enumerate(self.codes) if code == self.base_L[position]}
            rows.append(Row(title, list(images), [f"code {code}" for code in self.codes], frozenset(own)))
        return rows

    def _split(self, values_N: np.ndarray) -> list[np.ndarray]:
        return np.split(values_N, len(self.positions))


def save_rollout(out: Path, frames_THWC: np.ndarray, steps_SL: Int64[Tensor, "S L"], horizon: float) -> None:
    """Writes rollout.mp4 and rollout.png, with the codes and the time of each step."""
    texts = ["start", *map(written, steps_SL)]
    times = [f"step {step} of {len(steps_SL)}, {step * horizon:.3g} s" for step in range(len(texts))]
    framed = [
        captioned(frame_HWC, [time, text], width=VIDEO_WIDTH)
        for frame_HWC, time, text in zip(frames_THWC, times, texts, strict=True)
    ]
    encode_clip(out / "rollout.mp4", framed, fps=1 / horizon)
    captions = [f"{time.partition(', ')[2]}: {text}" for time, text in zip(times, texts, strict=True)]
    rows = [
        Row("", list(frames_THWC[first : first + ACROSS]), captions[first : first + ACROSS])
        for first in range(0, len(texts), ACROSS)
    ]
    with atomic_path(out / "rollout.png") as path:
        grid(rows, "Codes one after the other").save(path)


@torch.no_grad()
def roll_out(
    model: LatentActionModel, frame_CHW: UInt8[Tensor, "C H W"], steps_SL: Int64[Tensor, "S L"]
) -> UInt8[Tensor, "T C H W"]:
    """The image, then the prediction of each step from the image before it, on the CPU; T = S + 1."""
    device = device_of(model)
    frames = [frame_CHW[None].to(device)]
    for codes_L in steps_SL.to(device):
        frames.append(in_bytes(model.decode(frames[-1], codes_L[None])))
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


@torch.no_grad()
def probe_sheet(model: LatentActionModel, sample: Sample, encoded: LatentAction, horizon: float | None) -> Image.Image:
    """grid.png of `lapa latent probe`: one row for each pair, with predictions by its own and another pair's action.

    The pairs are at even distances among the half of the sample in which more changes. Without predictions for a model
    that predicts no pixels. horizon: seconds between the frames of a pair, None where pairs differ in it.
    """
    change_B = (sample.frames_BTCHW[:, 1].float() - sample.frames_BTCHW[:, 0]).abs().mean((1, 2, 3))
    order = change_B.argsort(stable=True)
    drawn = order[np.unique(np.linspace(len(order) // 2, len(order) - 1, PAIRS).round().astype(int))]
    others = torch.from_numpy(other_episodes(sample.episodes_B))[drawn]
    first_DCHW, second_DCHW = sample.frames_BTCHW[drawn].unbind(1)
    first, second = pixels(first_DCHW / 255), pixels(second_DCHW / 255)
    columns = [first, second, difference(first, second)]
    captions = ["frame", "second frame" if horizon is None else f"frame after {horizon:.3g} s", "their difference"]
    if model.predicts_pixels:
        device = device_of(model)
        for indices, whose in ((drawn, "predicted"), (others, "predicted with another pair's codes")):
            predicted_DCHW = model.predict(first_DCHW.to(device), encoded.quantized_BLD[indices].to(device))
            columns += [predicted := pixels(predicted_DCHW), difference(first, predicted)]
            captions += [whose, "its difference from the frame"]
    most = largest(np.stack([column for column in columns if column.ndim == 3]))
    rows = []
    for row, (pair, other) in enumerate(zip(drawn, others, strict=True)):
        codes_BL = encoded.codes_BL
        codes = (
            "" if codes_BL is None else f"codes {written(codes_BL[pair])}, another pair's {written(codes_BL[other])}"
        )
        cells = [column[row] if column.ndim == 4 else heat_map(column[row], most) for column in columns]
        rows.append(Row(codes, cells, captions if row == 0 else ()))
    note = "Pairs of the dataset, from the one in the middle to the one in which most changes."
    return grid(rows, "Does the latent action carry the change?", note, heat=most)


@torch.no_grad()
def decode_each(model: LatentActionModel, frames_NCHW: Tensor, codes_NL: Tensor) -> Tensor:
    """The second frames [N, C, H, W] that these codes predict from first frames, one for all or N, on the CPU."""
    device = device_of(model)
    frames_NCHW = frames_NCHW.expand(len(codes_NL), -1, -1, -1)
    parts = zip(frames_NCHW.split(BATCH), codes_NL.split(BATCH), strict=True)
    return torch.cat([model.decode(frames.to(device), codes.to(device)).float().cpu() for frames, codes in parts])


def in_bytes(frames_NCHW: Tensor) -> Tensor:
    """Frames in [0, 1], clamped, as uint8."""
    return (frames_NCHW.float().clamp(0, 1) * 255).round().byte()


def pixels(frames_NCHW: Tensor) -> UInt8[np.ndarray, "N H W C"]:
    """Frames in [0, 1], clamped, as images."""
    return rearrange(in_bytes(frames_NCHW), "n c h w -> n h w c").cpu().numpy()


def difference(one_NHWC: np.ndarray, other_NHWC: np.ndarray) -> np.ndarray:
    """The largest difference of the three channels at each place, as a share of full brightness: [N, H, W]."""
    return np.abs(one_NHWC.astype(np.float32) - other_NHWC.astype(np.float32)).max(-1) / 255


def written(codes_L: Tensor) -> str:
    """Codes as `parse_codes` reads them."""
    return ",".join(map(str, codes_L.tolist()))
