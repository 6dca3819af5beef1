"""`lapa data sthv2`: labels of Something-Something v2, videos that are missing or damaged, and the same in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lapa.data.convert import run
from lapa.data.dataset import Dataset
from lapa.data.spec import open_dataset
from lapa.sources.sthv2 import Sthv2Config
from test_convert import listed
from test_sources_videos import write_clip

LABELS = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "9", "label": "", "template": "Pushing [something] with [something]", "placeholders": ["a cup", "a pen"]},
    {"id": 100, "label": "putting 2 pens", "template": "Putting [number of] [something]", "placeholders": []},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "sthv2" / "20bn-something-something-v2"
    for name in ("78687", "9", "100", "555"):
        write_clip(folder / f"{name}.webm", num=6, fps=12, codec="libvpx-vp9")
    (tmp_path / "sthv2" / "labels").mkdir()
    (tmp_path / "sthv2" / "labels" / "train.json").write_text(json.dumps(LABELS))
    (tmp_path / "sthv2" / "labels" / "test.json").write_text(json.dumps([{"id": "555"}]))
    return folder


def convert(root: Path, **settings) -> Dataset:
    out = settings.pop("out", root.parent / "dataset")
    run(Sthv2Config(str(root), out=out, **{"size": 32, "workers": 1, **settings}))
    return open_dataset(out)


def test_the_videos_of_a_split_become_episodes(root: Path) -> None:
    dataset = convert(root)
    assert dataset.fps == 12.0
    assert [(e.source, e.length, e.instruction) for e in dataset.episodes] == [
        ("9.webm", 6, "Pushing a cup with a pen"),
        ("100.webm", 6, "putting 2 pens"),
        ("78687.webm", 6, "holding potato next to vicks vaporub bottle"),
    ]


def test_in_place_equals_the_converted_dataset(root: Path) -> None:
    there, here = convert(root), open_dataset(f"sthv2:{root},split=train")
    assert [(e.source, e.length, e.instruction) for e in here.episodes] == [
        (e.source, e.length, e.instruction) for e in there.episodes
    ]
    assert abs(here.frames(1, [4]).mean() - there.frames(1, [4]).mean()) < 4


def test_the_test_split_has_no_text(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert [e.instruction for e in convert(root, split="test").episodes] == [""]
    assert "videos without label: 1 of 1; --caption TEXT gives them one" in capsys.readouterr().err
    dataset = open_dataset(f"sthv2:{root},split=test,caption=do it")
    assert [e.instruction for e in dataset.episodes] == ["do it"]


def test_missing_videos_are_counted(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "9.webm").unlink()
    dataset = convert(root)
    assert len(dataset) == 2 and listed(dataset) == {"videos missing that the labels name": 1}
    assert "videos missing: 1 of the 3 that" in capsys.readouterr().err
    for path in root.glob("*.webm"):
        path.rename(path.with_stem(f"x{path.stem}"))
    with pytest.raises(ValueError, match=r"holds none of the 3 videos that .*train\.json names"):
        convert(root, out=root.parent / "other")


def test_damaged_videos_are_left_out_on_request(root: Path) -> None:
    (root / "9.webm").write_bytes(b"")
    with pytest.raises(ValueError, match=r"9\.webm: .*empty, zero bytes"):
        convert(root)
    with pytest.raises(ValueError, match=r"9\.webm: .*empty, zero bytes"):
        open_dataset(f"sthv2:{root}")
    assert len(convert(root, skip_bad=True, overwrite=True).lengths) == 2


def test_labels_that_are_none(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no labels \(validation\.json or .*give --labels FILE"):
        convert(root, split="validation")
    path = tmp_path / "labels.json"
    for text, wrong in (
        ('{"a": 1}', "is no list of labels"),
        ("[{}]", "entry 0 has no id"),
        ('[{"id": "1"}, {"id": 1}]', "entry 1: 1 comes twice"),
        ('[{"id": "1", "label": 5}]', "entry 0: label, template and placeholders are not texts"),
        ("[", "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"labels\.json: {wrong}"):
            convert(root, labels=str(path))
