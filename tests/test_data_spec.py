"""Data specs: names, sources, options, weights; paths that look like any of them; sources of other distributions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapa import cli
from lapa.data.source import Item, SourceDataset
from lapa.data.spec import DataSpec, open_dataset, typed_options
from lapa.errors import UserError

SOURCES = ("rlds", "videos", "lerobot", "lapa-jsonl")


def parse(text: str) -> DataSpec:
    return DataSpec.parse(text, SOURCES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/clips", DataSpec("data/clips")),
        ("data/clips:0.5", DataSpec("data/clips", weight=0.5)),
        ("data/clips:2", DataSpec("data/clips", weight=2.0)),
        ("data/clips:1e-3", DataSpec("data/clips", weight=0.001)),
        ("bridge=data/b:0.5", DataSpec("data/b", name="bridge", weight=0.5)),
        ("rlds:b/1.0.0", DataSpec("b/1.0.0", "rlds")),
        ("rlds:b/1.0.0:3", DataSpec("b/1.0.0", "rlds", weight=3.0)),
        (
            "ego=rlds:b/1.0.0,camera=image_0,horizon=2.4:1.0",
            DataSpec("b/1.0.0", "rlds", "ego", {"camera": "image_0", "horizon": "2.4"}, 1.0),
        ),
        ("lapa-jsonl:x.jsonl,image-folder=a b", DataSpec("x.jsonl", "lapa-jsonl", options={"image_folder": "a b"})),
        ("lerobot:lerobot/pusht", DataSpec("lerobot/pusht", "lerobot")),
        ("lerobot:s3://bucket/ds,camera=a+b", DataSpec("s3://bucket/ds", "lerobot", options={"camera": "a+b"})),
        ("memory://ds,horizon=0.5:2.0", DataSpec("memory://ds", options={"horizon": "0.5"}, weight=2.0)),
        ("robot=s3://bucket/ds:0.1", DataSpec("s3://bucket/ds", name="robot", weight=0.1)),
        ("file:///data/ds", DataSpec("file:///data/ds")),
        ("Ein Ordner/数据:0.5", DataSpec("Ein Ordner/数据", weight=0.5)),
        ("data/a:b/clips", DataSpec("data/a:b/clips")),
        ("videos/x,y", DataSpec("videos/x,y")),
    ],
)
def test_specs_are_read_as_they_are_meant(text: str, expected: DataSpec) -> None:
    assert parse(text) == expected


def test_paths_that_are_there_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b=1", "run:2", "x=y", "rlds:inside", "plain:0.5"):
        (tmp_path / name).mkdir()
        assert parse(name) == DataSpec(name)
    assert parse("a,b=1:2.0") == DataSpec("a,b=1", weight=2.0)
    assert parse("a,b=1,horizon=0.6") == DataSpec("a,b=1", options={"horizon": "0.6"})
    assert parse("rlds:a,b=1,camera=c") == DataSpec("a,b=1", "rlds", options={"camera": "c"})
    assert parse("run:2:0.5") == DataSpec("run:2", weight=0.5)
    assert parse("run:2,horizon=0.6") == DataSpec("run:2", options={"horizon": "0.6"})
    assert parse("name=run:2") == DataSpec("run:2", name="name")
    assert parse("name=x=y:3") == DataSpec("x=y", name="name", weight=3.0)
    assert parse(str(tmp_path / "run:2")) == DataSpec(str(tmp_path / "run:2"))


def test_a_spec_may_be_longer_than_any_name_of_a_file() -> None:
    caption = "pick " * 100
    assert parse(f"rlds:b,caption={caption}:2") == DataSpec("b", "rlds", None, {"caption": caption}, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerbot:lerobot/pusht", "unknown source 'lerbot'; did you mean 'lerobot'"),
        ("x=rdls:path", "unknown source 'rdls'; did you mean 'rlds'"),
        ("rlds:", "names no path"),
        ("rlds:,camera=x", "names no path"),
        ("data:0", "a weight must be above 0"),
        ("data/clips:1.2.3", r"'1\.2\.3' is not a weight"),
    ],
)
def test_specs_that_cannot_be_read_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@settings(max_examples=50, deadline=None)
@given(
    st.from_regex(r"[A-Za-z][\w.-]{0,8}", fullmatch=True),
    st.sampled_from(SOURCES),
    st.from_regex(r"/none/[a-z0-9 ./-]{1,20}", fullmatch=True),
    st.dictionaries(
        st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True), st.from_regex(r"[\w. +]{1,6}", fullmatch=True), max_size=3
    ),
    st.floats(0.001, 1000).map(lambda weight: round(weight, 3)),
)
def test_what_is_put_together_is_taken_apart(
    name: str, source: str, path: str, options: dict[str, str], weight: float
) -> None:
    message = "".join(f",{key}={value}" for key, value in options.items())
    assert parse(f"{name}={source}:{path}{message}:{weight}") == DataSpec(path, source, name, options, weight)


@dataclass(frozen=True)
class Options:
    path: Path
    camera: tuple[str, ...] = ()
    fps: float | None = None
    limit: int = 3
    deep: bool = False
    control: Literal["delta", "absolute"] | None = None


def test_options_have_the_types_of_their_fields() -> None:
    texts = {"camera": "a+b", "fps": "5", "limit": "7", "deep": "True", "control": "delta"}
    assert typed_options(Options, "x", texts, "rlds") == Options(Path("x"), ("a", "b"), 5.0, 7, True, "delta")
    for text, message in (
        ({"camra": "a"}, "unknown option of rlds 'camra'; did you mean 'camera'"),
        ({"fps": "five"}, "fps=five: expected float, got 'five'"),
        ({"limit": "1.5"}, "limit=1.5: expected int, got '1.5'"),
        ({"deep": "1"}, "deep=1: expected true or false, got '1'"),
        ({"control": "absolut"}, "unknown value 'absolut'; did you mean 'absolute'"),
        ({"path": "y"}, "unknown option of rlds 'path'"),
    ):
        with pytest.raises(ValueError, match=message):
            typed_options(Options, "x", text, "rlds")


BROUGHT = """
import dataclasses, pathlib
import numpy as np
from lapa.data.source import Clip, Item, Reading, Source


@dataclasses.dataclass(frozen=True)
class GreyReading(Reading):
    path: pathlib.Path
    level: int = 0

    def open(self):
        return Grey(self)


class Grey(Source):
    kind, fps, cameras, settings = "grey", 5.0, {"front": (8, 8)}, {}

    def __init__(self, reading):
        self.root, self.name, self.level = reading.path, reading.path.name, reading.level
        self.items = [Item("a", (), "wait", 3), Item("b", (), "wait", 2)]

    def read(self, item):
        raise NotImplementedError

    def frames(self, item, frame_indices, camera):
        return np.full((len(frame_indices), 8, 8, 3), self.level, np.uint8)
"""


def test_another_distribution_brings_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "brought_source.py").write_text(BROUGHT)
    metadata = tmp_path / "brought-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lapa.sources]\ngrey = brought_source:GreyReading\n")
    monkeypatch.syspath_prepend(tmp_path)
    dataset = open_dataset("mine=grey:somewhere,level=7")
    assert (dataset.name, len(dataset), dataset[1].length) == ("mine", 2, 2)
    assert (dataset.frames(-1) == 7).all() and dataset.in_place
    with pytest.raises(UserError, match="unknown option of grey:somewhere 'levl'; did you mean 'level'"):
        open_dataset("grey:somewhere,levl=7")
    with pytest.raises(UserError, match="unknown source 'gray'; did you mean 'grey'"):
        open_dataset("gray:somewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["data", "info", "grey:somewhere,level=7"])
    assert not exit_.value.code
    assert "2, of 2 to 3 frames" in capsys.readouterr().out


def test_the_name_of_a_source_is_no_path(tmp_path: Path) -> None:
    source = SimpleNamespace(
        root=tmp_path,
        name="../../outside",
        fps=5.0,
        cameras={"front": (32, 32)},
        action_space=None,
        state_names=None,
        measured=lambda: [Item("a", (), "push", 3)],
    )
    assert SourceDataset(source).name == ".._.._outside"  # type: ignore[arg-type]
