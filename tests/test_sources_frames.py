"""`lapa data frames`: folders of numbered images, gaps, what is damaged, and the same in place."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lapa.data import transforms
from lapa.data.convert import run
from lapa.data.dataset import Dataset
from lapa.data.spec import open_dataset
from lapa.data.transforms import as_image, decode_image, read_image
from lapa.errors import UserError
from lapa.sources.frames import FramesConfig
from test_convert import listed

# What Pillow warns of in damaged metadata and in sizes.
pytestmark = pytest.mark.filterwarnings("ignore:.*(EXIF|Tag data|Image size)")


def write_images(folder: Path, numbers: list[int], size: tuple[int, int] = (32, 48), name: str = "{:04d}.png") -> None:
    """Images as bright as 20 plus 5 times their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        frame_HWC = np.full((*size, 3), 20 + 5 * number, np.uint8)
        frame_HWC[::2] += 10
        frame_HWC[1::2] -= 10
        Image.fromarray(frame_HWC).save(folder / name.format(number))


def convert(folder: Path, **settings) -> Dataset:
    out = settings.pop("out", folder.parent / "dataset")
    run(FramesConfig(str(folder), out=out, **{"size": 32, "workers": 1, "caption": "wait", **settings}))
    return open_dataset(out)


def shown(dataset: Dataset, episode: int) -> list[int]:
    """The numbers of an episode's images."""
    return np.round((dataset.frames(episode).mean(axis=(1, 2, 3)) - 20) / 5).astype(int).tolist()


def test_folders_become_episodes_in_natural_order(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    write_images(folder / "78687", list(range(1, 12)), name="img_{}.jpg")
    write_images(folder / "9" / "inner", list(range(3)))
    write_images(folder / "10", list(range(4)))
    (folder / "10" / "notes.txt").write_text("nothing")
    dataset = convert(folder)
    assert [(e.source, e.length) for e in dataset.episodes] == [("9/inner", 3), ("10", 4), ("78687", 11)]
    assert shown(dataset, 2) == list(range(1, 12))
    assert dataset.fps == 12.0


def test_in_place_equals_the_converted_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    for clip, size in (("a", (32, 48)), ("b b ü", (64, 40))):
        write_images(folder / clip, list(range(6)), size)
    (tmp_path / "c.json").write_text(json.dumps({"a": "push", "b b ü": "pull"}))
    there = convert(folder, captions=str(tmp_path / "c.json"), caption=None, fps=5)
    here = open_dataset(f"frames:{folder},captions={tmp_path / 'c.json'},fps=5")
    assert (here.fps, there.fps) == (5.0, 5.0)
    assert [(e.source, e.length, e.instruction) for e in here.episodes] == [
        (e.source, e.length, e.instruction) for e in there.episodes
    ]
    for episode in range(2):
        assert shown(here, episode) == shown(there, episode) == list(range(6))
    assert (here.frames(1, [4, 0, 4]) == here.frames(1)[[4, 0, 4]]).all()
    assert here.frames(1).shape == (6, 64, 40, 3)


def test_gaps_are_reported_and_cut(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "frames"
    write_images(folder / "whole", [1, 2, 3, 4])
    write_images(folder / "holes", [1, 2, 3, 6, 7, 20])
    dataset = convert(folder)
    assert [e.source for e in dataset.episodes] == ["holes#1-3", "holes#6-7", "holes#20-20", "whole"]
    assert [shown(dataset, episode) for episode in range(3)] == [[1, 2, 3], [6, 7], [20]]
    assert "clips with gaps in their numbers, cut there: 1; missing images: 14" in capsys.readouterr().err
    assert listed(dataset) == {"clips with gaps in their numbers, cut there": 1, "images missing in these": 14}
    here = open_dataset(f"frames:{folder},caption=wait")
    assert [shown(here, episode) for episode in range(3)] == [[1, 2, 3], [6, 7], [20]]


def test_every_fifth_number_is_no_gap(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "frames" / "a", [0, 5, 10, 15, 25, 30])
    assert [e.length for e in convert(tmp_path / "frames").episodes] == [4, 2]
    assert "cut there: 1; missing images: 1" in capsys.readouterr().err


def test_a_damaged_image_in_the_middle_is_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "frames"
    write_images(folder / "a", list(range(8)), name="{:04d}.jpg")
    path = folder / "a" / "0003.jpg"
    path.write_bytes(path.read_bytes()[:200])
    (folder / "a" / "0005.jpg").write_bytes(b"")
    dataset = convert(folder)
    # A neighbour stands in for each, so that the others keep their time.
    assert [number for number in shown(dataset, 0) if number not in (2, 4, 6)] == [0, 1, 7]
    assert len(dataset.frames(0)) == 8
    printed = capsys.readouterr().err
    assert "0003.jpg: cannot be decoded" in printed
    assert "8 frames kept, 2 lost" in printed
    here = open_dataset(f"frames:{folder},caption=wait")
    assert len(here.frames(0, [0, 1, 7])) == 3
    with pytest.raises(ValueError, match=r"0005\.jpg: cannot be decoded \(empty, zero bytes\); replace it"):
        here.frames(0, [5])


def test_a_clip_without_a_sound_image(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    write_images(folder / "b", [1, 2])
    (folder / "a").mkdir()
    (folder / "a" / "1.jpg").write_text("not a image")
    with pytest.raises(ValueError, match=r"a: none of its frames can be decoded.*--skip-bad"):
        convert(folder)
    assert len(convert(folder, skip_bad=True, overwrite=True).lengths) == 1


def test_mixed_sizes_within_a_clip(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    write_images(folder / "a", [0, 1])
    write_images(folder / "a", [2], (48, 32))
    assert shown(convert(folder), 0) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"0002\.png: is of another size than 0000\.png"):
        open_dataset(f"frames:{folder},caption=wait").frames(0)


def test_numbers_that_are_no_order(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    write_images(folder / "good", [0, 1])
    write_images(folder / "two", [0, 1], name="left_{}.png")
    write_images(folder / "two", [0, 1], name="right_{}.png")
    with pytest.raises(ValueError, match=r"two: has two images of number 0; give each clip a folder of its own"):
        convert(folder)
    assert [e.source for e in convert(folder, skip_bad=True).episodes] == ["good"]


def test_what_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no folder of it holds numbered images"):
        convert(tmp_path / "empty")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.zip: is an archive; unpack it first"):
        convert(tmp_path / "a.zip")
    write_images(tmp_path / "frames" / "a", [0, 1])
    with pytest.raises(ValueError, match="no captions; give --captions"):
        convert(tmp_path / "frames", caption=None)
    with pytest.raises(ValueError, match=r"--fps nan"):
        convert(tmp_path / "frames", fps=float("nan"))


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    write_images(tmp_path / "frames" / "a", [0, 1])
    (tmp_path / "frames" / "a" / "again").symlink_to(tmp_path / "frames")
    assert [e.source for e in convert(tmp_path / "frames").episodes] == ["a"]


def test_images_that_went_missing_after_opening_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "frames" / "a", [0, 1, 2])
    here = open_dataset(f"frames:{tmp_path / 'frames'},caption=wait")
    (tmp_path / "frames" / "a" / "0002.png").unlink()
    with pytest.raises(ValueError, match=r"a: holds 2 images, 3 when"):
        here.frames(0)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def corners() -> np.ndarray:
    """An image that differs from each of its turns and reflections."""
    image_HWC = np.full((16, 24, 3), 40, np.uint8)
    image_HWC[:8, :8], image_HWC[:8, 16:], image_HWC[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    return image_HWC


# How a camera that is held as EXIF's orientation tells stores an upright image.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_stand_upright_wherever_they_are_opened(tmp_path: Path, orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](corners())))
    content = encoded(stored, form, exif=exif, quality=100)
    (tmp_path / "image").write_bytes(content)
    for image in (
        decode_image(content, "image"),
        read_image(tmp_path / "image"),
        as_image(Image.open(tmp_path / "image")),
    ):
        assert image.shape == (16, 24, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - corners()).mean() < 12


def test_damaged_exif_data_turn_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(corners()), "JPEG", exif=exif)
    place = content.index(b"Exif")
    for damage in (b"\xff" * 8, b"MM\x00\x2a\xff\xff\xff\xff"):
        assert decode_image(content[: place + 6] + damage + content[place + 14 :], "image").shape == (16, 24, 3)


@pytest.mark.parametrize("top", [255, 1023, 1500, 4095, 16_383, 40_000, 65_535])
def test_grey_images_of_16_bits_keep_their_content(top: int) -> None:
    values = np.linspace(0, top, 24 * 16).round().astype(np.uint16).reshape(16, 24)
    bits = next(bits for bits in (8, 10, 12, 14, 16) if top < 2**bits)
    wanted = values / (2.0**bits - 1) * 255
    image = Image.fromarray(values)
    for found in (decode_image(encoded(image), "image"), as_image(image), as_image(image.convert("I"))):
        assert found.shape == (16, 24, 3) and np.abs(found - wanted[..., None]).max() <= 0.5
        assert found.max() > 60


def test_grey_images_of_16_bits_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "frames" / "a").mkdir(parents=True)
    for number in range(3):
        values = np.linspace(700, 1700 + number, 32 * 32).astype(np.uint16).reshape(32, 32)
        Image.fromarray(values).save(tmp_path / "frames" / "a" / f"{number}.png")
    frames = convert(tmp_path / "frames").frames(0)
    assert "0.png: is grey of 16 bits, such as depth" in capsys.readouterr().err
    assert frames.min() > 35 and 95 < frames.max() < 120
    write_images(tmp_path / "colours" / "a", [1])
    convert(tmp_path / "colours", out=tmp_path / "other")
    assert "16 bits" not in capsys.readouterr().err


def test_images_of_every_mode_become_rgb() -> None:
    colours = Image.fromarray(corners())
    for mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa"):
        image = Image.new("RGBa", (24, 16)) if mode == "RGBa" else colours.convert("RGB" if mode == "LAB" else mode)
        assert as_image(image).shape == (16, 24, 3)
    for mode in ("1", "L", "LA", "F"):
        image = (
            colours.convert("L").convert(mode) if mode != "F" else Image.fromarray(np.full((16, 24), 0.5, np.float32))
        )
        found = as_image(image)
        assert found.shape == (16, 24, 3) and (found == found[..., :1]).all()
    for values in (np.full((4, 4), -1, np.int32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), 2, np.float32)):
        with pytest.raises(UserError, match=r"front: cannot be decoded \(one channel of values from"):
            as_image(Image.fromarray(values), "front")
    # Transparency is ignored: the colours below it are shown.
    see_through = np.dstack([corners(), np.zeros((16, 24), np.uint8)])
    assert (decode_image(encoded(Image.fromarray(see_through)), "image") == corners()).all()
    moving = encoded(colours, save_all=True, append_images=[colours.rotate(180)])
    assert (decode_image(moving, "image") == corners()).all()


def png_of_zeros(width: int, height: int) -> bytes:
    """A small file of a large black image, written without the image."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(3 * width + 1)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8_001, 8_000), (13_000, 13_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_too_large_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(Image.Image, "load", None)
    path = tmp_path / "a" / "1.png"
    path.parent.mkdir()
    content = png_of_zeros(8, 8)
    head = struct.pack(">II", *size) + content[24:29]
    path.write_bytes(content[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + content[33:])
    with pytest.raises(UserError, match=r"1\.png: cannot be decoded \(.*more than 64 megapixels\)") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_a_large_image_is_refused_before_it_takes_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 100)
    (tmp_path / "frames" / "a").mkdir(parents=True)
    (tmp_path / "frames" / "a" / "1.png").write_bytes(png_of_zeros(20, 20))
    with pytest.raises(UserError, match="none of its images can be decoded"):
        open_dataset(f"frames:{tmp_path / 'frames'},caption=wait")
    with pytest.raises(UserError, match=r"front: cannot be decoded \(20x20, more than"):
        as_image(Image.new("RGB", (20, 20)), "front")


def test_what_is_no_image_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("secret")
    for content in (b"", b"\x89PNG", "text.png", str(tmp_path / "text.png"), None, 3, corners().tobytes()):
        with pytest.raises(UserError, match="image: cannot"):
            decode_image(content, "image: cannot be decoded")  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png: is no regular file"):
        read_image(tmp_path / "pipe.png")


def test_many_damaged_images_are_user_errors_or_images() -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    wholes = [encoded(Image.fromarray(corners()), form, exif=exif) for form in ("JPEG", "PNG", "WEBP")]
    wholes += [encoded(Image.fromarray(corners()).quantize(8), form) for form in ("PNG", "BMP")]
    num_refused = 0
    for _ in range(1_000):
        content = bytearray(wholes[rng.integers(len(wholes))])
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            content[place] ^= 1 << int(rng.integers(8))
        try:
            assert decode_image(bytes(content), "image").shape[2] == 3
        except UserError:
            num_refused += 1
    assert num_refused > 100
