"""Images from the file to the model: decoded in one place, and one chain for conversion, training and serving.

Axes: T time, H W image, C channel.
"""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from lapa.errors import StoreError, UserError
from lapa.files import is_remote, open_binary, reading

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# Pixels of an image: half a megabyte of PNG can be 13,000 pixels square, which takes a gigabyte of memory.
MAX_PIXELS = 64_000_000
TOO_LARGE = f"more than {MAX_PIXELS // 1_000_000} megapixels"
# Bits that sensors' values have in images of 16 bits.
DEPTHS = (8, 10, 12, 14, 16)
# Pillow raises SyntaxError for a broken PNG, and these others for damaged headers and metadata.
UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError),
)
# Of metadata that are damaged, and of sizes that are refused.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: Path, where_else: str = "") -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image file as `decode_image` does.

    Raises UserError naming the file where it cannot be decoded, or is not there: that one ends with `where_else`.
    """
    # A pipe would keep the command waiting forever.
    if not is_remote(path) and path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file; give an image, or remove it")
    with reading(path, where_else), open_binary(path) as file:
        return decode_image(file, f"{path}: cannot be decoded", "; replace it or remove it")


def has_16_bits(path: Path) -> bool:
    """Returns whether an image file has one channel of 16 bits, as depth and heat have, by its header alone."""
    with suppress(*UNDECODABLE), open_binary(path) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
        return image.mode.startswith("I")
    return False


def decode_image(encoded: bytes | BinaryIO, failure: str, remedy: str = "") -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image of one of `IMAGE_FORMATS` as RGB, upright where its EXIF data turn it; of several the first.

    Transparency is ignored. Of 16 bits in one channel, the 8 highest that its values reach are taken (`DEPTHS`).
    Raises UserError with `failure`, the reason and `remedy` where it is none, damaged, or above `MAX_PIXELS`.
    """
    try:
        # A text would be taken for a path.
        file = cast(BinaryIO, encoded) if hasattr(encoded, "read") else io.BytesIO(encoded)
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return _rgb(image)
    except UnidentifiedImageError:
        problem = "empty, zero bytes" if file.seek(0, io.SEEK_END) == 0 else f"no image in {', '.join(IMAGE_FORMATS)}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        problem = TOO_LARGE
    except StoreError:
        raise
    except UNDECODABLE as error:
        problem = str(error)
    raise UserError(f"{failure} ({problem}){remedy}")


def as_image(image: Any, name: str = "image") -> UInt8[np.ndarray, "H W 3"]:
    """Returns an RGB image as uint8 [H, W, 3].

    image: a PIL image of any mode, as `decode_image` takes it, or an array or tensor [H, W, 3] or [3, H, W], uint8 or
        floats in [0, 1].
    Raises UserError, which begins with `name`, for anything else.
    """
    if isinstance(image, Image.Image):
        try:
            return _rgb(image)
        except UNDECODABLE as error:
            raise UserError(f"{name}: cannot be decoded ({error})") from None
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


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image of any mode as RGB, upright. Raises one of `UNDECODABLE`."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height}, {TOO_LARGE}")
    image.load()
    # Damaged metadata do not turn an image.
    with suppress(*UNDECODABLE):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return np.repeat(_eight_bits(np.asarray(image))[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"))


def _eight_bits(values_HW: np.ndarray) -> UInt8[np.ndarray, "H W"]:
    """Returns whole numbers of up to 16 bits, or floats in [0, 1], as 8 bits. Raises ValueError for other values."""
    low, high = values_HW.min(), values_HW.max()
    top = 1.0
    if values_HW.dtype.kind != "f":
        top = next((2.0**bits - 1 for bits in DEPTHS if high < 2**bits), 0.0)
    if not 0 <= low <= high <= top:
        raise ValueError(f"one channel of values from {low:g} to {high:g}, expected up to 16 bits")
    return (values_HW * (255 / top)).round().astype(np.uint8)


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


def to_page(image_HWC: np.ndarray, *, exact: bool = True) -> str:
    """Returns an image as a data URL. exact: as PNG, which the page may send back; else as a smaller WebP."""
    file = io.BytesIO()
    image = Image.fromarray(image_HWC)
    if exact:
        image.save(file, "PNG", compress_level=3)
    else:
        image.save(file, "WEBP", quality=85)
    kind = "png" if exact else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def at_most(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """Returns an image whose longer side has at most this many pixels."""
    height, width = image_HWC.shape[:2]
    if max(height, width) <= side:
        return image_HWC
    size = tuple(max(1, round(each * side / max(height, width))) for each in (width, height))
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))


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
