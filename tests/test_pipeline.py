"""The whole flow in the made-up world: every stage's artifact feeds the next, and what is done is not done again."""

import shutil
import time
from pathlib import Path

import pytest

from lapa import cli, demo
from lapa.data.labels import Labels
from lapa.data.spec import open_dataset
from lapa.files import read_json
from lapa.latent.model import lam_fingerprint
from lapa.subcommand import Stage, run_stage
from vlms import make_vlm


def in_this_process(stage: Stage) -> float:
    started = time.monotonic()
    with pytest.raises(SystemExit) as exit_:
        cli.main(stage.command)
    assert exit_.value.code == 0, stage.command
    return time.monotonic() - started


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoConfig:
    config = demo.DemoConfig(out=tmp_path_factory.mktemp("demo") / "out", preset="debug", rollouts=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_stage", in_this_process)
        demo.run(config)
    return config


def test_every_stage_leaves_its_artifact(finished: demo.DemoConfig) -> None:
    for stage in demo.stages(finished):
        assert stage.artifact.is_file(), stage.title
    table = read_json(finished.out / "demo.json")["results"]
    assert list(table) == ["random actions", "from scratch", "pretrained"]
    for result in table.values():
        assert result["overall"]["episodes"] == 8
        low, high = result["overall"]["interval"]
        assert low <= result["overall"]["success_rate"] <= high


def test_artifacts_name_what_they_were_made_from(finished: demo.DemoConfig) -> None:
    out = finished.out
    labels = Labels.open(
        out / "labels",
        lam_fingerprint=lam_fingerprint(out / "lam"),
        dataset_fingerprint=open_dataset(out / "videos").fingerprint,
    )
    assert labels.manifest.lam_fingerprint in (out / "latent_policy" / "config.json").read_text()
    assert open_dataset(out / "videos").action_dim is None
    assert open_dataset(out / "demonstrations").action_dim == 2


def test_a_second_run_does_nothing_again(finished: demo.DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(demo, "run_stage", lambda stage: ran.append(stage.title) or 0.0)
    resumed = demo.DemoConfig(**{**vars(finished), "resume": True})
    demo.run(resumed)
    assert ran == []
    (finished.out / "labels" / "manifest.json").rename(finished.out / "labels" / "kept")
    demo.run(resumed)
    (finished.out / "labels" / "kept").rename(finished.out / "labels" / "manifest.json")
    assert ran == ["latent action labels"]


def test_other_settings_do_not_mix(finished: demo.DemoConfig) -> None:
    with pytest.raises(ValueError, match="rollouts was 1, is 2"):
        demo.run(demo.DemoConfig(out=finished.out, preset="debug", rollouts=2, resume=True))


def test_a_failing_stage_stops_the_demo(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the stage 'rollouts' failed"):
        run_stage(Stage("rollouts", ["evaluate", "nobody", "--out", str(tmp_path)], tmp_path / "x"))


def test_labels_of_another_dataset_are_refused_by_the_policy(
    finished: demo.DemoConfig, capsys: pytest.CaptureFixture
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
    finished: demo.DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same videos and labels; the stages that have no part in the policy are done before."""
    make_vlm("smolvlm", tmp_path / "vlm")
    for name in ("videos", "demonstrations", "lam", "probe", "labels"):
        shutil.copytree(finished.out / name, tmp_path / "out" / name)
    monkeypatch.setattr(demo, "run_stage", in_this_process)
    config = demo.DemoConfig(
        out=tmp_path / "out", preset="debug", policy=f"hf:{tmp_path / 'vlm'}", rollouts=1, resume=True
    )
    demo.run(config)
    assert read_json(config.out / "demo.json")["results"]["pretrained"]["overall"]["episodes"] == 8
    assert read_json(config.out / "policy" / "config.json")["policy"]["backbone"]["kind"] == "hf"
