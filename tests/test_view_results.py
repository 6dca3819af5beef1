"""`lapa view` of results and of a study: the data of the page, the export, and the page in a headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs lapa-vla[serve]")
pytest.importorskip("websockets", reason="needs lapa-vla[serve]")

from browser import Browser, browser
from fake_hub import FakeHub, Repo
from lapa import UserError, cli
from lapa.checksums import SUMS
from lapa.evaluation.config import EvaluateConfig
from lapa.evaluation.rollout import evaluate
from lapa.files import write_json
from lapa.study.config import PRESETS
from lapa.study.plan import Plan, order, steps_of
from lapa.study.progress import note_wanted, progress, wanted
from lapa.study.results import ArmResult, Rollout, RunKey, Setting
from lapa.view.config import ViewConfig
from lapa.view.opening import kind_at, open_pages
from lapa.view.pages import Pages
from lapa.view.server import running

TASKS, EPISODES, VIDEOS = ("up", "left"), 12, 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of the expert and of random actions, the first two rollouts of each task as videos."""
    folder = tmp_path_factory.mktemp("results")
    for policy in ("expert", "random"):
        settings = {"env": "synthetic", "tasks": ",".join(TASKS), "episodes": EPISODES, "videos": VIDEOS, "size": 64}
        evaluate(EvaluateConfig(policy, folder / policy, max_steps=20, **settings))
    return folder


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


def opened(path: Path, *compare: Path, **options: Any) -> Pages:
    return open_pages(ViewConfig(str(path), compare=tuple(map(str, compare)), **options))


def test_rates_are_those_of_the_report(results: Path) -> None:
    pages = opened(results)
    assert pages.json("about")["groups"] == ["synthetic, seed 0"]
    group = pages.json("group-0")
    assert group["arms"] == ["expert", "random"]
    assert [task["name"] for task in group["tasks"]] == [None, *TASKS]
    for arm, name in enumerate(group["arms"]):
        report = json.loads((results / name / "results.json").read_text())
        for task in group["tasks"]:
            found, expected = task["arms"][arm], report["tasks"].get(task["name"], report["overall"])
            assert found["rate"] == expected["success_rate"] and [found["low"], found["high"]] == expected["interval"]
    assert len(group["notes"]) == 1 and "paired over 24 episodes" in group["notes"][0]
    assert re.search(r"random minus expert: -[\d.]+ points \(95% interval -", group["notes"][0])


def test_each_recorded_rollout_has_its_video(results: Path) -> None:
    pages = opened(results)
    group = pages.json("group-0")
    for arm, name in enumerate(group["arms"]):
        for row, where in enumerate(group["video"][arm]):
            task, episode = group["task"][row], group["episode"][row]
            assert (where is not None) == (episode < VIDEOS)
            if where:
                assert where[1:] == [1, 1, 0]
                assert pages.file(f"{where[0]}.mp4") == results / name / "videos" / f"{task}-{episode}.mp4"
    for name in ("8.mp4", "0.png", "../results.json", "-1.mp4", "x.mp4", "0"):
        with pytest.raises(KeyError):
            pages.file(name)
    for name in ("group-1", "group", "report", "about-0"):
        with pytest.raises(KeyError):
            pages.json(name)


def test_videos_of_several_rollouts_are_cut_into_tiles(results: Path, tmp_path: Path) -> None:
    """Until version 0.2 a file held the recorded rollouts of a task next to one another."""
    shutil.copytree(results / "expert", tmp_path / "before")
    for path in (tmp_path / "before" / "videos").glob("*.mp4"):
        path.rename(path.with_name(f"{path.stem.rpartition('-')[0]}.mp4"))
    group = opened(tmp_path / "before").json("group-0")
    tiles = [where for where in group["video"][0] if where]
    assert tiles == [[0, 2, 1, 0], [0, 2, 1, 1], [1, 2, 1, 0], [1, 2, 1, 1]]


def test_evaluations_of_other_seeds_are_not_compared(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "random", tmp_path / "random")
    (tmp_path / "random" / SUMS).unlink()
    for name in ("results.json", "config.json"):
        path = tmp_path / "random" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 1}))
    pages = opened(results / "expert", tmp_path / "random")
    assert pages.json("about")["groups"] == ["synthetic, seed 0", "synthetic, seed 1"]
    assert [pages.json(f"group-{number}")["arms"] for number in (0, 1)] == [["expert"], ["random"]]


def test_an_evaluation_that_runs_is_shown_as_far_as_it_is(results: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(results / "expert", half)
    (half / "results.json").unlink()
    journal = half / "episodes.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:10])
    assert kind_at(str(half)) == "results"
    pages = opened(half)
    assert pages.json("about")["settings"][0] == [
        "state",
        ["not finished, 5 episodes so far; lapa evaluate --resume goes on"],
    ]
    assert pages.json("group-0")["tasks"][0]["arms"][0]["episodes"] == 5
    journal.write_bytes(b"".join(lines[:7]))
    assert "7 episodes" in pages.json("about")["settings"][0][1][0]
    assert pages.json("group-0")["tasks"][0]["arms"][0]["episodes"] == 7
    journal.write_bytes(b"")
    assert pages.json("about")["groups"] and pages.json("group-0")["tasks"] == [{"name": None, "arms": [None]}]


def changed(results: Path, to: Path, **changes: Any) -> Path:
    """A copy of results with other values in its report."""
    shutil.copytree(results, to)
    (to / SUMS).unlink()
    report = json.loads((to / "results.json").read_text())
    write_json(to / "results.json", {**report, **changes})
    return to


def test_episodes_that_ended_in_an_error_are_left_out(results: Path, tmp_path: Path) -> None:
    rows = json.loads((results / "expert" / "results.json").read_text())["episodes"]
    failed = [{**row, "success": False, "error": "the simulator died"} for row in rows]
    pages = opened(changed(results / "expert", tmp_path / "expert", episodes=[*failed[:3], *rows[3:]]))
    (rate,) = pages.json("group-0")["tasks"][0]["arms"]
    assert rate["episodes"] == len(rows) - 3 and rate["successes"] == sum(row["success"] for row in rows[3:])
    assert pages.json("about")["cautions"] == [
        "expert: 3 episodes ended in an error, and count neither as successes nor as failures"
    ]
    none = opened(changed(results / "expert", tmp_path / "none", episodes=failed))
    assert none.json("group-0")["tasks"] == [{"name": None, "arms": [None]}]


def test_notes_and_versions_of_packages_are_shown(results: Path, tmp_path: Path) -> None:
    notes = {"assets": "stand-ins: not the real ones", "renderer": "a CPU"}
    one = changed(results / "expert", tmp_path / "one", **{"notes": notes, "mani-skill": "3.0.1"})
    other = changed(results / "random", tmp_path / "other", notes={**notes, "renderer": "a GPU"})
    about = opened(one, other).json("about")
    rows = dict(about["settings"])
    assert rows["mani-skill"] == ["3.0.1", ""] and rows["renderer"] == ["a CPU", "a GPU"]
    assert "command" not in rows
    assert about["cautions"] == [
        "one: assets: stand-ins: not the real ones",
        "other: assets: stand-ins: not the real ones",
        "synthetic, seed 0: the evaluations differ in renderer",
    ]


def test_evaluations_with_other_most_steps_are_a_caution(results: Path, tmp_path: Path) -> None:
    config = json.loads((results / "random" / "results.json").read_text())["config"]
    assert opened(results).json("about")["cautions"] == []
    for name, steps, differs in (
        ("alike", {"up": 20, "left": 20}, False),
        ("none", None, False),
        ("longer", 30, True),
        ("one", {"up": 20, "left": 30}, True),
    ):
        other = changed(results / "random", tmp_path / name, config={**config, "max_steps": steps})
        found = opened(results / "expert", other).json("about")["cautions"]
        assert bool(found) == differs, name
        assert all("most steps of an episode" in caution for caution in found)


def test_damaged_results_are_one_line(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "expert", tmp_path / "damaged")
    path = tmp_path / "damaged" / "results.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "seconds": 1}))
    with pytest.raises(UserError, match=r"results\.json: damaged or changed, its SHA-256"):
        opened(tmp_path / "damaged")
    (tmp_path / "damaged" / SUMS).unlink()
    for odd in (
        "{",
        json.dumps({**report, "episodes": [{"task": "up"}]}),
        json.dumps({**report, "seed": "one"}),
        json.dumps({**report, "episodes": None}),
    ):
        path.write_text(odd)
        with pytest.raises(UserError, match=r"results\.json: .*") as error:
            opened(tmp_path / "damaged")
        assert "\n" not in str(error.value)
    path.unlink()
    journal = tmp_path / "damaged" / "episodes.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b"true", b"null", 1))
    with pytest.raises(UserError, match=r"episodes\.jsonl: is damaged in line 1"):
        opened(tmp_path / "damaged")
    with pytest.raises(UserError, match="holds no results"):
        opened(results, tmp_path / "damaged" / "videos")


def test_paths_in_results_are_not_followed(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "expert", tmp_path / "odd" / "results")
    (tmp_path / "odd" / "results" / SUMS).unlink()
    (tmp_path / "secret-0.mp4").write_bytes(b"secret")
    path = tmp_path / "odd" / "results" / "results.json"
    report = json.loads(path.read_text())
    names = {"up": "../../../secret", "left": str(tmp_path / "secret")}
    report["episodes"] = [{**row, "task": names[row["task"]]} for row in report["episodes"]]
    report["policy"] = str(tmp_path / "policy")
    path.write_text(json.dumps(report))
    pages = opened(tmp_path / "odd" / "results")
    assert set(pages.json("group-0")["video"][0]) == {None} and not list(pages.files())
    assert str(tmp_path) not in json.dumps(pages.json("about"))


def test_results_on_the_hub_are_shown(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub() as hub:
        hub.used(monkeypatch, tmp_path)
        files = {path.relative_to(results / "random").as_posix(): path for path in results.glob("random/**/*.*")}
        repo = hub.repos["dataset", "ann/rollouts"] = Repo()
        repo.commits["0" * 40] = {name: path.read_bytes() for name, path in files.items()}
        pages = open_pages(ViewConfig("ann/rollouts"))
        group = pages.json("group-0")
        where = group["video"][0][0]
        assert len(group["task"]) == len(TASKS) * EPISODES
        assert pages.file(f"{where[0]}.mp4").read_bytes() == files["videos/up-0.mp4"].read_bytes()
        pages.close()


def test_options_of_other_kinds_are_refused(results: Path) -> None:
    with pytest.raises(UserError, match="results does not take --data"):
        opened(results, data="somewhere")
    with pytest.raises(UserError, match="the same results twice"):
        opened(results / "expert", results / "expert")


def export(path: Path, out: Path, *options: str) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["view", str(path), "--export", str(out), *options])
    assert exit.value.code == 0


def test_an_export_leaves_the_results_as_they_are(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    export(results, tmp_path / "page", "--limit", "3")
    assert "1 episodes without their videos; --limit takes more" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before
    assert len(list((tmp_path / "page" / "files").iterdir())) == 3 * 2
    texts = [path.read_text() for path in (tmp_path / "page").rglob("*.js")]
    assert not any(str(results) in text or str(tmp_path) in text for text in texts)


IN_DOMAIN = Setting("in-domain", 3, 2)


def saved(study: Path, arm: str, successes: int, seed: int = 0) -> None:
    """The result of a run with 12 rollouts of a task, of which so many succeed."""
    rollouts = tuple(Rollout("push", episode, episode < successes, 30) for episode in range(12))
    sizes = {"world": {"env": "synthetic"}}
    result = ArmResult(arm, IN_DOMAIN, seed, "debug", sizes, rollouts)  # type: ignore[arg-type]
    Image.new("RGB", (8, 4), (255, 0, 0)).save(result.save(study).with_suffix(".png"))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two seeds of two arms are done, one with a video; one run of a third is half done, another is not begun."""
    from lapa.config import to_dict

    folder = tmp_path / "study"
    for seed in (0, 1):
        saved(folder, "scratch", 3, seed)
        saved(folder, "lapa", 9, seed)
    write_json(folder / "study.json", {"preset": "debug", "sizes": to_dict(PRESETS["debug"]), "stages": {}})
    note_wanted(folder, [RunKey("actionvla", IN_DOMAIN, seed) for seed in (0, 1)])
    plan = Plan(PRESETS["debug"], IN_DOMAIN, 0)
    (plan.rollouts("lapa").folder(folder) / "videos").mkdir(parents=True)
    (plan.rollouts("lapa").folder(folder) / "videos" / "push-0.mp4").write_bytes(b"video")
    first, second, *_ = order(*steps_of(plan, "actionvla").values())
    write_json(first.folder(folder) / first.artifact, {})
    row = {"key": second.key, "seconds": 1.0, "code": "x", "failed": True}
    (folder / "seconds.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_a_study_shows_its_arms_side_by_side(study: Path) -> None:
    pages = opened(study)
    group = pages.json("group-0")
    assert group["arms"] == ["scratch", "lapa"]
    (whole, push) = group["tasks"]
    assert [arm["rate"] for arm in whole["arms"]] == [0.25, 0.75]
    assert push["name"] == "push" and push["arms"][1]["low"] < 0.75 < push["arms"][1]["high"]
    assert group["notes"][0].startswith("lapa is 50.0 points above scratch (95% interval ")
    assert sorted(set(group["seed"])) == [0, 1]
    (shown,) = [row for row, where in enumerate(group["video"][1]) if where]
    assert (group["seed"][shown], group["episode"][shown]) == (0, 0)
    assert pages.file(f"{group['video'][1][shown][0]}.mp4").read_bytes() == b"video"


def test_a_study_shows_how_far_its_runs_are(study: Path) -> None:
    about = opened(study).json("about")
    assert about["facts"] == ["preset debug", "4 of 6 runs done"]
    assert [run["kind"] for run in about["runs"]] == ["done"] * 4 + ["failed", "waiting"]
    assert about["runs"][4]["text"].startswith("failed at ") and ", 1 of " in about["runs"][4]["text"]
    assert about["runs"][5]["text"].startswith("not begun, next is ")
    assert "preset debug: these numbers measure nothing" in about["cautions"]


def test_of_several_folders_the_furthest_state_of_a_run_is_shown(study: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(study / "study.json", other)
    note_wanted(other, [RunKey("scratch", IN_DOMAIN, 0), RunKey("actionvla", IN_DOMAIN, 0)])
    about = opened(study).json("about")
    for folders in ((study, other), (other, study)):
        both = opened(*folders).json("about")
        assert both["runs"] == about["runs"] and both["groups"] == about["groups"]


def test_results_of_a_study_are_read_when_the_page_is_loaded(study: Path) -> None:
    pages = opened(study)
    saved(study, "actionvla", 10)
    assert pages.json("about")["facts"] == ["preset debug", "5 of 6 runs done"]
    assert pages.json("group-0")["arms"] == ["scratch", "lapa", "actionvla"]


def test_errors_of_a_study_are_a_caution(study: Path) -> None:
    path = study / "results" / "in-domain-3-2-lapa-0.json"
    write_json(path, {**json.loads(path.read_text()), "errors": 3})
    cautions = opened(study).json("about")["cautions"]
    assert "in-domain-3-2-lapa-0: 3 episodes ended in an error and are left out" in cautions


def test_a_study_without_a_result_shows_its_runs(study: Path) -> None:
    shutil.rmtree(study / "results")
    pages = opened(study)
    about = pages.json("about")
    assert about["groups"] == [] and not about["report"] and len(about["runs"]) == 2
    assert list(pages.names()) == ["about"]
    settings = json.loads((study / "study.json").read_text())
    write_json(study / "study.json", {**settings, "sizes": {**settings["sizes"], "more": 1}})
    assert [run["kind"] for run in pages.json("about")["runs"]] == ["unknown"] * 2
    (study / "study.json").write_text("[]")
    with pytest.raises(UserError, match=r"study\.json"):
        pages.json("about")


def test_the_report_of_a_study_is_on_its_page(study: Path) -> None:
    pytest.importorskip("matplotlib")
    pages = opened(study)
    blocks = pages.json("report")["blocks"]
    assert any("(arm - scratch) / (actionvla - scratch)" in block.get("text", "") for block in blocks)
    assert {"heading", "paragraph", "bullets", "table", "figure"} == {block["kind"] for block in blocks}
    for block in blocks:
        if block["kind"] == "figure":
            assert pages.file(f"{block['file']}.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_noted_once(tmp_path: Path) -> None:
    run = RunKey("lapa", Setting("cross-task", 3, 5), 3)
    for _ in range(2):
        note_wanted(tmp_path, [run])
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1
    write_json(tmp_path / "results" / "cross-task-5-lapa-3.json", {})
    with pytest.raises(UserError, match=r"cross-task-5-lapa-3\.json"):
        progress([tmp_path])


def test_a_line_that_a_kill_cut_short_does_not_damage_the_list_of_runs(tmp_path: Path) -> None:
    first, second = (RunKey("lapa", Setting("cross-task", 3, 5), seed) for seed in (0, 1))
    note_wanted(tmp_path, [first])
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"arm": "la')
    note_wanted(tmp_path, [second])
    assert wanted(tmp_path) == [first, second]


def videos_ready(tab: Browser, number: int) -> None:
    tab.until(f"document.querySelectorAll('#gallery video').length === {number}")
    tab.until("[...document.querySelectorAll('#gallery video')].every(video => video.readyState >= 2)")


def test_a_person_compares_rollouts(tab: Browser, results: Path) -> None:
    with running(results) as url:
        tab.open(f"{url}/")
        tab.until("document.querySelectorAll('#rates tbody tr').length === 3")
        assert "random minus expert" in tab.text("#notes") and "100%" in tab.text("#rates")
        tab.run("document.getElementById('tab-rollouts').click()")
        videos_ready(tab, 8)
        assert tab.run("document.querySelectorAll('#glance .cell').length") == 2 * len(TASKS) * EPISODES
        assert "expert success after" in tab.text("#gallery figcaption")
        tab.press("ArrowRight")
        tab.until("document.getElementById('time').textContent.startsWith('0.1 s')")
        tab.run("document.getElementById('speed').value = 4; document.getElementById('play').click()")
        tab.until("document.getElementById('play').textContent === 'Play'")
        left = tab.run(
            "[...document.querySelectorAll('#gallery video')].map(video => video.duration - video.currentTime)"
        )
        assert max(left) < 0.3
        for name, value in (("task", "left"), ("outcome", "0-1")):
            tab.run(f"$('{name}').value = '{value}'; $('{name}').onchange()")
        failures = [
            row["episode"]
            for row in json.loads((results / "random" / "results.json").read_text())["episodes"]
            if row["task"] == "left" and not row["success"] and row["episode"] < VIDEOS
        ]
        videos_ready(tab, 2 * len(failures))
        assert tab.run("[...document.querySelectorAll('#gallery h3')].map(each => each.textContent)") == [
            f"left, episode {episode}" for episode in failures
        ]
    assert not tab.complaints


def test_a_group_that_comes_late_is_not_shown_under_another_ones_name(
    tab: Browser, results: Path, tmp_path: Path
) -> None:
    shutil.copytree(results / "random", tmp_path / "random")
    (tmp_path / "random" / SUMS).unlink()
    for name in ("results.json", "config.json"):
        path = tmp_path / "random" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 1}))
    with running(results / "expert", compare=(str(tmp_path / "random"),)) as url:
        tab.open(f"{url}/")
        tab.until("document.querySelectorAll('#rates tbody tr').length === 3")
        tab.hold("group-1")
        for number in (1, 0):
            tab.run(f"$('group').value = '{number}'; $('group').onchange()")
            tab.until(f"location.hash === '#success-{number}' && group === {number}")
        tab.release()
        assert tab.text("#rates th + th") == "expert" and "100%" in tab.text("#rates")
    assert not tab.complaints


def test_a_pressed_rollout_is_shown_though_the_filters_leave_it_out(tab: Browser, results: Path) -> None:
    with running(results / "expert") as url:
        tab.open(f"{url}/#rollouts-0")
        videos_ready(tab, 4)
        for name, value in (("task", "left"), ("outcome", "0-0")):
            tab.run(f"$('{name}').value = '{value}'; $('{name}').onchange()")
        tab.until("document.querySelectorAll('#gallery video').length === 0")
        tab.run("document.querySelectorAll('#glance button.faint')[1].click()")
        tab.until("document.querySelectorAll('#gallery video').length > 0")
        assert tab.text("#gallery h3") == "left, episode 1"
    assert not tab.complaints


def test_a_video_that_no_browser_plays_is_named(tab: Browser, results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "expert", tmp_path / "torn")
    (tmp_path / "torn" / "videos" / "left-1.mp4").write_bytes(bytes(1000))
    with running(tmp_path / "torn") as url:
        tab.open(f"{url}/#rollouts-0")
        tab.until("!document.getElementById('error').hidden")
        assert tab.text("#error") == "the browser cannot play the video of left, episode 1, torn"
        assert tab.run("[...document.querySelectorAll('#gallery video')].filter(each => each.error).length") == 1


def test_an_export_of_results_is_opened_from_the_disk(tab: Browser, results: Path, tmp_path: Path) -> None:
    export(results, tmp_path / "page")
    tab.open(f"{(tmp_path / 'page' / 'index.html').as_uri()}#rollouts-0-{EPISODES}")
    videos_ready(tab, 4)
    assert tab.text("#gallery h3") == "left, episode 0"
    assert not tab.complaints and all(address.startswith(("file:", "data:", "blob:")) for address in tab.requests)


def test_a_person_reads_a_study_on_a_phone(tab: Browser, study: Path) -> None:
    pytest.importorskip("matplotlib")
    with running(study) as url:
        for view, ready in (
            ("runs", "document.querySelectorAll('#runs-table tbody tr').length === 6"),
            (
                "report",
                "document.querySelectorAll('#report img').length > 3 && [...document.querySelectorAll('#report"
                " img')].every(image => { image.loading = 'eager'; return image.naturalWidth; })",
            ),
            ("success-0", "document.querySelectorAll('#rates tbody tr').length === 2"),
        ):
            tab.open(f"{url}/#{view}")
            tab.until(ready)
            for width in (320, 390, 768):
                tab.resize(width, 800)
                tab.until(f"document.documentElement.scrollWidth <= {width}")
    assert not tab.complaints


def test_the_server_reads_nothing_else(results: Path) -> None:
    with running(results) as url:
        group = json.load(urllib.request.urlopen(f"{url}/data/group-0.json", timeout=60))
        with urllib.request.urlopen(f"{url}/files/0.mp4", timeout=60) as reply:
            video = reply.read()
        assert group["video"][0][0] == [0, 1, 1, 0]
        assert video == (results / "expert" / "videos" / "up-0.mp4").read_bytes()
        for name in ("files/99.mp4", "files/results.json", "data/group-9.json", "files/..%2fresults.json"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{url}/{name}", timeout=60)
