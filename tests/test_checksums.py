"""A flipped bit is refused: checksums of artifacts, of a journal's lines, and of a run's checkpoint."""

import json
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapa import cli
from lapa.checksums import SUMS, Journal, read_sums, verify, write_marker
from lapa.data.metadata import EXTRA, INFO, STATS
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.engine.checkpoint import RunState, load_checkpoint, random_state, save_checkpoint
from lapa.errors import UserError
from lapa.files import read_json
from lapa.latent.config import LatentModelConfig
from lapa.latent.model import LatentActionModel
from lapa.nn.weights import require_finite_weights

RECORDS = [{"settings": [1, 2.5]}, {"item": "a", "notes": {}}, {"item": "ü", "notes": {"x": 1}}, {"item": "c"}]


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def flips(content: bytes, count: int) -> list[bytes]:
    rng = random.Random(0)
    return [flipped(content, rng.randrange(len(content)), rng.randrange(8)) for _ in range(count)]


def folder(root: Path) -> Path:
    root.mkdir()
    (root / "weights").write_bytes(bytes(range(256)))
    (root / "inner").mkdir()
    (root / "inner" / "words").write_text("cup")
    write_marker(root, "config.json", {"a": 1}, ["weights", "inner/words"])
    return root


def test_the_list_is_that_of_sha256sum(tmp_path: Path) -> None:
    made = folder(tmp_path / "made")
    assert list(read_sums(made)) == ["config.json", "inner/words", "weights"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=made, check=True)


def test_each_changed_file_is_named_and_what_is_not_listed_is_not_checked(tmp_path: Path) -> None:
    made = folder(tmp_path / "made")
    verify(made, "copy it")
    (made / "notes.txt").write_text("mine")
    for name in read_sums(made):
        content = (made / name).read_bytes()
        (made / name).write_bytes(flipped(content, 0, 3))
        with pytest.raises(UserError, match=rf"{name}: damaged or changed, .*; copy it, or, .* delete its line there"):
            verify(made, "copy it")
        (made / name).unlink()
        with pytest.raises(UserError, match=rf"{name}: missing"):
            verify(made, "copy it")
        (made / name).write_bytes(content)
    (made / SUMS).unlink()
    (made / "weights").write_bytes(b"")
    verify(made, "copy it")


def test_a_damaged_list_is_refused_or_says_the_same(tmp_path: Path) -> None:
    made = folder(tmp_path / "made")
    content, told = (made / SUMS).read_bytes(), 0
    for changed in flips(content, 300):
        (made / SUMS).write_bytes(changed)
        try:
            verify(made, "copy it")
        except UserError:
            told += 1
    assert told > 250


def test_a_list_reads_no_file_outside_its_folder(tmp_path: Path) -> None:
    made = folder(tmp_path / "made")
    (tmp_path / "secret").write_text("x")
    (made / SUMS).write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(UserError, match="names no file inside"):
        verify(made, "copy it")


def test_a_journal_gives_its_lines_back_and_goes_on_behind_a_cut_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert list(journal) == []
    for record in RECORDS[:2]:
        journal.append(record)
    whole = journal.path.read_bytes()
    assert [json.loads(line)["crc"] for line in whole.splitlines()], "lines are JSON for other programs"
    journal.path.write_bytes(whole + b'{"item": "cut')
    again = Journal(journal.path)
    assert list(again) == RECORDS[:2]
    for record in RECORDS[2:]:
        again.append(record, sync=True)
    assert list(Journal(journal.path)) == RECORDS
    again.begin(RECORDS[:1])
    again.append(RECORDS[1])
    assert journal.path.read_bytes() == whole


def test_a_line_that_is_changed_dropped_doubled_or_moved_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.begin(RECORDS)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    for changed in ([0, 2, 3], [1, 2, 3], [0, 1, 1, 2, 3], [0, 2, 1, 3]):
        journal.path.write_bytes(b"".join(lines[number] for number in changed))
        with pytest.raises(UserError, match=r"journal\.jsonl: is damaged in line [12345]: .*--overwrite"):
            list(journal)
    journal.path.write_bytes(b"".join(lines[:3]) + b'{"item": "d"}\n')
    with pytest.raises(UserError, match="in line 4: it has no checksum, or is of an earlier version"):
        list(journal)


def test_no_flipped_bit_of_a_journal_is_read_as_something_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.begin(RECORDS)
    content = journal.path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            journal.path.write_bytes(flipped(content, place, bit))
            try:
                found = list(journal)
            except UserError:
                continue
            assert place == len(content) - 1 and found == RECORDS[:-1], "without its end, the last line is a cut one"


def test_weights_and_configs_with_a_flipped_bit_are_refused(tmp_path: Path) -> None:
    model = LatentActionModel(
        LatentModelConfig(image_size=32, patch_size=8, dim=32, spatial_depth=1, temporal_depth=1, heads=2)
    )
    model.save_pretrained(tmp_path / "lam")
    for name in ("model.safetensors", "config.json"):
        path = tmp_path / "lam" / name
        content = path.read_bytes()
        for changed in flips(content, 20):
            path.write_bytes(changed)
            with pytest.raises(UserError):
                LatentActionModel.from_pretrained(tmp_path / "lam")
        path.write_bytes(content)
    LatentActionModel.from_pretrained(tmp_path / "lam")


def run_state() -> RunState:
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    return RunState(model, None, optimizer, {"a": 1})


def restored(path: Path) -> list[Any]:
    run = run_state()
    torch.nn.init.zeros_(run.model.weight)
    step = load_checkpoint(path, run)
    state = run.optimizer.state_dict()
    moments = [tensor.tolist() for each in state["state"].values() for tensor in each.values()]
    return [step, run.model.weight.tolist(), moments, state["param_groups"], random_state()]


def test_no_flipped_bit_of_a_checkpoint_changes_what_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, run_state(), 3, [random_state()])
    expected, content = restored(path), path.read_bytes()
    for changed in flips(content, 200):
        path.write_bytes(changed)
        try:
            assert restored(path) == expected
        except UserError as error:
            assert "checkpoint.pt: " in str(error) and "--overwrite to start anew" in str(error)


def test_a_checkpoint_of_an_earlier_version_is_resumed_and_a_flipped_weight_in_it_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, run_state(), 3, [random_state()])
    expected = restored(path)
    state = torch.load(path, weights_only=True)
    torch.save(state, path)
    assert restored(path) == expected
    weights = path.read_bytes()
    place = weights.index(state["model"]["weight"].numpy().tobytes())
    path.write_bytes(flipped(weights, place + 3, 4))
    with pytest.raises(UserError, match=r"checkpoint\.pt: damaged, its checksum is wrong"):
        restored(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of noise, with actions."""
    root, rng = tmp_path_factory.mktemp("checked") / "dataset", np.random.default_rng(0)
    writer = DatasetWriter(root, fps=10, cameras={"front": (32, 32)}, action_names=["x", "gripper"])
    for number in range(3):
        actions = rng.normal(size=(8, 2)).astype(np.float32)
        writer.add_episode({"front": rng.integers(0, 256, (8, 32, 32, 3), np.uint8)}, f"task {number}", actions=actions)
    return writer.finish().root


def read(root: Path) -> list[Any]:
    opened = open_dataset(root)
    return [
        [(each, opened.actions(each.index).tolist()) for each in opened],
        opened.fps,
        opened.action_space,
        opened.tasks,
    ]


@pytest.mark.parametrize("kind", ["meta/info.json", "meta/tasks.parquet", "meta/episodes", "data"])
def test_a_flipped_bit_of_a_dataset_is_refused_when_it_is_read(dataset: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(dataset, tmp_path / "d")
    place = tmp_path / "d" / kind
    path = next(place.rglob("*.parquet")) if place.is_dir() else place
    for changed in flips(path.read_bytes(), 40):
        path.write_bytes(changed)
        with pytest.raises(UserError):
            read(tmp_path / "d")


def test_pages_of_a_table_have_checksums_of_their_own(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d" / SUMS).unlink()
    path = next((tmp_path / "d" / "data").rglob("*.parquet"))
    content = path.read_bytes()
    place = content.index(open_dataset(dataset).actions(0)[0].tobytes()[:4])
    path.write_bytes(flipped(content, place, 6))
    with pytest.raises(UserError, match=r"file-000\.parquet: cannot be read .*CRC"):
        read(tmp_path / "d")


def test_an_edited_declaration_of_actions_is_used_and_said(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d" / EXTRA).write_text(json.dumps({"action_space": {"binary": ["gripper"]}}))
    space = open_dataset(tmp_path / "d").action_space
    assert space is not None
    assert space.binary == (False, True)
    assert "lapa.json: edited by hand, or damaged" in " ".join(capsys.readouterr().err.split())


def checked(root: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit status and output of `lapa data check`."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["data", "check", str(root)])
    return int(exit_.value.code or 0), " ".join("".join(capsys.readouterr()).split())


def test_check_reads_everything_and_names_what_is_damaged(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    status, said = checked(dataset, capsys)
    assert status == 0
    assert "9 files compared with their SHA-256, 0 videos decoded, 3 episodes read: nothing damaged" in said
    shutil.copytree(dataset, tmp_path / "d")
    videos = sorted((tmp_path / "d" / "videos").rglob("*.mp4"))
    stats = tmp_path / "d" / STATS
    whole = {path: path.read_bytes() for path in (videos[1], stats)}
    for path, content in whole.items():
        path.write_bytes(flipped(content, 40, 0))
    status, said = checked(tmp_path / "d", capsys)
    assert status == 2
    assert f"damaged: {stats}; {videos[1]}; copy or write them again" in said
    for path, content in whole.items():
        path.write_bytes(content)
    assert checked(tmp_path / "d", capsys)[0] == 0
    videos[2].unlink()
    status, said = checked(tmp_path / "d", capsys)
    assert status == 2 and str(videos[2]) in said


def test_check_decodes_what_has_no_checksum(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d" / SUMS).unlink()
    status, said = checked(tmp_path / "d", capsys)
    assert status == 0
    assert "0 files compared with their SHA-256, 3 videos decoded, 3 episodes read: nothing damaged" in said
    videos = sorted((tmp_path / "d" / "videos").rglob("*.mp4"))
    shutil.copy(videos[0], tmp_path / "short.mp4")
    content = bytearray(videos[1].read_bytes())
    middle = content.index(b"mdat") + 1000
    content[middle : middle + 400] = bytes(400)
    videos[1].write_bytes(content)
    status, said = checked(tmp_path / "d", capsys)
    assert status == 2
    assert f"{videos[1]}" in said


def test_check_reads_a_source_in_place(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["data", "check", f"videos:{dataset / 'videos'},caption=lift the cup"])
    assert not exit_.value.code
    assert "3 episodes read: nothing damaged" in " ".join(capsys.readouterr().out.split())


def test_a_conversion_with_a_damaged_journal_is_not_resumed(tmp_path: Path) -> None:
    def writer(resume: bool) -> DatasetWriter:
        return DatasetWriter(tmp_path / "d", fps=10, cameras={"front": (16, 16)}, resume=resume)

    writing = writer(resume=False)
    for number in range(3):
        writing.add_episode({"front": np.full((2, 16, 16, 3), 50, np.uint8)}, "task", source=f"s{number}")
    journal = tmp_path / "d" / "meta" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1] + lines[3])
    with pytest.raises(UserError, match=r"journal\.jsonl: is damaged in line 3: .* one before it is missing"):
        writer(resume=True)
    journal.write_bytes(b"".join(lines[:3]))
    again = writer(resume=True)
    assert again.done_sources == {"s0", "s1"}
    journal.write_bytes(b"".join(lines[:2]))
    with pytest.raises(UserError, match="has lost an episode"):
        again.finish()
    assert not (tmp_path / "d" / INFO).exists()


@pytest.mark.parametrize(
    ("write", "read_again"),
    [
        (lambda path: path.write_text('{"step": 1}\nnull\n'), "line 2 is no object with step"),
        (lambda path: path.write_text('{"step": "1"}\n'), "line 1 is no object with step"),
        (lambda path: path.write_text("[" * 5000 + "\n"), "line 1 is not JSON"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, write: Callable[[Path], Any], read_again: str) -> None:
    from lapa.engine.metrics import MetricLog
    from lapa.engine.trackers import Tracker

    write(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=rf"metrics\.jsonl: {read_again}"):
        MetricLog(tmp_path, 1, Tracker(None, tmp_path, "run", {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_that_are_not_finite_are_refused_in_every_precision(dtype: torch.dtype) -> None:
    weights = {"empty": torch.zeros(0, 3).to(dtype), "scale": torch.ones(()).to(dtype), "count": torch.tensor(3)}
    require_finite_weights("model.safetensors", weights.items())
    for value in (float("nan"), float("inf"), -float("inf"))[: 1 if dtype == torch.float8_e4m3fn else 3]:
        wrong = torch.ones(3, 5)
        wrong[1, 4] = value
        with pytest.raises(UserError, match=r"model\.safetensors: wrong holds numbers that are not finite"):
            require_finite_weights("model.safetensors", {**weights, "wrong": wrong.to(dtype)}.items())


def test_a_latent_action_model_of_nan_is_refused(tmp_path: Path) -> None:
    model = LatentActionModel(
        LatentModelConfig(image_size=32, patch_size=8, dim=32, spatial_depth=1, temporal_depth=1, heads=2)
    )
    with torch.no_grad():
        model.from_latents.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors: from_latents\.weight holds numbers that are not finite"):
        LatentActionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_json_that_is_nested_deep_is_named(tmp_path: Path, start: str, end: str) -> None:
    path = tmp_path / "config.json"
    for depth in (900, 200_000):
        path.write_text(start * depth + "1" + end * depth)
        with pytest.raises(UserError, match=r"config\.json: not valid"):
            read_json(path)
    path.write_text(start * 50 + "1" + end * 50)
    read_json(path)


@pytest.mark.parametrize("body", [b"[1", b'{"a": ', b"[" * 100_000, b"null, "])
def test_a_line_of_a_journal_whose_checksum_fits_may_still_be_no_json(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(body + b', "crc": "%08x"}\n' % zlib.crc32(body))
    with pytest.raises(UserError, match=r"journal\.jsonl: is damaged in line 1: it is not JSON"):
        list(Journal(tmp_path / "journal.jsonl"))
