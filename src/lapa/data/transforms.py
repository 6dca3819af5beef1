"""Image transforms between the file and the model: one chain for conversion, training and serving.

Axes: T time, H W image, C channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lapa.errors import UserError


def as_image(image: Any, name: str = "image") -> UInt8[np.ndarray, "H W 3"]:
    """Returns an RGB image as uint8 [H, W, 3].

    image: a PIL image of any mode, or an array or tensor [H, W, 3] or [3, H, W], uint8 or floats in [0, 1].
    Raises UserError, which begins with `name`, for anything else.
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    # torch.Tensor, without importing torch.
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    shape = array.shape
    if array.ndim == 3 and shape[0] == 3 and shape[2] != 3:
        array = np.moveaxis(array, 0, -1)
    known = array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)
    if not known or array.ndim != 3 or array.shape[-1] != 3 or 0 in shape:
        raise UserError(
            f"{name}: expected an RGB image, uint8 or floats in [0, 1], [H, W, 3] or [3, H, W]; "
            f"got {array.dtype} {list(shape)}"
        )
    if array.dtype == np.uint8:
        return array
    if not (array.min() >= 0 and array.max() <= 1):
        raise UserError(f"{name}: floats must lie in [0, 1], got {array.min():g} to {array.max():g}")
    return (array * 255).round().astype(np.uint8)


def resize_and_crop(frames_THWC: UInt8[np.ndarray, "T H W 3"], size: int) -> UInt8[np.ndarray, "T size size 3"]:
    """Scales the short side to `size` (bicubic, antialiased) and crops the centre square."""
    height, width = frames_THWC.shape[1:3]
    if (height, width) == (size, size):
        return frames_THWC
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    images = [
        Image.fromarray(frame_HWC).resize((size, size), Image.Resampling.BICUBIC, box) for frame_HWC in frames_THWC
    ]
    return np.stack([np.asarray(image) for image in images])


def augment(
    image_HWC: UInt8[np.ndarray, "H W 3"],
    rng: np.random.Generator,
    crop: float = 0.9,
    brightness: float = 0.2,
    contrast: float = 0.2,
    hue: float = 5.0,
    saturation: float = 20.0,
    value: float = 20.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a random crop of `crop` of the area, scaled back, and changed colours: LAPA's augmentation in finetuning.

    brightness, contrast: largest relative change; hue: degrees; saturation, value: steps out of 255.
    All randomness comes from `rng`.
    """
    height, width = image_HWC.shape[:2]
    keep = np.sqrt(crop)
    left, top = rng.uniform(0, width * (1 - keep)), rng.uniform(0, height * (1 - keep))
    cropped = Image.fromarray(image_HWC).resize(
        (width, height), Image.Resampling.BICUBIC, box=(left, top, left + width * keep, top + height * keep)
    )
    scale = rng.uniform(1 - contrast, 1 + contrast)
    shift = rng.uniform(-brightness, brightness) * 255
    image = np.asarray(cropped, dtype=np.float32)
    mean = image.mean()
    image_HWC = np.clip((image - mean) * scale + mean + shift, 0, 255).round().astype(np.uint8)
    shifts = rng.uniform(-1, 1, 3) * (hue / 360 * 256, saturation, value)
    hsv_HWC = (np.asarray(Image.fromarray(image_HWC).convert("HSV")) + shifts).round()
    hsv_HWC = np.concatenate([hsv_HWC[..., :1] % 256, np.clip(hsv_HWC[..., 1:], 0, 255)], axis=-1)
    return np.asarray(Image.fromarray(hsv_HWC.astype(np.uint8), mode="HSV").convert("RGB"))
