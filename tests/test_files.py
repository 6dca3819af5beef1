"""Files are whole or absent, and finished work is not overwritten by accident."""

import errno
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from lapa import files
from lapa.errors import UserError
from lapa.locks import LOCK, locked, locks_output


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
    locks_output(files.claim_output)(tmp_path / "data" / "labels", complete=False, inputs=[tmp_path / "data"])


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


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_a_number_that_could_not_be_written_again_is_not_read(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1.5, {"b": NUMBER}]}'.replace("NUMBER", number))
    with pytest.raises(UserError, match=rf"a\.json: not valid JSON \({number} is no number of JSON\)"):
        files.read_json(path)
    path.write_text('{"a": [1.5, -2e-3, 1e-400, 7]}')
    assert files.read_json(path) == {"a": [1.5, -0.002, 0.0, 7]}


def test_claiming_an_output(tmp_path: Path) -> None:
    out, claim_output = tmp_path / "out", locks_output(files.claim_output)
    claim_output(out, complete=False)
    assert out.is_dir()
    claim_output(out, complete=False)
    (out / "half").touch()
    with pytest.raises(ValueError, match="--resume to go on with it"):
        claim_output(out, complete=False)
    with pytest.raises(ValueError, match=r"give another --out, or --overwrite to replace it$"):
        claim_output(out, complete=False, resumable=False)
    with pytest.raises(ValueError, match="finished result; give another --out, or --overwrite"):
        claim_output(out, complete=True)
    claim_output(out, complete=False, resume=True)
    assert (out / "half").exists()
    claim_output(out, complete=True, overwrite=True)
    assert not any(out.iterdir())
    with pytest.raises(ValueError, match="exclude each other"):
        claim_output(out, complete=False, overwrite=True, resume=True)


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
    path.write_text('{"a": 1}\n{"a": [2]}\n{"a"')
    assert files.read_json_lines(path) == [{"a": 1}, {"a": [2]}]
    for damage in (b"{\n", b"\xff\n", b"[" * 100_000 + b"\n"):
        path.write_bytes(b"{}\n" + damage)
        with pytest.raises(UserError, match=r"rows\.jsonl: line 2 is not JSON"):
            files.read_json_lines(path)


HOLDER = """
import sys, time
from pathlib import Path
from lapa.files import claim_output
claim_output(Path(sys.argv[1]), complete=False, resume=True)
print("claimed", flush=True)
time.sleep(600)
"""


@contextmanager
def another_writer(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed `out`, and is killed in the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@locks_output
def claim(out: Path, **options: bool) -> set[str]:
    """What a command that begins with this claim finds in `out`."""
    files.claim_output(out, complete=False, **options)
    return {path.name for path in out.iterdir()}


def test_a_second_process_is_told_who_writes_until_the_first_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_writer(out) as writer:
        (out / "half").touch()
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"out: is being written by process {writer.pid} on .*, started 20"):
                claim(out, **options)
        assert claim(out / "inner") == {LOCK}
        assert {path.name for path in out.iterdir()} == {"half", "inner", LOCK}
    assert claim(out, resume=True) == {"half", "inner", LOCK}
    assert {path.name for path in out.iterdir()} == {"half", "inner"}


def test_an_overwrite_stops_where_another_process_writes_further_inside(tmp_path: Path) -> None:
    inner = tmp_path / "out" / "labels"
    with another_writer(inner), pytest.raises(UserError, match="labels: is being written by process"):
        claim(tmp_path / "out", overwrite=True)
    assert inner.is_dir()
    assert claim(tmp_path / "out", overwrite=True) == {LOCK}
    assert not any((tmp_path / "out").iterdir())


def test_of_many_processes_one_claims(tmp_path: Path) -> None:
    code = HOLDER.replace("time.sleep(600)", "sys.stdin.read()")
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    first = [writer for writer in writers if writer.stdout is not None and writer.stdout.readline() == "claimed\n"]
    assert len(first) == 1
    outputs = {writer: writer.communicate()[1] for writer in writers}
    assert first[0].returncode == 0
    for writer in set(writers) - set(first):
        assert f"is being written by process {first[0].pid} on" in outputs[writer]
    assert not any(tmp_path.iterdir())


def test_one_process_claims_again_after_its_command_has_ended_or_failed(tmp_path: Path) -> None:
    @locks_output
    def fail() -> None:
        files.claim_output(tmp_path, complete=False)
        claim(tmp_path, resume=True)
        with ThreadPoolExecutor(1) as thread, pytest.raises(UserError, match="by another thread of this process"):
            thread.submit(claim, tmp_path).result()
        with pytest.raises(AssertionError), another_writer(tmp_path):
            pass
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert claim(tmp_path) == {LOCK}
    assert not any(tmp_path.iterdir())


def test_without_locks_of_the_file_system_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    claim(tmp_path)
    assert "its file system has no locks (No locks available)" in capsys.readouterr().err


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "target")
    with pytest.raises(UserError, match="out: cannot be written"):
        claim(tmp_path / "out")
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    for out in (tmp_path, tmp_path / "inner"):
        with pytest.raises(UserError, match=f"{out}: cannot be written"):
            claim(out)
    tmp_path.chmod(0o755)


def test_a_resume_removes_what_killed_runs_left_half_written(tmp_path: Path) -> None:
    left = [
        ".checkpoint.123.partial.pt",
        "training/.metrics.4.partial.json",
        "videos/a/.x.y.9.partial.mp4",
        ".a.7.partial",
        "model/.tmptSeHGx",
    ]
    kept = ["a.partial.json", ".a.partial.json", "videos/partial.mp4", "other/.lock", "other/inner/.x.1.partial.mp4"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    claim(tmp_path, resume=True)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(kept)


def test_files_are_found_in_folders_here_and_in_a_store(tmp_path: Path) -> None:
    store = UPath(f"memory://found-{uuid.uuid4().hex}")
    for root in (tmp_path / "here", store):
        for name in ("b.json", "a.json", "a.txt", "one/c.json", "one/two/d.json", "not.json/e.json"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")
    for root in (tmp_path / "here", store):
        found = {
            pattern: [path.as_posix().removeprefix(f"{root.as_posix()}/") for path in files.find_files(root, pattern)]
            for pattern in ("*.json", "*/*.json", "one/*", "**/*.json", "a.*", "a.json/*", "none/*", "**/a.txt/*")
        }
        assert found == {
            "*.json": ["a.json", "b.json", "not.json"],
            "*/*.json": ["not.json/e.json", "one/c.json"],
            "one/*": ["one/c.json", "one/two"],
            "**/*.json": ["a.json", "b.json", "not.json", "not.json/e.json", "one/c.json", "one/two/d.json"],
            "a.*": ["a.json", "a.txt"],
            "a.json/*": [],
            "none/*": [],
            "**/a.txt/*": [],
        }
    (tmp_path / "here" / "circle").symlink_to(tmp_path / "here", target_is_directory=True)
    assert len(files.find_files(tmp_path / "here", "**/*.json")) == 6
    assert len(files.find_files(tmp_path / "here", "circle/*.json")) == 3


@pytest.mark.parametrize("pattern", ["*", "*/*.json", "**/*.json"])
def test_a_folder_that_may_not_be_listed_is_not_an_empty_one(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut = tmp_path / "shut"
    shut.mkdir()
    scan = os.scandir

    def refuse(folder: Path) -> Any:
        if folder == shut:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    # Whoever runs the tests as root may list everything.
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"shut: no permission to read it .*; change its permissions"):
        files.find_files(shut if pattern == "*" else tmp_path, pattern)


def test_a_writer_that_has_just_begun_is_named(tmp_path: Path) -> None:
    code = (
        "import fcntl, os, sys, time; file = open('.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('locked', flush=True); time.sleep(0.2); file.write('process 7 here'); file.flush(); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as writer:
        assert writer.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="is being written by process 7 here"), locked(tmp_path):
            pass
        writer.stdin.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected an object, got \\[1\\]; copy it again"),
        ("{", "not valid JSON"),
        ('{"step": 1.5, "name": "x"}', "step is 1.5, expected a whole number; copy it again"),
        ('{"step": true, "name": "x"}', "step is True, expected a whole number"),
        ('{"step": 1}', "name is missing, expected a text"),
    ],
)
def test_an_object_has_its_keys(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with pytest.raises(UserError, match=r"state\.json: no such file"):
        files.read_object(path, "copy it again", step=int, name=str)
    path.write_text(text)
    with pytest.raises(UserError, match=rf"state\.json: {message}"):
        files.read_object(path, "copy it again", step=int, name=str)
    path.write_text('{"step": 1, "name": "x", "more": null}')
    assert files.read_object(path, "copy it again", step=int, name=str) == {"step": 1, "name": "x", "more": None}


def test_names_are_as_long_as_it_takes_to_tell_paths_apart() -> None:
    assert files.distinct_names([Path("/a/runs/one"), Path("/a/runs/two")]) == ["one", "two"]
    assert files.distinct_names([Path("/a/lapa/results"), Path("/a/scratch/results")]) == [
        "lapa/results",
        "scratch/results",
    ]
    assert files.distinct_names([Path("/a/lapa"), Path("/a/lapa")]) == ["lapa", "lapa"]
