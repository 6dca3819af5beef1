"""`lapa data frames`: folders of numbered images, gaps, what is damaged, and the same in place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lapa.data.convert import run
from lapa.data.dataset import Dataset
from lapa.data.spec import open_dataset
from lapa.sources.frames import FramesConfig


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
