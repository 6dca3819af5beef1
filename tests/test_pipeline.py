"""The whole flow in the made-up world: every stage's artifact feeds the next, and what is done is not done again."""

import fcntl
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lapa import cli
from lapa.data.labels import Labels
from lapa.data.spec import open_dataset
from lapa.demo import run as demo
from lapa.demo.conclusion import all_frames, sentence
from lapa.demo.config import DemoConfig
from lapa.files import read_json
from lapa.latent.model import lam_fingerprint
from lapa.study.statistics import Estimate
from lapa.subcommand import Stage, append_lines
from vlms import make_vlm


def record(stage: Stage, seconds: float) -> None:
    assert stage.spent is not None
    append_lines(stage.spent, [{**stage.note(), "seconds": seconds, "cpu_seconds": 2.0, "failed": False}])


def in_this_process(stages: Sequence[Stage]) -> None:
    """Runs the stages that are not done in the order in which they are given."""
    for stage in (each for each in stages if not each.artifact.exists()):
        assert all(need.exists() for need in stage.needs), stage
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(stage.command))
        assert exit_.value.code == 0, stage.command
        record(stage, 1.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    config = DemoConfig(out=tmp_path_factory.mktemp("demo") / "out", preset="debug", rollouts=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_stages", in_this_process)
        demo.run(config)
    return config


def test_every_stage_leaves_its_artifact(finished: DemoConfig) -> None:
    for stage in demo.stages(finished, "synthetic"):
        assert stage.artifact.is_file(), stage.title
    table = read_json(finished.out / "demo.json")["results"]
    assert list(table) == ["random actions", "from scratch", "pretrained"]
    for result in table.values():
        assert result["overall"]["episodes"] == 8
        low, high = result["overall"]["interval"]
        assert low <= result["overall"]["success_rate"] <= high


def test_artifacts_name_what_they_were_made_from(finished: DemoConfig) -> None:
    out = finished.out
    labels = Labels.open(
        out / "labels",
        lam_fingerprint=lam_fingerprint(out / "lam"),
        dataset_fingerprint=open_dataset(out / "videos").fingerprint,
    )
    assert labels.manifest.lam_fingerprint in (out / "latent_policy" / "config.json").read_text()
    assert open_dataset(out / "videos").action_dim is None
    assert open_dataset(out / "demonstrations").action_dim == 2


def test_each_stage_has_a_lock_which_a_killed_demo_leaves_to_it(tmp_path: Path) -> None:
    stages = demo.stages(DemoConfig(out=tmp_path), "metaworld")
    locks = {stage.lock for stage in stages}
    assert None not in locks and len(locks) == len(stages)
    held = tmp_path / "logs" / "lam.lock"
    held.parent.mkdir()
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"lam: the stage 'latent action model' still runs"):
            demo.run(DemoConfig(out=tmp_path, overwrite=True))
    assert held.exists()


def test_a_second_run_does_nothing_again(finished: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def note(stages: Sequence[Stage]) -> None:
        ran.extend(stage.title for stage in stages if not stage.artifact.exists())

    monkeypatch.setattr(demo, "run_stages", note)
    resumed = DemoConfig(**{**vars(finished), "resume": True})
    demo.run(resumed)
    assert ran == []
    shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "out" / "labels" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="labels"):
        demo.run(replace(resumed, out=tmp_path / "out"))
    assert ran == ["latent action labels"]


@pytest.mark.parametrize("change", [{"tasks": "push"}, {"videos": 3}])
def test_the_preset_debug_refuses_what_it_would_ignore(tmp_path: Path, change: dict) -> None:
    with pytest.raises(ValueError, match=f"leave out --{next(iter(change))}"):
        demo.run(DemoConfig(**{"out": tmp_path / "out", "preset": "debug", **change}))
    assert not (tmp_path / "out").exists()


def test_the_preset_debug_has_as_many_labelled_episodes_as_asked_for(tmp_path: Path) -> None:
    stages = demo.stages(DemoConfig(out=tmp_path, preset="debug", demonstrations=3), "synthetic")
    counts = [stage.command[stage.command.index("--episodes") + 1] for stage in stages[:2]]
    assert counts == ["16", "24"]


def test_other_settings_do_not_mix(finished: DemoConfig) -> None:
    with pytest.raises(ValueError, match="rollouts was 1, is 2"):
        demo.run(DemoConfig(out=finished.out, preset="debug", rollouts=2, resume=True))


def test_the_demo_ends_with_what_it_shows(finished: DemoConfig) -> None:
    found = read_json(finished.out / "demo.json")
    assert found["world"] == "synthetic" and found["gain"]["low"] is None
    with Image.open(finished.out / "demo.png") as image:
        assert image.width > 800 and image.height > 600
    # Both policies, of four tasks each.
    frames = all_frames(finished.out / "demo.mp4")
    assert len(frames) > 20 and frames.shape[2] > 3 * 256


def test_an_interrupted_demo_keeps_the_seconds_of_its_stages(
    finished: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(stages: Sequence[Stage]) -> None:
        record(stages[0], 2.5)
        raise KeyboardInterrupt

    assert set(read_json(finished.out / "demo.json")["seconds"].values()) == {1.0}
    again = replace(finished, out=tmp_path / "out", resume=True)
    shutil.copytree(finished.out, again.out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "run_stages", stopped)
        demo.run(again)
    demo.run(again)
    assert read_json(again.out / "demo.json")["seconds"]["videos without actions"] == 3.5
    (again.out / "seconds.jsonl").write_text('{"title": 1}\n')
    with pytest.raises(ValueError, match=r"seconds.jsonl: line 1 is no object with title, seconds"):
        demo.run(again)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.3, "pretraining on videos without actions pays: +20 points of success (95% interval +10 to +30)"),
        (-0.3, -0.1, "hurts: -20 points"),
        (-0.1, 0.2, "is not shown to help: +5 points"),
        (None, None, "too few rollouts for an interval"),
    ],
)
def test_the_sentence_of_the_demo(low: float | None, high: float | None, words: str) -> None:
    value = 0.0 if low is None or high is None else (low + high) / 2
    assert words in sentence(DemoConfig(), Estimate(value, low, high, 1))


def test_where_nothing_renders_the_demo_names_the_world_it_goes_on_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("lapa.envs.opengl.run_probe", lambda code: ("", "no EGL"))
    assert demo.world_of(DemoConfig()) == "synthetic"
    warned = capsys.readouterr().err
    assert "no EGL" in warned and "apt-get install" in warned and "made-up world of moving squares" in warned


def test_labels_of_another_dataset_are_refused_by_the_policy(
    finished: DemoConfig, capsys: pytest.CaptureFixture
) -> None:
    out = finished.out
    command = [
        "policy",
        "pretrain",
        "--preset",
        "debug",
        "--labels",
        str(out / "labels"),
        "--out",
        str(out / "refused"),
    ]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--data", str(out / "demonstrations")])
    assert exit_.value.code == 2
    assert "labels another dataset" in capsys.readouterr().err
    assert not (out / "refused").exists()


@pytest.mark.slow
def test_the_policy_may_be_a_vision_language_model(
    finished: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same videos and labels; the stages that have no part in the policy are done before."""
    make_vlm("smolvlm", tmp_path / "vlm")
    for name in ("videos", "demonstrations", "lam", "probe", "labels"):
        shutil.copytree(finished.out / name, tmp_path / "out" / name)
    monkeypatch.setattr(demo, "run_stages", in_this_process)
    config = DemoConfig(out=tmp_path / "out", preset="debug", policy=f"hf:{tmp_path / 'vlm'}", rollouts=1, resume=True)
    demo.run(config)
    assert read_json(config.out / "demo.json")["results"]["pretrained"]["overall"]["episodes"] == 8
    assert read_json(config.out / "policy" / "config.json")["policy"]["backbone"]["kind"] == "hf"
