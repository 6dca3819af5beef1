"""Files are whole or absent, and finished work is not overwritten by accident."""

import errno
from pathlib import Path

import pytest

from lapa import files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(OSError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


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
    with pytest.raises(ValueError, match="finished result; give another --out, or --overwrite"):
        files.claim_output(out, complete=True)
    files.claim_output(out, complete=False, resume=True)
    assert (out / "half").exists()
    files.claim_output(out, complete=True, overwrite=True)
    assert not any(out.iterdir())
    with pytest.raises(ValueError, match="exclude each other"):
        files.claim_output(out, complete=False, overwrite=True, resume=True)


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    for name, text in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / name).write_text(text)
    a, b, c = (files.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    assert len(a) == 16
