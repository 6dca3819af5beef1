"""`lapa view`: the data of the page, the server, the export, and the page in a headless Chromium."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs lapa-vla[serve]")
pytest.importorskip("websockets", reason="needs lapa-vla[serve]")

import lapa
from browser import Browser, browser
from fake_hub import FakeHub, Repo
from lapa import UserError, cli
from lapa.checksums import Journal
from lapa.data.labels import EpisodeLabels, Manifest, shard_path, write_manifest, write_shard
from lapa.data.lerobot import LeRobotDataset
from lapa.data.video import probe
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.view import dataset as view_dataset
from lapa.view.config import ViewConfig
from lapa.view.dataset import DatasetPages
from lapa.view.opening import kind_at, open_pages
from lapa.view.recording import record
from lapa.view.server import _announce, running
from lapa.view.survey import Readers, Survey, measure

HTML = "<img src=x onerror='window.bad=1'>"
FROZEN = Path(__file__).parent / "golden" / "frozen"
EPISODES, FRAMES, HORIZON, CODEBOOK = 12, 20, 4, 5


def opened(path: Path | str, data: Path | str | None = None) -> DatasetPages:
    pages = open_pages(ViewConfig(str(path), None if data is None else str(data)))
    assert isinstance(pages, DatasetPages)
    return pages


def made_labels(folder: Path, dataset: LeRobotDataset) -> None:
    """Labels of two positions: the first code of a frame is its episode's direction, the second counts frames."""
    folder.mkdir(parents=True)
    labels = {}
    for episode in range(len(dataset)):
        frames_T = np.arange(FRAMES - HORIZON)
        codes_TL = np.stack([np.full(len(frames_T), episode % 4), frames_T // HORIZON % CODEBOOK], axis=1)
        labels[episode] = EpisodeLabels(frames_T, codes_TL)
    write_shard(shard_path(folder, 0, len(dataset) - 1), labels)
    rows = len(dataset) * (FRAMES - HORIZON)
    usage = [[0.0] * CODEBOOK] * 2
    figures = (HORIZON / dataset.fps, HORIZON, 2, CODEBOOK, rows, len(dataset), 0, usage)
    write_manifest(folder, Manifest("lam", dataset.fingerprint, dataset.cameras[0], *figures))


@pytest.fixture(scope="module", autouse=True)
def kept_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a survey keeps lies in a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    """Twelve made-up episodes with actions, states and labels; one instruction is HTML."""
    root = tmp_path_factory.mktemp("view") / "squares"
    write_synthetic_dataset(root, episodes=EPISODES, frames=FRAMES, actions=True)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    tasks = [[HTML], *table["tasks"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("tasks"), "tasks", pa.array(tasks)), path)
    (root / "SHA256SUMS").unlink()
    made = LeRobotDataset(root)
    made_labels(root / "labels" / "lam", made)
    return made


@pytest.fixture(scope="module")
def labels(dataset: LeRobotDataset) -> Path:
    return dataset.root / "labels" / "lam"


@pytest.fixture(scope="module")
def pages(labels: Path) -> Iterator[DatasetPages]:
    made = opened(labels)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_episodes_are_listed_in_pages(pages: DatasetPages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_dataset, "PAGE", 5)
    assert pages.json("about")["pages"] == 3
    listed = [pages.json(f"episodes-{page}") for page in range(3)]
    assert [index for page in listed for index in page["index"]] == list(range(EPISODES))
    texts = [page["texts"][number] for page in listed for number in page["instruction"]]
    assert texts == [episode.instruction for episode in pages.dataset]
    with pytest.raises(KeyError):
        pages.json("episodes-3")


def test_an_episode_has_its_actions_states_and_codes(pages: DatasetPages) -> None:
    found = pages.json("episode-7")
    np.testing.assert_allclose(found["actions"], pages.dataset.actions(7), rtol=1e-3)
    np.testing.assert_allclose(found["states"], pages.dataset.states(7), rtol=1e-3)
    codes_TP = np.array(found["codes"])
    assert found["code_frames"] == list(range(FRAMES - HORIZON)) and codes_TP.shape == (FRAMES - HORIZON, 3)
    assert set(codes_TP[:, 0]) == {7 % 4}
    whole = pages.json("about")["labels"]["codes"][2]
    assert [whole[number] for number in codes_TP[:, 2]] == [f"{one}-{two}" for one, two in codes_TP[:, :2].tolist()]


def test_a_code_is_found_wherever_it_occurs(pages: DatasetPages) -> None:
    about, found = pages.json("about")["labels"], pages.json("code-0-3")
    assert (found["rows"], found["episodes"]) == (3 * (FRAMES - HORIZON), 3)
    assert sorted(clip["episode"] for clip in found["clips"]) == [3, 7, 11]
    assert about["usage"][0] == [0.25, 0.25, 0.25, 0.25, 0.0]
    for clip in found["clips"]:
        assert clip["end"] - clip["start"] == pytest.approx(HORIZON / pages.dataset.fps)
    expected_A = np.concatenate([pages.dataset.actions(i)[: FRAMES - HORIZON] for i in (3, 7, 11)]).mean(axis=0)
    np.testing.assert_allclose([each["value"] for each in found["actions"]], expected_A, rtol=1e-3, atol=1e-6)
    clip, scores = found["nearest"], pages.dataset.actions(found["nearest"]["episode"])[found["nearest"]["frame"]]
    np.testing.assert_allclose([each["value"] for each in clip["actions"]], scores, rtol=1e-3, atol=1e-6)
    assert pages.json("code-0-4") == {"rows": 0, "episodes": 0, "clips": []}


def test_transitions_are_counted_one_horizon_later(pages: DatasetPages) -> None:
    first, second, _ = pages.json("about")["labels"]["transitions"]
    expected = np.zeros((CODEBOOK, CODEBOOK), int)
    for episode in range(EPISODES):
        _, codes_TL = pages.labels.codes(episode)
        for now, later in zip(codes_TL[:-HORIZON, 1], codes_TL[HORIZON:, 1], strict=True):
            expected[now, later] += 1
    assert second == expected.tolist() and expected.sum() == EPISODES * (FRAMES - 2 * HORIZON)
    assert np.array(first).sum() == np.trace(first) == expected.sum()


def test_labels_without_a_row_are_shown(dataset: LeRobotDataset, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    none = EpisodeLabels(np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
    write_shard(shard_path(tmp_path / "none", 0, EPISODES - 1), dict.fromkeys(range(EPISODES), none))
    manifest = Manifest(
        "lam", dataset.fingerprint, "front", 9.0, 90, 2, CODEBOOK, 0, EPISODES, EPISODES, [[0.0] * 5] * 2
    )
    write_manifest(tmp_path / "none", manifest)
    pages = opened(tmp_path / "none", dataset.root)
    assert {name: pages.json(name) for name in pages.names()}["code-1-0"]["rows"] == 0
    pages.close()


def test_labels_past_the_end_of_an_episode_are_one_line(dataset: LeRobotDataset, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    write_shard(shard_path(folder, 0, 0), {0: EpisodeLabels(np.array([FRAMES]), np.zeros((1, 2), np.int64))})
    write_manifest(folder, Manifest("lam", dataset.fingerprint, "front", 0.4, 4, 2, 5, 1, 1, 0, [[0.0] * 5] * 2))
    pages = opened(folder, dataset.root)
    with pytest.raises(UserError, match="long: has labels past the end of an episode; run `lapa label --overwrite`"):
        pages.json("about")
    pages.close()


def test_labels_of_more_codes_than_a_page_shows_are_refused(dataset: LeRobotDataset, tmp_path: Path) -> None:
    sizes = (0.4, 4, 1024, 2048, 0, 0, 0)
    write_manifest(tmp_path, Manifest("lam", dataset.fingerprint, "front", *sizes, []))
    with pytest.raises(UserError, match="has 1024 codes of 2048 values, more than the 1,048,576"):
        opened(tmp_path, dataset.root)


def test_motion_cuts_and_still_cameras_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    scenes[1] //= 3
    writer = lapa.DatasetWriter(tmp_path / "made", fps=10, cameras={"front": (64, 64), "wrist": (64, 64)})
    for cut in (False, True):
        front = [scenes[int(cut and at >= 15)] for at in range(30)]
        writer.add_episode({"front": front, "wrist": [scenes[0]] * 30}, "look")
    pages = DatasetPages(writer.finish())
    assert pages.json("motion-1")["cuts"] == [15] and pages.json("motion-0")["cuts"] == []
    assert [pages.json(f"motion-{episode}")["still"] for episode in (0, 1)] == [[0, 1], [1]]
    pages.survey.wait()
    rows = {row[0]: row for row in pages.json("survey-0")["rows"]}
    assert [rows[episode][2:5] for episode in (0, 1)] == [[0, [0, 1], []], [1, [1], []]]
    assert rows[0][1] < 0.001 < rows[1][1]
    pages.close()


def moving(seed: int, frames: int = 30, frozen: range = range(0)) -> list[np.ndarray]:
    """A square that moves over a background of its own; in the frames of `frozen` the image stays as it is."""
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 128, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    images = []
    for at in range(frames):
        image = background.copy()
        image[20:36, 2 + at : 18 + at] = 255
        images.append(images[-1] if images and at in frozen else image)
    return images


def test_duplicates_and_frozen_cameras_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = lapa.DatasetWriter(
        tmp_path / "made", fps=10, cameras={"front": (64, 64), "wrist": (64, 64)}, action_names=["right", "down"]
    )
    rng = np.random.default_rng(0)
    drive = rng.normal(size=(30, 2)).astype(np.float32)
    stuck = moving(4, frozen=range(10, 25))
    for front, wrist, actions_TA, text in [
        (moving(1), moving(2), drive, "push"),
        (moving(3), moving(2), drive, "push"),
        (moving(3), moving(2), drive, "pull"),
        (moving(1), stuck, drive[::-1], "push"),
        (moving(5), moving(5), 2 * drive, "push"),
        ([image // 4 * 4 + 2 for image in moving(5)], moving(5), 2.001 * drive, "push"),
    ]:
        writer.add_episode({"front": front, "wrist": wrist}, text, actions=actions_TA)
    pages = DatasetPages(writer.finish())
    pages.survey.wait()
    assert [row[4] for row in pages.json("survey-0")["rows"]] == [[], [], [], [1], [], []]
    groups = [
        {"why": "the same actions", "episodes": [0, 1]},
        {"why": "almost the same frames", "episodes": [4, 5]},
    ]
    assert pages.json("duplicates") == {"groups": groups, "not_compared": 0}
    assert [pages.json(f"motion-{episode}")["frozen"] for episode in (2, 3)] == [[], [1]]
    monkeypatch.setattr("lapa.view.survey.COMPARED", 1)
    assert pages.json("duplicates") == {"groups": groups[:1], "not_compared": 2}
    pages.close()


def test_few_images_are_in_memory_at_once(dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked, read = measure(dataset, 1, ["front"]), [], LeRobotDataset.frames

    def frames(dataset: LeRobotDataset, episode: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        asked.append(len(frame_indices))
        return read(dataset, episode, frame_indices, camera)

    monkeypatch.setattr(LeRobotDataset, "frames", frames)
    monkeypatch.setattr("lapa.view.survey.MOST_BYTES", 8 * 3 * math.prod(dataset.image_shape("front")))
    assert measure(dataset, 1, ["front"]) == whole and asked == [8, 8, 4]


def test_a_survey_that_ends_with_an_error_is_not_waited_for(
    dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(dataset: LeRobotDataset, episode: int, cameras: Sequence[str]) -> dict[str, Any]:
        raise RuntimeError("no decoder")

    monkeypatch.setattr("lapa.view.survey.measure", fail)
    survey = Survey(Readers(dataset), [0, 1], ["broken"])
    with pytest.raises(RuntimeError, match="no decoder"):
        survey.wait()
    assert survey.since(0) == {"rows": [], "measured": 0, "of": 2, "error": "RuntimeError: no decoder"}


def test_a_survey_goes_on_where_nothing_can_be_kept(dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(journal: Journal, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    survey = Survey(Readers(dataset), [0, 1, 2], dataset.cameras)
    survey.wait()
    found = survey.since(0)
    assert (found["measured"], found["error"]) == (3, None)


def test_a_survey_goes_on_where_another_one_ended(dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measured_as(dataset: LeRobotDataset, episode: int, cameras: Sequence[str]) -> dict[str, Any]:
        measured.append(episode)
        return {"episode": episode, "motion": 0.0, "cuts": 0, "still": [], "frozen": []}

    def run(episodes: Sequence[int]) -> list[int]:
        measured.clear()
        survey = Survey(Readers(dataset), episodes, ["another"])
        survey.wait()
        survey.close()
        assert sorted(row[0] for row in survey.since(0)["rows"]) == list(episodes)
        return measured

    monkeypatch.setattr("lapa.view.survey.measure", measured_as)
    assert run(range(5)) == [0, 1, 2, 3, 4]
    assert run(range(8)) == [5, 6, 7]
    assert run([2, 6]) == []
    for kept in Path(os.environ["XDG_CACHE_HOME"]).rglob("episodes.jsonl"):
        kept.write_bytes(kept.read_bytes().replace(b'"cuts": 0', b'"cuts": 1', 1))
    assert run([2, 6]) == [2, 6]


def test_a_slow_episode_holds_up_no_other(pages: DatasetPages, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on = threading.Event(), threading.Event()
    read = LeRobotDataset.actions

    def actions(dataset: LeRobotDataset, episode: int) -> np.ndarray:
        if episode == 0:
            reached.set()
            assert go_on.wait(60)
        return read(dataset, episode)

    monkeypatch.setattr(LeRobotDataset, "actions", actions)
    slow = threading.Thread(target=pages.json, args=("episode-0",))
    slow.start()
    assert reached.wait(60) and pages.json("episode-1")["index"] == 1 and slow.is_alive()
    go_on.set()
    slow.join()


@pytest.mark.parametrize("name", ["episode-12", "episode--1", "episode", "code-0-5", "code-3-0", "code-0", "about-1",
                                  "../about", "_rows", "episode-1-2", "motion-99", "video", ""])  # fmt: skip
def test_no_other_names_are_known(pages: DatasetPages, name: str) -> None:
    with pytest.raises(KeyError):
        pages.json(name)


def test_nothing_else_is_served(labels: Path, dataset: LeRobotDataset) -> None:
    with running(labels) as url:
        status, video = get(f"{url}/files/3-0.mp4")
        assert status == 200 and video == dataset.video_path(3).read_bytes()
        assert get(f"{url}/files/3-0.mp4", Range="bytes=100-199") == (206, video[100:200])
        assert json.loads(get(f"{url}/data/about.json")[1])["episodes"] == EPISODES
        address = urlsplit(url).netloc
        for path in ("/files/12-0.mp4", "/files/0-1.mp4", "/data/../meta/info.json", "/data/%2e%2e%2finfo.json",
                     "/meta/info.json", "/files/..%2f..%2f0-0.mp4", "//etc/passwd", "/data/about"):  # fmt: skip
            # urllib would normalise a path.
            connection = http.client.HTTPConnection(address, timeout=60)
            connection.request("GET", path)
            assert connection.getresponse().status == 404, path
            connection.close()
        assert get(f"{url}/data/about.json", Host="evil.example")[0] == 403
        assert get(f"{url}/data/about.json", Origin="https://evil.example")[0] == 403


def test_a_mistake_of_ours_is_no_unknown_name(dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def about(pages: DatasetPages) -> dict[str, Any]:
        raise KeyError("name")

    monkeypatch.setattr(DatasetPages, "_about", about)
    with running(dataset.root) as url:
        assert get(f"{url}/data/about.json")[0] == 500
        assert get(f"{url}/data/other.json")[0] == 404


def test_a_damaged_episode_is_one_line(dataset: LeRobotDataset, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(dataset.root, root)
    LeRobotDataset(root).video_path(2).write_bytes(b"no video")
    with running(root) as url:
        for name in ("data/episode-2.json", "files/2-0.mp4"):
            status, text = get(f"{url}/{name}")
            assert status == 422 and text.startswith(b"error: ") and text.count(b"\n") == 0
        assert get(f"{url}/data/episode-3.json")[0] == 200


def test_a_source_in_place_is_shown_as_encoded_video(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for clip in ("one", "two"):
        (tmp_path / "frames" / clip).mkdir(parents=True)
        for at in range(6):
            image = Image.fromarray(rng.integers(0, 256, (61, 1001, 3), dtype=np.uint8))
            image.save(tmp_path / "frames" / clip / f"{at:04d}.jpg")
    pages = opened(f"frames:{tmp_path / 'frames'},fps=5,caption=look")
    file = pages.file("1-0.mp4")
    info = probe(file)
    assert (info.num_frames, info.fps, max(info.width, info.height)) == (6, 5.0, view_dataset.SIDE)
    assert pages.json("episode-1")["videos"] == [{"camera": 0, "start": 0.0, "end": 1.2}]
    pages.close()
    assert not file.exists()


def test_what_cannot_be_shown_is_one_line(labels: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="neither a latent action model nor a policy"):
        opened(tmp_path / "odd")
    with pytest.raises(UserError, match="dataset does not take --data; leave it out"):
        opened(FROZEN / "dataset", FROZEN / "dataset")
    with pytest.raises(UserError, match="not a dataset"):
        opened(tmp_path)
    moved = tmp_path / "away" / "moved"
    shutil.copytree(labels, moved)
    with pytest.raises(UserError, match="give it: --data DATASET"):
        opened(moved)
    with pytest.raises(UserError, match="labels another dataset"):
        opened(moved, FROZEN / "dataset")


def test_labels_are_opened_at_a_url(labels: Path, dataset: LeRobotDataset) -> None:
    there = fsspec.filesystem("memory")
    there.put(str(dataset.root), "/lapa-view/squares", recursive=True)
    pages = opened("memory://lapa-view/squares/labels/lam")
    assert pages.labels is not None and pages.json("code-0-3")["rows"] == 3 * (FRAMES - HORIZON)
    pages.close()
    pages = opened("memory://lapa-view/squares/labels/lam", dataset.root)
    assert len(pages.dataset) == EPISODES
    pages.close()
    there.rm("/lapa-view", recursive=True)


def test_what_is_on_the_hub_is_known_by_its_marker(
    labels: Path, dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with FakeHub() as hub:
        hub.used(monkeypatch, tmp_path)
        for repo_type, name, folder in (
            ("dataset", "codes", labels),
            ("dataset", "videos", dataset.root),
            ("model", "lam", FROZEN / "lam"),
            ("model", "policy", FROZEN / "policy-bins"),
        ):
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            repo = hub.repos[repo_type, f"ann/{name}"] = Repo()
            repo.commits["0" * 40] = {name: path.read_bytes() for name, path in files.items()}
        kinds = [kind_at(f"ann/{name}") for name in ("codes", "videos", "lam", "policy")]
        assert kinds == ["labels", "dataset", "lam", "policy"]
        pages = opened("ann/codes", "ann/videos")
        assert pages.json("code-0-3")["rows"] == 3 * (FRAMES - HORIZON)
        pages.close()
        for name in ("lam", "policy"):
            with contextlib.closing(open_pages(ViewConfig(f"ann/{name}"))) as model:
                assert model.json("about")["examples"] == []
        with pytest.raises(UserError, match="ann/none: neither a folder here nor a model on the hub"):
            kind_at("ann/none")


def export(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(["view", *options])
    assert exit.value.code == 0
    return capsys.readouterr().err


def test_an_export_has_the_episodes_it_names(labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = export(capsys, str(labels), "--export", str(tmp_path / "page"), "--limit", "3")
    assert f"3 of {EPISODES} episodes, spread over the dataset; --limit takes more" in told
    files = {path.relative_to(tmp_path / "page").as_posix() for path in (tmp_path / "page").rglob("*.*")}
    assert {name for name in files if name.startswith("files/")} == {f"files/{each}-0.mp4" for each in (0, 6, 11)}
    texts = [path.read_text() for path in (tmp_path / "page").rglob("*.js")]
    assert texts and not any(str(tmp_path) in text or str(labels.parent) in text for text in texts)


def shown(tab: Browser, episode: int = 0) -> str:
    """The heading of the player, once it shows the video of an episode."""
    tab.until(f"document.getElementById('what').textContent.startsWith('episode {episode} ')")
    tab.until("document.querySelector('#videos video').readyState >= 2")
    return tab.text("#instruction")


def test_a_person_looks_at_episodes(tab: Browser, dataset: LeRobotDataset) -> None:
    with running(dataset.root) as url:
        tab.open(f"{url}/")
        assert shown(tab) == HTML and tab.run("window.bad ?? null") is None
        assert tab.run("document.querySelectorAll('.item').length") == EPISODES
        tab.run("document.getElementById('list').focus()")
        for _ in range(2):
            tab.press("ArrowDown")
        tab.until("location.hash === '#episode-2'")
        assert shown(tab, 2) == dataset[2].instruction
        assert tab.run("document.querySelectorAll('#curves figure').length") == dataset.action_dim + dataset.state_dim
        tab.run("document.activeElement.blur()")
        tab.press("ArrowRight")
        tab.until("document.getElementById('time').textContent.endsWith('frame 1')")
        tab.run("document.getElementById('speed').value = 4; document.getElementById('play').click()")
        assert tab.text("#play") == "Pause"
        tab.until("document.getElementById('play').textContent === 'Play'")
        assert tab.text("#time").endswith(f"frame {FRAMES - 1}")
        tab.press("/")
        tab.type(dataset[1].instruction)
        num = sum(episode.instruction == dataset[1].instruction for episode in dataset)
        tab.until(f"document.querySelectorAll('.item').length === {num}")
        tab.run("document.getElementById('tab-statistics').click()")
        tab.until("document.querySelectorAll('#numbers table').length === 2")
        assert f"{EPISODES}" in tab.text("#figures") and HTML in tab.text("#instructions")
    assert not tab.complaints


def test_a_person_finds_episodes_by_what_their_images_show(tab: Browser, tmp_path: Path) -> None:
    writer = lapa.DatasetWriter(tmp_path / "made", fps=10, cameras={"front": (64, 64)})
    for images in (moving(1), [moving(2)[0]] * 30, moving(3)[:15] + moving(4)[:15], moving(1)):
        writer.add_episode({"front": images}, "push")
    writer.finish()
    items = "[...document.querySelectorAll('.item')].map(item => Number(item.id.slice(5)))"
    with running(tmp_path / "made") as url:
        tab.open(f"{url}/")
        shown(tab)
        tab.until("seen.size === 4 && document.getElementById('survey').textContent === ''")
        for mark, expected in {"cuts": [2], "still": [1], "twins": [0, 3], "frozen": [], "": [0, 1, 2, 3]}.items():
            tab.page.select_option("#only", mark)
            assert tab.run(items) == expected
        tab.page.fill("#calmest", "0.2")
        assert tab.run(items) == [0, 2, 3]
        tab.run("document.getElementById('tab-statistics').click()")
        tab.page.get_by_text("Episodes with cuts: show 1").wait_for()
    assert not tab.complaints


def test_a_dataset_elsewhere_is_looked_through_when_asked_for(
    tab: Browser, dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapa.view.dataset.is_remote", lambda path: True)
    with running(dataset.root) as url:
        tab.open(f"{url}/")
        tab.until("document.querySelector('#survey button')")
        assert "downloads all episodes" in tab.text("#survey") and tab.run("seen.size") == 0
        tab.run("document.querySelector('#survey button').click()")
        tab.until(f"seen.size === {EPISODES} && document.getElementById('survey').textContent === ''")
    assert not tab.complaints


def test_a_person_sees_what_a_code_means(tab: Browser, labels: Path) -> None:
    with running(labels) as url:
        tab.open(f"{url}/#episode-7")
        shown(tab, 7)
        tab.until("document.querySelectorAll('.strip').length === 3")
        tab.run("document.querySelector('#now button').click()")
        tab.until("location.hash === '#code-0-3'")
        tab.until("document.querySelectorAll('#clips video').length === 3")
        tab.until("[...document.querySelectorAll('#clips video')].every(video => video.readyState >= 2)")
        assert "48 frames in 3 episodes" in tab.text("#code-count") and "25%" in tab.text("#usage")
        assert tab.run("document.querySelectorAll('#code-actions .z i').length") == 2
        assert tab.run("document.querySelectorAll('#code-nearest .z i').length") == 2
        assert "have the same code one horizon later" in tab.text("#matrix-text")
        tab.run("document.querySelector('#clips button').click()")
        tab.until("location.hash.startsWith('#episode-')")
        tab.run("history.back()")
        tab.until("location.hash === '#code-0-3'")
    assert not tab.complaints


def test_an_export_is_opened_from_the_disk(
    tab: Browser, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(capsys, str(labels), "--export", str(tmp_path / "page"), "--limit", "4")
    tab.open(f"{(tmp_path / 'page' / 'index.html').as_uri()}#code-0-3")
    tab.until("document.querySelectorAll('#clips video').length === 2")
    tab.run("location.hash = 'episode-7'")
    shown(tab, 7)
    assert f"4 of 4 episodes (the dataset has {EPISODES})" in tab.text("#count")
    assert not tab.complaints and all(address.startswith(("file:", "data:", "blob:")) for address in tab.requests)


def test_a_fault_of_the_program_is_shown_in_the_terminal(
    labels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DatasetPages, "_statistics", lambda self: 1 / 0)
    with running(labels) as url:
        status, body = get(f"{url}/data/statistics.json")
    assert status == 500 and body.decode().strip() == (
        "error: ZeroDivisionError in lapa view; see the traceback in the terminal that runs it"
    )
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_the_hint_to_export_has_the_options_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    config = ViewConfig("lam", data="squares", compare=("other",))
    for exportable in (True, False):
        _announce(SimpleNamespace(pages=SimpleNamespace(summary="", exportable=exportable), url="u"), config)
        said = capsys.readouterr().err
        assert ("lapa view lam --data squares --compare other --export FOLDER" in said) == exportable


def test_a_code_that_is_pressed_twice_is_shown_once(tab: Browser, labels: Path) -> None:
    with running(labels) as url:
        tab.open(f"{url}/#codes-0")
        tab.until("document.querySelectorAll('#usage button').length > 0")
        tab.hold("code-0-3")
        for _ in range(2):
            tab.run("document.querySelectorAll('#usage button')[3].click()")
            tab.until("document.getElementById('code-count').textContent === 'loading'")
        tab.release()
        assert tab.run("document.querySelectorAll('#clips video').length") == 3
        assert tab.run("document.querySelectorAll('#code-nearest video').length") == 1
    assert not tab.complaints


def test_an_episode_that_could_not_be_loaded_is_loaded_when_pressed_again(
    tab: Browser, dataset: LeRobotDataset
) -> None:
    with running(dataset.root) as url:
        tab.open(f"{url}/")
        shown(tab)
        tab.run("window.quick = load; window.load = () => Promise.reject(new Error('the cable is out')); null")
        tab.run("go('episode-3')")
        tab.until("document.getElementById('error').textContent === 'the cable is out'")
        tab.run("window.load = quick; null")
        tab.run("go('episode-3')")
        shown(tab, 3)


def test_statistics_are_of_all_episodes_once_these_are_listed(
    tab: Browser, dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_dataset, "PAGE", 5)
    with running(dataset.root) as url:
        tab.open(f"{url}/#statistics")
        counts = "[...document.querySelectorAll('#instructions td + td')].map(cell => Number(cell.textContent))"
        tab.until(f"{counts}.reduce((one, other) => one + other, 0) === {EPISODES}")
    assert not tab.complaints


@pytest.mark.parametrize(
    ("view", "loaded"),
    [
        ("episode-1", "document.querySelectorAll('.strip').length === 3"),
        ("code-0-3", "document.querySelectorAll('#code-nearest .z i').length === 2"),
        ("statistics", "document.querySelectorAll('#numbers table').length === 2"),
    ],
)
def test_the_page_is_as_wide_as_a_phone(tab: Browser, labels: Path, view: str, loaded: str) -> None:
    with running(labels) as url:
        tab.open(f"{url}/#{view}")
        tab.until(loaded)
        for width in (320, 390, 768):
            tab.resize(width, 800)
            tab.until(f"document.documentElement.scrollWidth <= {width}")


def test_a_long_list_has_few_elements(tab: Browser, dataset: LeRobotDataset, tmp_path: Path) -> None:
    """A list of 30,000 rows, in two pages, scrolls to its end."""
    with running(dataset.root) as url:
        tab.open(f"{url}/")
        shown(tab)
        tab.run(
            "for (let row = 12; row < 30000; row++) { rows.index.push(row); rows.length.push(10);"
            " rows.instruction.push(`task ${row}`); rows.source.push(''); } filter()"
        )
        tab.run("document.getElementById('list').scrollTop = 1e9")
        tab.until("document.getElementById('rows').textContent.includes('task 29999')")
        assert tab.run("document.querySelectorAll('.item').length") < 60


def test_a_recording_of_rerun_has_images_actions_states_and_codes(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = pytest.importorskip("rerun.chunk", reason="needs lapa-vla[rerun]")
    out = tmp_path / "some.rrd"
    told = export(capsys, str(labels), "--rerun", str(out), "--limit", "2")
    assert f"2 of {EPISODES} episodes" in told
    rows = {chunk.entity_path: chunk.num_rows for chunk in reader.RrdReader(out).stream().to_chunks()}
    parts = [
        "actions/down",
        "actions/right",
        "states/down",
        "states/right",
        f"cameras/{lapa.open_dataset(labels.parent.parent).cameras[0]}",
    ]
    for episode in (0, EPISODES - 1):
        assert [rows[f"/episode_{episode}/{part}"] for part in parts] == [FRAMES] * 5
        assert rows[f"/episode_{episode}/codes/position_2"] == FRAMES - HORIZON
    with pytest.raises(UserError, match="exists; give another name, or --overwrite"):
        record(ViewConfig(str(labels), rerun=out))


def test_a_recording_needs_rerun(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(UserError, match=r"--rerun needs rerun; install it: pip install 'lapa-vla\[rerun\]'"):
        record(ViewConfig(str(labels), rerun=tmp_path / "some.rrd"))
