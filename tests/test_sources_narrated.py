"""`lapa data narrated`: rows of EPIC-KITCHENS, Ego4D and plain tables, cut out of long videos, and what is wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from lapa.data.convert import run
from lapa.data.dataset import Dataset
from lapa.data.spec import open_dataset
from lapa.errors import UserError
from lapa.sources import videos
from lapa.sources.narrated import NarratedConfig, seconds
from test_convert import listed
from test_sources_videos import numbers, write_clip, write_times


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One video of 3 s at 10 fps, one of 2 s at 5 fps; frame n is as bright as 20 plus 7 n."""
    write_times(tmp_path / "videos" / "P01" / "P01_01.MP4", [number / 10 for number in range(30)])
    write_times(tmp_path / "videos" / "P02" / "P02_10.MP4", [number / 5 for number in range(10)])
    return tmp_path / "videos"


def table(path: Path, header: str, *rows: str) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([line.split("|") for line in (header, *rows)])
    return str(path)


def convert(folder: Path, narrations: str, **settings) -> Dataset:
    out = settings.pop("out", folder.parent / "dataset")
    run(
        NarratedConfig(str(folder), narrations=narrations, out=out, **{"size": 48, "workers": 1, "fps": 10, **settings})
    )
    return open_dataset(out)


def rows_of(folder: Path) -> str:
    return table(
        folder.parent / "rows.csv",
        "narration_id|video_id|start_timestamp|stop_timestamp|narration",
        "1|P02_10|00:00:00.40|00:00:01.20|take plate",
        "2|P01_01|00:00:01.50|00:00:02.00|open door, wide",
        "3|P01_01|00:00:00.30|00:00:01.70|walk",
        "4|P01_01|00:00:02.56|00:00:02.98|Tür zu",
    )


def test_rows_become_episodes_in_the_order_of_the_videos(folder: Path) -> None:
    dataset = convert(folder, rows_of(folder))
    assert [(e.length, e.instruction) for e in dataset.episodes] == [
        (14, "walk"),
        (5, "open door, wide"),
        (5, "Tür zu"),
        (8, "take plate"),
    ]
    assert dataset.episodes[1].source == "P01/P01_01.MP4@1.500-2.000 line 3"
    assert numbers(dataset.frames(0)) == list(range(3, 17))
    assert numbers(dataset.frames(1)) == list(range(15, 20))
    assert numbers(dataset.frames(2)) == [26, 27, 28, 29, 29]
    assert numbers(dataset.frames(3)) == [2, 3, 3, 4, 4, 5, 5, 6]


def test_in_place_equals_the_converted_dataset(folder: Path) -> None:
    there = convert(folder, rows_of(folder))
    here = open_dataset(f"narrated:{folder},narrations={rows_of(folder)},fps=10")
    assert [(e.source, e.length, e.instruction) for e in here.episodes] == [
        (e.source, e.length, e.instruction) for e in there.episodes
    ]
    for episode in range(4):
        assert numbers(here.frames(episode)) == numbers(there.frames(episode))
    assert numbers(here.frames(0, [13, 0, 5, 5])) == [16, 3, 8, 8]


def test_other_columns(folder: Path) -> None:
    for number, header in enumerate(
        ("video_uid|start_sec|end_sec|narration_text", "video|start|stop|text", "File|Start|End|Caption")
    ):
        rows = table(folder.parent / f"{number}.csv", header, "P01/P01_01.MP4|0.5|1.0|wave")
        dataset = convert(folder, rows, out=folder.parent / str(number))
        assert [(e.length, e.instruction) for e in dataset.episodes] == [(5, "wave")]
        assert numbers(dataset.frames(0)) == [5, 6, 7, 8, 9]


def test_a_clip_is_leapt_to_and_not_read_up_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "videos" / "long.mp4", num=600, fps=10, codec="libx264", g="10")
    rows = table(tmp_path / "rows.csv", "video|start|stop|text", "long|50|51|late", "long|51|52|later")
    decoded = 0
    next_frame = videos.next_frame

    def counted(clip):
        nonlocal decoded
        decoded += 1
        return next_frame(clip)

    monkeypatch.setattr(videos, "next_frame", counted)
    dataset = convert(tmp_path / "videos", rows)
    assert dataset.lengths.tolist() == [10, 10]
    assert decoded < 60
    levels = dataset.frames(0).mean(axis=(1, 2, 3))
    assert np.abs(levels - (20 + 200 * np.arange(500, 510) // 600)).max() < 4


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("P01_01|1.0|0.5|back", "stops at 0.5, which is not after its start at 1.0"),
        ("P01_01|1.0|1.0|none", "is not after its start"),
        ("P01_01|nan|2|what", "'nan' is no time"),
        ("P01_01|0|inf|what", "'inf' is no time"),
        ("P01_01|-1|2|what", "'-1' is no time"),
        ("P01_01|0:99|2|what", "'0:99' is no time"),
        ("P01_01||2|what", "'' is no time"),
        ("P01_01|3.0|4.0|past", r"starts at 3 s, but P01/P01_01\.MP4 ends at 3\.000 s"),
        ("P01_01|1.0|2.0|", "has no text"),
        ("|1.0|2.0|what", "has no video"),
    ],
)
def test_rows_that_are_wrong_are_named(folder: Path, row: str, wrong: str, capsys: pytest.CaptureFixture) -> None:
    rows = table(folder.parent / "rows.csv", "video|start|stop|text", "P01_01|0.5|1.0|wave", row)
    with pytest.raises(ValueError, match=rf"rows\.csv: line 3: .*{wrong}.*--skip-bad"):
        convert(folder, rows)
    assert not (folder.parent / "dataset").exists()
    dataset = convert(folder, rows, skip_bad=True)
    assert len(dataset) == 1 and listed(dataset) == {"rows that are wrong, left out": 1}
    assert "skipped in all (--skip-bad): 1" in capsys.readouterr().err


def test_where_all_rows_are_wrong_one_is_named(folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "wrong.csv", "video|start|stop|text", "a|-1|0.5|reach", "a|0|inf|reach")
    with pytest.raises(UserError, match=r"wrong\.csv: line 2: '-1' is no time.*--skip-bad"):
        convert(folder, path)
    with pytest.raises(UserError, match=r"wrong\.csv: none of its rows can be used"):
        convert(folder, path, skip_bad=True)


def test_a_row_past_the_end_is_cut_there_and_counted(folder: Path, capsys: pytest.CaptureFixture) -> None:
    rows = table(folder.parent / "rows.csv", "video|start|stop|text", "P01_01|2.5|9.0|wave")
    dataset = convert(folder, rows)
    assert numbers(dataset.frames(0)) == [25, 26, 27, 28, 29]
    assert "go on past the end of their video, cut there: 1 of 1" in capsys.readouterr().err
    assert listed(dataset) == {"rows that go on past the end of their video, cut there": 1}


def test_missing_videos_are_counted_and_ambiguous_ones_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    rows = table(
        folder.parent / "rows.csv",
        "video|start|stop|text",
        "P01_01|0|1|a",
        "P09_01|0|1|b",
        "P09_02|0|1|c",
        "P09_01|2|3|d",
    )
    dataset = convert(folder, rows)
    assert len(dataset) == 1 and listed(dataset) == {"rows whose video is missing": 3}
    assert "videos missing: 2 of the 3" in capsys.readouterr().err
    write_clip(folder / "P03" / "P01_01.mkv")
    with pytest.raises(ValueError, match=r"P01_01 may be P01/P01_01\.MP4 or P03/P01_01\.mkv; write the folder"):
        convert(folder, rows, out=folder.parent / "other")
    none = table(folder.parent / "none.csv", "video|start|stop|text", "P09_01|0|1|b")
    with pytest.raises(ValueError, match="holds none of the 1 videos"):
        convert(folder, none, out=folder.parent / "other")


def test_tables_that_are_none(folder: Path) -> None:
    for header, rows, wrong in (
        ("video|start|text", (), "has no column for the stop"),
        ("video|start|stop|text", (), "holds no row"),
    ):
        with pytest.raises(ValueError, match=wrong):
            convert(folder, table(folder.parent / "rows.csv", header, *rows))
    with pytest.raises(ValueError, match="no such table of narrations"):
        convert(folder, str(folder.parent / "gone.csv"))
    with pytest.raises(ValueError, match="no narrations; give a CSV"):
        open_dataset(f"narrated:{folder}")


def test_a_video_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "P01" / "P01_02.MP4").write_bytes(b"")
    rows = table(folder.parent / "rows.csv", "video|start|stop|text", "P01_02|0|1|a", "P01_01|0|1|b")
    with pytest.raises(ValueError, match=r"P01_02\.MP4: .*zero bytes.*--skip-bad"):
        convert(folder, rows)
    assert [e.instruction for e in convert(folder, rows, skip_bad=True).episodes] == ["b"]


def test_times_in_every_form() -> None:
    assert [seconds(text) for text in ("12.5", "1:02.5", "00:01:02.500", " 3 ")] == [12.5, 62.5, 62.5, 3.0]
