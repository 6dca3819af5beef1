"""Files are whole or absent, and finished work is not overwritten by accident."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lapa import files
from lapa.errors import UserError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(OSError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "labels").mkdir(parents=True)
    for out in (tmp_path / "data", tmp_path):
        with pytest.raises(ValueError, match=r"is or contains .*data, which this command reads"):
            files.claim_output(out, complete=False, overwrite=True, inputs=[tmp_path / "data"])
    files.claim_output(tmp_path / "data" / "labels", complete=False, inputs=[tmp_path / "data"])


@pytest.mark.parametrize(
    "named",
    [
        "../a",
        "a/../../b",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a/..",
        "a\0b",
        "a\nb",
        "a\x1b[2J",
        "..\\a",
        "\ud800",
        None,
        1,
        ["a"],
    ],
)
@pytest.mark.parametrize("written", [False, True])
def test_what_a_file_names_stays_inside_its_folder(tmp_path: Path, named: object, written: bool) -> None:
    with pytest.raises(UserError, match="names no file inside") as error:
        files.inside(tmp_path, named, written=written)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).isprintable()


def test_links_inside_a_folder_are_read_but_lead_no_writer_out(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    (inner / "real").mkdir(parents=True)
    (inner / "away").symlink_to(tmp_path)
    (inner / "near").symlink_to(inner / "real")
    (inner / "round").symlink_to(inner / "round")
    for name in ("real/a b.mp4", "near/é..mp4", "./x", "observation.images.top/clip-000.mp4"):
        assert files.inside(inner, name, written=True) == inner / name
    for name in ("away/a", "away", "near/../away/a"):
        with pytest.raises(UserError, match=r"names no file inside|a link leads out of"):
            files.inside(inner, name, written=True)
    assert files.inside(inner, "away/a") == inner / "away/a"


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from lapa.files import atomic_path
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
with atomic_path(path) as temporary:
    tensor = torch.zeros(100_000)
    torch.save({"a": tensor}, temporary) if path.suffix == ".pt" else save_file({"a": tensor}, temporary)
"""


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors"])
def test_whatever_a_writer_makes_of_a_full_disk_is_one_clear_error(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands for the full disk."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / name)], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"OSError: {tmp_path / name}: could not be written (")
    assert last.endswith("; make room and run the command again")
    assert not any(tmp_path.iterdir())


def test_a_writer_without_an_error_of_its_own_is_named_and_other_errors_pass(tmp_path: Path) -> None:
    complaint = r"processor: could not be written \(File too large\)"
    with pytest.raises(OSError, match=complaint), files.writing(tmp_path / "processor"):
        raise Exception("File too large")
    with pytest.raises(KeyError), files.writing(tmp_path):
        raise KeyError("a")


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert not any(tmp_path.iterdir())


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b\.json: no such file"):
        files.read_json(tmp_path / "b.json")


def test_claiming_an_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    files.claim_output(out, complete=False)
    assert out.is_dir()
    files.claim_output(out, complete=False)
    (out / "half").touch()
    with pytest.raises(ValueError, match="--resume to go on with it"):
        files.claim_output(out, complete=False)
    with pytest.raises(ValueError, match=r"give another --out, or --overwrite to replace it$"):
        files.claim_output(out, complete=False, resumable=False)
    with pytest.raises(ValueError, match="finished result; give another --out, or --overwrite"):
        files.claim_output(out, complete=True)
    files.claim_output(out, complete=False, resume=True)
    assert (out / "half").exists()
    files.claim_output(out, complete=True, overwrite=True)
    assert not any(out.iterdir())
    with pytest.raises(ValueError, match="exclude each other"):
        files.claim_output(out, complete=False, overwrite=True, resume=True)


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert files.read_json_lines(path) == []
    # Cut behind an inner brace: the line looks whole, and is not.
    path.write_text('{"a": 1}\n{"a": {"b": 2}')
    assert files.read_json_lines(path) == [{"a": 1}]


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    for name, text in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / name).write_text(text)
    a, b, c = (files.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    assert len(a) == 16


def test_a_url_is_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"s3:/bucket/out: this is written to this machine's disk; give a folder"):
        files.claim_output(Path("s3://bucket/out"), complete=False)
    assert not list(tmp_path.iterdir())


def test_lines_of_json_are_read_up_to_one_cut_short_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert files.read_json_lines(path) == []
    path.write_text('{"a": 1}\n[2]\n{"a"')
    assert files.read_json_lines(path) == [{"a": 1}, [2]]
    for damage in (b"{\n", b"\xff\n", b"[" * 100_000 + b"\n"):
        path.write_bytes(b"1\n" + damage)
        with pytest.raises(UserError, match=r"rows\.jsonl: line 2 is not JSON"):
            files.read_json_lines(path)
