"""`lapa data webdataset`: names, texts, stores, random access in shards, and damaged and hostile ones."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from braceexpand import braceexpand
from webdataset import WebDataset

from lapa.data.convert import run
from lapa.data.dataset import Dataset
from lapa.data.spec import open_dataset
from lapa.data.transforms import resize_and_crop
from lapa.sources import webdataset
from lapa.sources.webdataset import WebDatasetConfig, expanded, find_shards, list_videos
from test_convert import listed
from test_sources_videos import write_clip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """A function that returns the bytes of a clip of so many frames."""
    folder = tmp_path_factory.mktemp("clips")

    def make(num: int = 8, name: str = "a.mp4", **options) -> bytes:
        path = folder / f"{num}-{len(options)}-{name}"
        if not path.exists():
            write_clip(path, num=num, **options)
        return path.read_bytes()

    return make


def write_shard(path: Path, members: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path, clip: Callable[..., bytes]) -> Path:
    """Two shards of two clips each, of 6 to 9 frames."""
    for shard in range(2):
        members = {}
        for number in range(2):
            key, num = f"part/{shard}{number}", 6 + 2 * shard + number
            members |= {f"{key}.json": json.dumps({"caption": f"clip {num}", "n": num}).encode()}
            members |= {f"{key}.mp4": clip(num)}
        write_shard(tmp_path / "shards" / f"clips-{shard:02d}.tar", members)
    return tmp_path / "shards"


def convert(shards: Path | str, out: Path, **settings) -> Dataset:
    run(WebDatasetConfig(str(shards), out=out, **{"size": 32, "workers": 1, **settings}))
    return open_dataset(out)


def test_shards_become_the_same_dataset_in_place_and_converted(shards: Path, tmp_path: Path) -> None:
    there, here = convert(shards, tmp_path / "out"), open_dataset(f"webdataset:{shards}")
    assert there.lengths.tolist() == here.lengths.tolist() == [6, 7, 8, 9]
    assert [e.instruction for e in there] == [e.instruction for e in here] == [f"clip {n}" for n in range(6, 10)]
    assert [e.source for e in here] == [
        f"clips-{n[0]}.tar:part/{n[1]}" for n in (("00", "00"), ("00", "01"), ("01", "10"), ("01", "11"))
    ]
    assert [e.source for e in there] == [e.source for e in here]
    for episode in range(4):
        apart = resize_and_crop(here.frames(episode), 32).astype(int) - there.frames(episode)
        assert np.abs(apart).mean() < 3
    assert (here.frames(3, [7, 0, 7]) == here.frames(3)[[7, 0, 7]]).all()
    again = pickle.loads(pickle.dumps(here))
    assert (again.frames(2, [3]) == here.frames(2, [3])).all()


def test_a_folder_a_file_and_a_pattern_name_the_same_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [e.source for e in open_dataset(f"webdataset:{shards}")]
    assert [e.source for e in open_dataset(f"webdataset:{shards}/clips-{{00..01}}.tar")] == both
    assert [e.source for e in open_dataset(f"webdataset:{shards}/clips-00.tar")] == both[:2]
    assert find_shards(f"{shards.parent}/s{{hards,}}/a.tar") == (shards.parent, ["shards/a.tar", "s/a.tar"])
    assert find_shards(f"{shards.parent}/dir{{0..0}}/x.tar") == (shards.parent, ["dir0/x.tar"])
    monkeypatch.chdir(shards)
    assert [e.source for e in open_dataset("webdataset:clips-{01,00}.tar")] == both[2:] + both[:2]
    assert [e.source for e in open_dataset("webdataset:clips-00.tar")] == both[:2]


def test_shards_on_a_store(shards: Path, tmp_path: Path) -> None:
    bucket, memory = f"bucket-{uuid.uuid4().hex}", fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/{bucket}/deep/{path.name}", path.read_bytes())
    local = open_dataset(f"webdataset:{shards}")
    for where in (f"memory://{bucket}", f"memory://{bucket}/deep/clips-{{00..01}}.tar"):
        remote = open_dataset(f"webdataset:{where}")
        assert remote.lengths.tolist() == local.lengths.tolist()
        assert (pickle.loads(pickle.dumps(remote)).frames(1, [5, 2]) == local.frames(1, [5, 2])).all()
    assert len(convert(f"memory://{bucket}/deep/clips-01.tar", tmp_path / "out")) == 2


def test_patterns_are_expanded_as_by_the_shell() -> None:
    assert expanded("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    assert expanded("{8..10}") == ["8", "9", "10"]
    assert expanded("{2..0}") == ["2", "1", "0"]
    assert expanded("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expanded("{a} {} b") == ["{a} {} b"]
    assert expanded("{0..0}" * 5000) == ["0" * 5000]
    for nested in ("{a,{b,c}}", "{a{0..1},b}"):
        with pytest.raises(ValueError, match="braces inside braces"):
            expanded(nested)
    for far in ("{0..999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(ValueError, match="more than 1000000 shards"):
            expanded(far)
    for pattern in ("x{000..012}.tar", "{9..11}-{a,b}", "s/{0..2}/{00..01}.tar"):
        assert expanded(pattern) == list(braceexpand(pattern))


def test_samples_are_grouped_as_by_webdataset(tmp_path: Path, clip: Callable[..., bytes]) -> None:
    video = clip()
    members = {
        "__meta__/x.mp4": video,
        "a.b/7.seg.MP4": video,
        "a.b/7.seg.txt": b"first\n",
        "a.b/7.other.mp4": video,
        "._8.mp4": video,
        "a.b/._7.mp4": video,
        "a.b/._8.mp4": video,
        "8.json": b'{"text": "eight"}',
        "8.webm": clip(name="a.webm", codec="libvpx-vp9"),
        "8.txt": b"from the text",
        "9.txt": b"no video",
        "README": b"",
        "10.mp4": video,
    }
    shard = write_shard(tmp_path / "a.tar", members)
    found = list_videos(shard)
    assert [(key, ending, text) for key, ending, _, _, text in found["videos"]] == [
        ("a.b/7", "seg.mp4", "first"),
        ("8", "webm", "from the text"),
        ("10", "mp4", ""),
    ]
    assert found["notes"] == {webdataset.OTHER_VIDEOS: 1, webdataset.NO_VIDEO: 1, webdataset.HIDDEN: 3}
    assert not found["problem"]
    for _, ending, first, size, _ in found["videos"]:
        content = members[{"seg.mp4": "a.b/7.seg.MP4", "webm": "8.webm", "mp4": "10.mp4"}[ending]]
        assert shard.read_bytes()[first : first + size] == content
    read = WebDataset(str(shard), shardshuffle=False)
    theirs = [sample for sample in read if {"webm", "mp4", "seg.mp4"} & set(sample)]
    assert [sample["__key__"] for sample in theirs] == [key for key, *_ in found["videos"]]


def test_texts(tmp_path: Path, clip: Callable[..., bytes], capsys: pytest.CaptureFixture) -> None:
    members = {}
    texts = {"0.txt": b"t", "1.json": b'{"caption": ["x"], "instruction": " i "}', "2.json": b"{", "3.txt": b"\xff"}
    texts |= {"4.json": b"[1]", "5.json": b'{"long": "words", "text": "t"}', "6.json": b'"' + b"x" * 2_000_000 + b'"'}
    texts |= {"7.txt": b"", "8.txt": b"x" * 2_000_000, "9.txt": b"\xef\xbb\xbfmarked"}
    for name, text in texts.items():
        members |= {f"{name[0]}.mp4": clip(), name: text}
    shard = write_shard(tmp_path / "a.tar", members)
    assert [text for *_, text in list_videos(shard)["videos"]] == ["t", "i", "", "", "", "t", "", "", "", "marked"]
    assert [text for *_, text in list_videos(shard, "long")["videos"]] == ["", "", "", "", "", "words", "", "", "", ""]
    dataset = open_dataset(f"webdataset:{shard},caption=wave")
    assert [e.instruction for e in dataset] == ["t", "i", "wave", "wave", "wave", "t", *["wave"] * 3, "marked"]
    shown = capsys.readouterr().err
    assert "no JSON, not read (.json): 1" in shown and "no JSON, not read (.txt): 1" in shown
    assert "1048576 bytes, not read (.json): 1" in shown and "1048576 bytes, not read (.txt): 1" in shown
    open_dataset(f"webdataset:{shard}")
    assert "without a caption (--caption TEXT gives them one): 6" in capsys.readouterr().err


def test_damaged_videos_are_counted(
    shards: Path, tmp_path: Path, clip: Callable, capsys: pytest.CaptureFixture
) -> None:
    write_shard(shards / "clips-02.tar", {"a.mp4": b"no video", "b.mp4": clip(), "c.mp4": b""})
    with pytest.raises(ValueError, match=r"clips-02\.tar: a\.mp4: not a readable video"):
        convert(shards, tmp_path / "out")
    assert convert(shards, tmp_path / "out", resume=True, skip_bad=True).lengths.tolist() == [6, 7, 8, 9, 8]
    assert "left out, damaged: 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"clips-02\.tar: a\.mp4: not a readable video.*and 1 more.*skip_bad=true"):
        open_dataset(f"webdataset:{shards}")
    assert len(open_dataset(f"webdataset:{shards},skip_bad=true")) == 5


def broken(content: bytes) -> dict[str, tuple[bytes, str, int]]:
    """By kind of damage: the shard, what is said, and how many videos are found."""
    half = content.rindex(b"part/01.mp4") + 600
    bad_header = bytearray(content)
    bad_header[content.rindex(b"part/01.mp4") : content.rindex(b"part/01.mp4") + 3] = b"xyz"
    return {
        "cut in a video": (content[:half], r"is cut short: 'part/01\.mp4' at byte \d+ has \d+ bytes", 1),
        "cut in a header": (content[: half - 400], "cut short or damaged: there is no header", 1),
        "cut between members": (content[: -(-len(content.rstrip(b"\0")) // 512) * 512], "cut short or damaged", 2),
        "cut in the last block": (content.rstrip(b"\0"), "is damaged behind byte", 2),
        "damaged header": (bytes(bad_header), "cut short or damaged: there is no header", 1),
        "empty": (b"", "empty, zero bytes", 0),
        "text": (b"<html>no such key</html>" * 50, "is no tar", 0),
        "compressed": (b"\x1f\x8b\x08" + content, "is compressed.*gunzip", 0),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", 0),
        "two in one": (content + bytes(1 << 20) + content, "are two shards in one file", 2),
    }


@pytest.mark.parametrize("kind", broken(b"part/01.mp4"))
def test_a_broken_shard_is_one_line(shards: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    path = shards / "clips-00.tar"
    content, message, num = broken(path.read_bytes())[kind]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"clips-00\.tar: .*{message}.*--skip-bad"):
        open_dataset(f"webdataset:{shards}")
    assert len(open_dataset(f"webdataset:{shards},skip_bad=true")) == num + 2
    assert f"skipped: {path}: " in capsys.readouterr().err


def test_missing_shards(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"clips-02\.tar: no such file \(and 7 more like it\).*--skip-bad"):
        open_dataset(f"webdataset:{shards}/clips-{{00..09}}.tar")
    assert len(open_dataset(f"webdataset:{shards}/clips-{{00..09}}.tar,skip_bad=true")) == 4
    with pytest.raises(ValueError, match=r"holds no \.tar and no"):
        find_shards(str(shards.parent / "cache"))
    with pytest.raises(ValueError, match=r"none\.tar: no such file; name a folder with \.tar"):
        open_dataset(f"webdataset:{shards}/none.tar")


def test_the_page_has_what_was_found_while_listing(shards: Path, tmp_path: Path, clip: Callable) -> None:
    write_shard(shards / "clips-02.tar", {"a.mp4": clip(), "b.txt": b"no video", "a.webm": clip(9)})
    write_shard(shards / "clips-03.tar", {"a.mp4": clip(), "a.webm": clip()})
    path = shards / "clips-00.tar"
    path.write_bytes(broken(path.read_bytes())["damaged header"][0])
    dataset = convert(f"{shards}/clips-{{00..05}}.tar", tmp_path / "out", skip_bad=True)
    assert listed(dataset) == {
        "shards that are missing or cannot be read": 2,
        "shards that are damaged, read up to there": 1,
        "samples without a video": 2,
        "samples whose name comes twice in their shard, left out": 1,
        "further videos of a sample, not read": 1,
        "videos without a caption (--caption TEXT gives them one)": 2,
    }


def test_a_key_that_comes_twice(tmp_path: Path, clip: Callable, capsys: pytest.CaptureFixture) -> None:
    shard = write_shard(tmp_path / "a.tar", {"a.mp4": clip(), "b.mp4": clip(), "a.webm": clip(9)})
    with pytest.raises(ValueError, match="'a' comes twice"):
        open_dataset(f"webdataset:{shard}")
    capsys.readouterr()
    assert open_dataset(f"webdataset:{shard},skip_bad=true").lengths.tolist() == [8, 8]
    assert "gives them one): 2" in capsys.readouterr().err


def hostile(clip: bytes) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
    for name, kind in (("link.mp4", tarfile.SYMTYPE), ("hard.mp4", tarfile.LNKTYPE), ("device.mp4", tarfile.CHRTYPE)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        yield "entry", info, b""
    for name in ("../../outside.mp4", "/tmp/absolute.mp4", "a\x1b[2J\n.mp4", "\udcff.mp4", "x" * 5000 + ".mp4"):
        info = tarfile.TarInfo(name)
        info.size = len(clip)
        yield "entry", info, clip


def test_names_and_links_of_a_hostile_shard_reach_no_file(
    tmp_path: Path, clip: Callable, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
        for _, info, content in hostile(clip()):
            tar.addfile(info, io.BytesIO(content))
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    dataset = convert(tmp_path / "in", tmp_path / "out")
    assert [e.source.partition(":")[2] for e in dataset] == ["../../outside", "/tmp/absolute", "a\x1b[2J\n", "\ufffd"]
    assert {path for path in tmp_path.rglob("*") if not {"cache", "out"} & set(path.parts)} == before
    assert not Path("/tmp/absolute.mp4").exists() and "\x1b" not in capsys.readouterr().err
    found = list_videos(tmp_path / "in" / "a.tar")
    assert found["notes"][webdataset.NO_FILES] == 4


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108], header[124:136], header[156:157] = b"0000644\0", size, kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (raw_header(b"a.mp4", b"77777777777\0"), "is cut short"),
        (raw_header(b"a.mp4", b"\x80" + b"\x7f" * 11), "is cut short|is damaged"),
        (raw_header(b"a.mp4", b"\xff" * 10 + b"\xfc\x00"), "damaged header"),
        (raw_header(b"a.mp4", b"\xff" * 10 + b"\xfc\x00", b"x"), "header of more than|damaged|no tar"),
        (raw_header(b"a", b"77777777777\0", b"x"), "header of more than"),
        (raw_header(b"a", b"77777777777\0", b"L"), "header of more than"),
        (
            raw_header(b"a", b"00000001000\0", b"x") + b"9999999999999999999 path=a\n".ljust(512, b"\0"),
            "no tar|damaged",
        ),
        (
            b"".join(raw_header(b"a", b"00000000001\0", b"L") + b"b".ljust(512, b"\0") for _ in range(3000)),
            "damaged|no tar|header of more",
        ),
    ],
    ids=["huge", "absurd", "negative", "negative pax", "huge pax", "huge name", "bad pax", "chain"],
)
def test_hostile_headers_are_one_line(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header + bytes(1024))
    with pytest.raises(ValueError, match=rf"a\.tar: .*({message})"):
        open_dataset(f"webdataset:{path}")


def test_a_shard_that_changes_is_named(shards: Path, clip: Callable) -> None:
    dataset = open_dataset(f"webdataset:{shards}")
    write_shard(shards / "clips-00.tar", {"z.mp4": clip(9)})
    with pytest.raises(ValueError, match=r"clips-00\.tar: has changed since its members were listed"):
        dataset.frames(0, [0])
    assert open_dataset(f"webdataset:{shards}")[0].source == "clips-00.tar:z"


def test_members_are_listed_once(shards: Path, monkeypatch: pytest.MonkeyPatch, clip: Callable) -> None:
    first = open_dataset(f"webdataset:{shards}")
    looked: list[str] = []
    monkeypatch.setattr(
        webdataset, "list_videos", lambda shard, key: looked.append(shard.name) or list_videos(shard, key)
    )
    assert open_dataset(f"webdataset:{shards}").fingerprint == first.fingerprint
    assert looked == []
    write_shard(shards / "clips-02.tar", {"z.mp4": clip(9)})
    assert len(open_dataset(f"webdataset:{shards}")) == 5
    assert looked == ["clips-02.tar"]


def write_rows(path: Path, columns: Mapping[str, list], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_parquet_with_bytes_of_videos(tmp_path: Path, clip: Callable) -> None:
    videos, texts = [clip(6 + number) for number in range(5)], [f"clip {number}" for number in range(5)]
    stored = [{"bytes": video, "path": "/etc/passwd"} for video in videos]
    write_rows(tmp_path / "in" / "a.parquet", {"video": stored, "text": texts})
    json_of = [{"caption": text, "other": "o"} for text in texts]
    write_rows(tmp_path / "in" / "b.parquet", {"thumbnail": videos, "mp4": videos, "json": json_of}, group=5)
    here = open_dataset(f"webdataset:{tmp_path / 'in'}")
    assert here.lengths.tolist() == [6, 7, 8, 9, 10] * 2
    assert [e.instruction for e in here] == texts * 2
    assert here[4].source == "a.parquet:4"
    there = convert(tmp_path / "in", tmp_path / "out")
    assert [e.source for e in there] == [e.source for e in here]
    for episode in (9, 0, 3):
        apart = resize_and_crop(here.frames(episode), 32).astype(int) - there.frames(episode)
        assert np.abs(apart).mean() < 3
    assert open_dataset(f"webdataset:{tmp_path / 'in' / 'b.parquet'},caption-key=other")[0].instruction == "o"


def test_texts_of_parquet_in_every_form(tmp_path: Path, clip: Callable) -> None:
    videos = [clip()] * 2
    for name, column, texts in (
        ("a", "json", [json.dumps({"caption": "one"}), json.dumps({"caption": "two"})]),
        ("b", "text", [b"one", b"two"]),
    ):
        path = write_rows(tmp_path / f"{name}.parquet", {"video": videos, column: texts})
        assert [episode.instruction for episode in open_dataset(f"webdataset:{path}")] == ["one", "two"]
    path = write_rows(tmp_path / "d.parquet", {"video": videos, "json": ["{", "[1]"]})
    assert [episode.instruction for episode in open_dataset(f"webdataset:{path}")] == ["", ""]


def test_a_dataset_in_the_folder_of_its_shards_is_no_shard(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "in" / "dataset")
    assert len(open_dataset(f"webdataset:{tmp_path / 'in'}")) == 4
    convert(tmp_path / "in", tmp_path / "in" / "dataset", resume=True)


def test_parquet_that_does_not_fit(tmp_path: Path, clip: Callable) -> None:
    path = write_rows(tmp_path / "long.parquet", {"video": [clip()], "text": ["x" * 2_000_000]})
    found = list_videos(path)
    assert found["videos"][0][-1] == "" and list(found["notes"].values()) == [1]
    path = write_rows(tmp_path / "a.parquet", {"video": [clip(), None, b"no video"], "text": ["a", "b", "c"]})
    assert open_dataset(f"webdataset:{path},skip_bad=true").lengths.tolist() == [8]
    with pytest.raises(ValueError, match=r"a\.parquet: 1\.video: holds no bytes of a video.*and 1 more"):
        open_dataset(f"webdataset:{path}")
    for columns, found in (({"text": ["a"]}, "none"), ({"one": [b"a"], "two": [b"a"]}, "one, two")):
        write_rows(path, columns)
        with pytest.raises(ValueError, match=rf"a\.parquet: columns that may hold videos: {found}"):
            open_dataset(f"webdataset:{path}")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read"):
        open_dataset(f"webdataset:{path}")


def test_rows_by_the_million_that_are_empty_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"video": pa.nulls(3_000_000, pa.binary())}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read \(would take 732 MiB of memory"):
        list_videos(tmp_path / "a.parquet")
