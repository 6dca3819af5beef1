"""A study is carried in small parts and becomes a study again: whole, checked, and never over what is there."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lapa.study import bfloat, pack, unpack
from lapa.study.pack import PackConfig
from lapa.study.unpack import UnpackConfig

PART = 0.05


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study with one of each kind of artifact: finished and unfinished, with and without weights."""
    root = tmp_path / "study"
    torch.manual_seed(0)
    large, small = torch.randn(256, 128), torch.randn(8, 32)
    files = {
        "study.json": '{"preset": "cpu"}',
        "seconds.jsonl": '{"key": "a", "seconds": 1.0}\n{"key": "a", "seconds": 1.0}\n',
        "results/in-domain-2-lapa-0.json": '{"arm": "lapa"}',
        "results/in-domain-2-lapa-0.png": "a picture",
        "results/.in-domain-2-lapa-1.7.partial.json": "half",
        "results/page.html": "made by report",
        "artifacts/latent-action-model-aa/config.json": '{"model": {}}',
        "artifacts/latent-action-model-aa/vision/config.json": '{"model_type": "dinov2"}',
        "artifacts/policy-lapa-bb/config.json": '{"policy": {}}',
        "artifacts/policy-lapa-bb/training/metrics.jsonl": '{"step": 1}\n',
        "artifacts/policy-lapa-bb/training/step-1/state.safetensors": "checkpoint" * 100,
        "artifacts/policy-vpt-cc/training/metrics.jsonl": '{"step": 1}\n',
        "artifacts/labels-dd/manifest.json": "{}",
        "artifacts/labels-dd/episodes-0-1.parquet": "codes",
        "artifacts/videos-ee/meta/info.json": "{}",
        "artifacts/videos-ee/videos/a.mp4": "x" * 1000,
        "artifacts/rollouts-lapa-ff/config.json": "{}",
        "artifacts/rollouts-lapa-ff/episodes.jsonl": "",
        "artifacts/.aa.lock": "",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    save_file({"w": large, "codebook": small}, root / "artifacts/latent-action-model-aa/model.safetensors")
    save_file({"w": large}, root / "artifacts/latent-action-model-aa/vision/model.safetensors")
    (root / "artifacts/policy-lapa-bb/model").mkdir()
    whole = {"w": large, "norm": small, "half": large.to(torch.bfloat16), "tokens": torch.arange(40000)}
    save_file(whole, root / "artifacts/policy-lapa-bb/model/model.safetensors", metadata={"format": "pt"})
    return root


def packed(study: Path, out: Path, **options: object) -> Path:
    pack.run(PackConfig(study, out, **{"part_mib": PART, **options}))  # type: ignore[arg-type]
    return out


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def own_pack(out: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """A pack made by hand, right in all but what its members are."""
    stream = io.BytesIO()
    with tarfile.open(mode="w|", fileobj=stream) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    out.mkdir(parents=True)
    (out / "part-000").write_bytes(stream.getvalue())
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    part = {"name": "part-000", "bytes": len(stream.getvalue()), "sha256": digest}
    (out / "index.json").write_text(json.dumps({"format": 1, "files": len(members), "parts": [part]}))
    return out


def test_results_come_back_as_they_were_and_nothing_else(study: Path, tmp_path: Path) -> None:
    unpack.run(UnpackConfig(packed(study, tmp_path / "pack"), tmp_path / "copy"))
    names = ["study.json", "seconds.jsonl", "results/in-domain-2-lapa-0.json", "results/in-domain-2-lapa-0.png"]
    assert contents(tmp_path / "copy") == {name: (study / name).read_bytes() for name in names}
    left_out = {item["path"]: item for item in json.loads((tmp_path / "pack/index.json").read_text())["left_out"]}
    assert left_out["results/page.html"]["why"] == "neither JSON nor PNG"
    assert left_out["artifacts/labels-dd"] == {
        "path": "artifacts/labels-dd",
        "why": "given with --weights",
        "bytes": len("{}codes"),
    }


def test_finished_artifacts_come_back_in_several_parts(study: Path, tmp_path: Path) -> None:
    out = packed(study, tmp_path / "pack", weights=True)
    index = json.loads((out / "index.json").read_text())
    sizes = [path.stat().st_size for path in sorted(out.glob("part-*"))]
    assert len(sizes) > 5 and max(sizes) == int(PART * 2**20) and len(set(sizes[:-1])) == 1
    left_out = {item["path"]: item["why"] for item in index["left_out"]}
    assert left_out["artifacts/policy-vpt-cc"] == left_out["artifacts/rollouts-lapa-ff"] == "unfinished"
    assert left_out["artifacts/videos-ee"].startswith("a dataset")
    assert left_out["artifacts/policy-lapa-bb/training"].startswith("checkpoints")

    unpack.run(UnpackConfig(out, tmp_path / "copy"))
    before, after = contents(study / "artifacts"), contents(tmp_path / "copy" / "artifacts")
    wanted = {name for name in before if name.startswith(("latent", "policy-lapa", "labels")) and "step-1" not in name}
    assert set(after) == wanted
    changed = {name for name in after if after[name] != before[name]}
    # The latent action model is as it was: labels carry its fingerprint.
    assert changed == {"policy-lapa-bb/model/model.safetensors"}


def test_weights_are_rounded_by_less_than_bfloat16_may_and_small_tensors_not_at_all(
    study: Path, tmp_path: Path
) -> None:
    name = "artifacts/policy-lapa-bb/model/model.safetensors"
    unpack.run(UnpackConfig(packed(study, tmp_path / "pack", weights=True), tmp_path / "copy"))
    before, after = load_file(study / name), load_file(tmp_path / "copy" / name)
    assert {key: (v.dtype, v.shape) for key, v in before.items()} == {
        key: (v.dtype, v.shape) for key, v in after.items()
    }
    for exact in ("norm", "half", "tokens"):
        assert torch.equal(before[exact], after[exact])
    assert torch.equal(after["w"], before["w"].to(torch.bfloat16).float()) and not torch.equal(after["w"], before["w"])
    assert ((after["w"] - before["w"]).abs() <= before["w"].abs() / 256).all()
    assert (study / name).stat().st_size == (tmp_path / "copy" / name).stat().st_size

    unpack.run(UnpackConfig(packed(study, tmp_path / "full", weights=True, full=True), tmp_path / "exact"))
    assert (tmp_path / "exact" / name).read_bytes() == (study / name).read_bytes()


def test_packing_again_what_was_unpacked_gives_the_same_bytes(study: Path, tmp_path: Path) -> None:
    first = packed(study, tmp_path / "first", weights=True)
    unpack.run(UnpackConfig(first, tmp_path / "copy"))
    again = packed(tmp_path / "copy", tmp_path / "again", weights=True)
    parts = {name: content for name, content in contents(first).items() if name != "index.json"}
    assert parts == {name: content for name, content in contents(again).items() if name != "index.json"}


def test_slices_are_merged_and_unpacking_twice_changes_nothing(study: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "results").mkdir(parents=True)
    (other / "results/in-domain-2-scratch-0.json").write_text('{"arm": "scratch"}')
    (other / "seconds.jsonl").write_text('{"key": "a", "seconds": 1.0}\n{"key": "b", "seconds": 2.0}\n')
    (other / "study.json").write_text('{"preset": "cpu"}')
    one, two = packed(study, tmp_path / "one", weights=True), packed(other, tmp_path / "two")
    for part in (one, two, one, two):
        unpack.run(UnpackConfig(part, tmp_path / "merged"))
    merged = tmp_path / "merged"
    assert {path.name for path in (merged / "results").glob("*.json")} == {
        "in-domain-2-lapa-0.json",
        "in-domain-2-scratch-0.json",
    }
    # Each line as often as the slice that has most of it.
    lines = (merged / "seconds.jsonl").read_text().splitlines()
    assert sorted(lines) == ['{"key": "a", "seconds": 1.0}'] * 2 + ['{"key": "b", "seconds": 2.0}']


def test_results_that_differ_are_refused_before_anything_is_written(study: Path, tmp_path: Path) -> None:
    out = packed(study, tmp_path / "pack", weights=True)
    for name, message in (("results/in-domain-2-lapa-0.png", "differs from"), ("study.json", "other settings")):
        there = tmp_path / "there" / message
        (there / name).parent.mkdir(parents=True)
        (there / name).write_text("something else")
        with pytest.raises(ValueError, match=message):
            unpack.run(UnpackConfig(out, there))
        assert list(contents(there)) == [name]


def test_artifacts_that_are_there_stay_as_they_are(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = packed(study, tmp_path / "pack", weights=True)
    unpack.run(UnpackConfig(out, study))
    assert load_file(study / "artifacts/policy-lapa-bb/model/model.safetensors")["w"].std() > 0.9
    begun = tmp_path / "begun"
    (begun / "artifacts/labels-dd").mkdir(parents=True)
    unpack.run(UnpackConfig(out, begun))
    assert not any((begun / "artifacts/labels-dd").iterdir())
    assert "remove them to take the packed ones: labels-dd" in capsys.readouterr().err.replace("\n", " ")


def test_missing_and_corrupt_parts_are_named(study: Path, tmp_path: Path) -> None:
    out = packed(study, tmp_path / "pack", weights=True)
    spoilt = tmp_path / "spoilt"
    shutil.copytree(out, spoilt)
    (spoilt / "part-001").unlink()
    (spoilt / "part-003").write_bytes(b"short")
    with pytest.raises(ValueError, match="part-001 is missing; part-003 has 5 bytes instead of"):
        unpack.run(UnpackConfig(spoilt, tmp_path / "copy"))
    shutil.copytree(out, spoilt, dirs_exist_ok=True)
    content = bytearray((spoilt / "part-002").read_bytes())
    content[1000] ^= 1
    (spoilt / "part-002").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="part-002: is not what was packed"):
        unpack.run(UnpackConfig(spoilt, tmp_path / "copy"))
    (spoilt / "index.json").unlink()
    with pytest.raises(ValueError, match=r"no whole pack \(no index.json\)"):
        unpack.run(UnpackConfig(spoilt, tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/tmp/evil",
        "results/../../evil",
        "results/../study.json",
        "elsewhere/evil",
        "artifacts/loose",
        "results",
    ],
)
def test_members_that_would_lie_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    out = own_pack(tmp_path / "pack", {"results/good.json": b"{}", name: b"evil"})
    with pytest.raises(ValueError, match="nothing was written"):
        unpack.run(UnpackConfig(out, tmp_path / "deep" / "copy"))
    assert not (tmp_path / "deep").exists() and not Path("/tmp/evil").exists()


def test_links_and_ways_through_links_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("results/link.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(ValueError, match="no file of a study"):
        unpack.run(UnpackConfig(own_pack(tmp_path / "one", {"results/link.json": link}), tmp_path / "copy"))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "results").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="would be written outside"):
        unpack.run(UnpackConfig(own_pack(tmp_path / "two", {"results/good.json": b"{}"}), tmp_path / "copy"))
    assert not (tmp_path / "good.json").exists()


def test_a_pack_that_lacks_files_is_refused(tmp_path: Path) -> None:
    out = own_pack(tmp_path / "pack", {"results/good.json": b"{}"})
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "files": 2}))
    with pytest.raises(ValueError, match=r"holds 1 files, index\.json says 2"):
        unpack.run(UnpackConfig(out, tmp_path / "copy"))
    (out / "index.json").write_text(json.dumps({**index, "format": 2}))
    with pytest.raises(ValueError, match="not the index of a pack that this version reads"):
        unpack.run(UnpackConfig(out, tmp_path / "copy"))


def test_a_killed_unpacking_leaves_no_half_artifact_and_goes_on(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = packed(study, tmp_path / "pack", weights=True)
    copy = unpack._copy

    def dies(blocks: object, path: Path) -> None:
        if path.name == "model.safetensors" and "policy" in str(path):
            raise KeyboardInterrupt
        copy(blocks, path)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unpack, "_copy", dies)
        unpack.run(UnpackConfig(out, tmp_path / "copy"))
    assert sorted(path.name for path in (tmp_path / "copy/artifacts").iterdir()) == [
        "labels-dd",
        "latent-action-model-aa",
    ]
    unpack.run(UnpackConfig(out, tmp_path / "copy"))
    assert (tmp_path / "copy/artifacts/policy-lapa-bb/config.json").exists()


def test_mistakes_are_named_before_anything_is_written(study: Path, tmp_path: Path) -> None:
    for config, message in (
        (PackConfig(tmp_path / "none", tmp_path / "pack"), "no study"),
        (PackConfig(study, study / "results" / "pack"), "lies in"),
        (PackConfig(study, study), "is or contains"),
        (PackConfig(study, tmp_path / "pack", part_mib=0), "--part-mib"),
        (PackConfig(study, tmp_path / "pack", datasets=True), "--datasets: goes with --weights"),
    ):
        with pytest.raises(ValueError, match=message):
            pack.run(config)
        assert not (tmp_path / "pack").exists() and not (study / "results" / "pack").exists()
    packed(study, tmp_path / "pack")
    with pytest.raises(ValueError, match="--overwrite"):
        packed(study, tmp_path / "pack")
    (study / "artifacts/policy-lapa-bb/model/model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        packed(study, tmp_path / "other", weights=True)


def test_narrowing_keeps_what_is_not_finite_and_refuses_what_ends_early() -> None:
    rng = np.random.default_rng(0)
    numbers = torch.from_numpy(rng.normal(size=bfloat.LEAST_NUMBERS).astype(np.float32))
    numbers[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    from safetensors.torch import load, save

    content = save({"w": numbers, "few": numbers[3:100].clone()})
    narrowed = b"".join(bfloat.narrow(io.BytesIO(content)))
    assert len(narrowed) == bfloat.narrowed_size(io.BytesIO(content)) == len(content) - 2 * bfloat.LEAST_NUMBERS
    after = load(b"".join(bfloat.widen(io.BytesIO(narrowed))))
    assert torch.isnan(after["w"][0]) and after["w"][1:3].tolist() == [float("inf"), -float("inf")]
    assert torch.equal(after["few"], numbers[3:100])
    for broken in (content[:-1], content[:4], b"\xff" * 8 + content[8:], content[:8] + b"x" + content[9:]):
        with pytest.raises(ValueError, match=r"safetensors file \("):
            b"".join(bfloat.narrow(io.BytesIO(broken)))


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    study = tmp_path / "study"
    (study / "artifacts/policy-lapa-bb").mkdir(parents=True)
    (study / "artifacts/policy-lapa-bb/config.json").write_text('{"policy": {}}')
    save_file({"w": torch.zeros(8, 2**20)}, study / "artifacts/policy-lapa-bb/model.safetensors")
    tracemalloc.start()
    packed(study, tmp_path / "pack", weights=True, part_mib=1)
    unpack.run(UnpackConfig(tmp_path / "pack", tmp_path / "copy"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list((tmp_path / "pack").glob("part-*"))) == 17
    assert peak < 12 * 2**20 < (study / "artifacts/policy-lapa-bb/model.safetensors").stat().st_size / 2
