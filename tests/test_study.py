"""The study: its steps are shared, made once and resumed; all arms run in the made-up world and are reported."""

import fcntl
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lapa import cli, presets
from lapa.config import to_dict
from lapa.data.labels import Labels
from lapa.data.spec import open_dataset
from lapa.errors import UserError
from lapa.files import read_json, read_json_lines, write_json
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.study import run as study_run
from lapa.study.config import PRESETS, StudyConfig, sizes_of
from lapa.study.plan import Plan, Step, order, steps_of
from lapa.study.progress import wanted
from lapa.study.results import ARMS, SPLITS, Setting, load_result, load_results
from lapa.subcommand import AT_ONCE, Ended, Stage, append_lines

CPU = sizes_of("cpu")


def in_this_process(stages: Sequence[Stage], ended: Ended) -> None:
    """Runs the stages in the order in which they are given."""
    for stage in stages:
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(stage.command))
        assert exit_.value.code == 0, stage.command
        assert stage.spent is not None
        append_lines(stage.spent, [{**stage.note(), "seconds": 1.0, "cpu_seconds": 2.0, "failed": False}])
        ended(stage)


def keys(*steps: Step) -> set[str]:
    return {step.key for step in order(*steps)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The video model of the arm unipi is a UNet of diffusers, which only the extra `study` brings.
    pytest.importorskip("diffusers")
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_run, "run_stages", in_this_process)
        study_run.run(StudyConfig(out=out, preset="debug", demonstrations=1))
    return out


def test_all_arms_run_and_are_reported(study: Path) -> None:
    results = load_results([study])
    assert [result.arm for result in results] == list(ARMS)
    for result in results:
        assert len(result.rollouts) == 8
        assert result.figures["action_error"] > 0
        assert result.strip is not None and result.curves
        assert result.seconds.keys() == result.cpu_seconds.keys() and set(result.cpu_seconds.values()) == {2.0}
    by_arm = {result.arm: result for result in results}
    assert 0 <= by_arm["lapa"].figures["token_accuracy"] <= 1
    assert {"lam_linear_r2", "lam_codes_used"} <= set(by_arm["lapa"].figures)
    assert by_arm["lapa"].codes is not None and by_arm["vpt"].codes is None
    with pytest.raises(SystemExit) as exit_:
        cli.main(["study", "report", str(study)])
    assert exit_.value.code == 0
    text = (study / "report" / "table.md").read_text()
    assert all(f"| in-domain, 3, 1 | {arm} |" in text for arm in ARMS)
    assert "- in-domain" not in text.split("## Missing")[1]


def test_where_no_first_rollout_was_recorded_there_is_no_strip(tmp_path: Path) -> None:
    assert study_run.rollout_strip(tmp_path) is None


def test_episodes_that_ended_in_an_error_are_no_rollouts(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    again = tmp_path / "study"
    shutil.copytree(study, again)
    plan = Plan(sizes_of("debug"), Setting("in-domain", 3, 1), 0)
    folder = plan.rollouts("scratch").folder(again)
    (folder / "SHA256SUMS").unlink()
    report = read_json(folder / "results.json")
    report["episodes"][0]["error"] = "the simulator died"
    write_json(folder / "results.json", report)
    before = load_result(study / "results" / "in-domain-3-1-scratch-0.json")
    result = study_run.collect(again, plan, "scratch", "debug")
    assert result.rollouts == before.rollouts[1:] and (result.errors, before.errors) == (1, 0)
    assert (
        "1 of 8 rollouts ended in an error, most often 'the simulator died'; they are left out"
        in capsys.readouterr().err
    )
    for episode in report["episodes"][1:3]:
        episode["error"] = "the simulator died"
    write_json(folder / "results.json", report)
    with pytest.raises(ValueError, match=r"rollouts-scratch-.*: 3 of 8 rollouts ended .* delete this folder and run"):
        study_run.collect(again, plan, "scratch", "debug")


def test_a_result_waits_for_the_run_that_makes_one_of_its_steps(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That run records the step's seconds when the step has ended, a moment after its artifact is there."""
    again = tmp_path / "study"
    shutil.copytree(study, again)
    result = again / "results" / "in-domain-3-1-scratch-0.json"
    result.unlink()
    monkeypatch.setattr(study_run, "run_stages", lambda stages, ended: None)
    monkeypatch.setattr(study_run, "finish", lambda *_: None)
    config = StudyConfig(out=again, preset="debug", arm=("scratch",), demonstrations=1)
    with Plan(sizes_of("debug"), Setting("in-domain", 3, 1), 0).labelled.lock(again).open("w") as others:
        fcntl.flock(others, fcntl.LOCK_EX)
        study_run.run(config)
        assert not result.exists()
    study_run.run(config)
    assert result.exists()


def test_the_control_has_the_codes_of_other_frames(study: Path) -> None:
    plan = Plan(sizes_of("debug"), Setting("in-domain", 3, 1), 0)
    own, shuffled = (Labels.open(step.folder(study)) for step in (plan.labels, plan.shuffled_labels))
    assert own.episodes == shuffled.episodes
    model = f"{own.manifest.lam_fingerprint}-shuffled"
    assert shuffled.manifest.lam_fingerprint == model
    policy = read_json(plan.pretrained("captions").folder(study) / "config.json")
    assert policy["policy"]["lam_fingerprint"] == model
    pairs = [(own.codes(episode), shuffled.codes(episode)) for episode in own.episodes]
    assert all((frames_T == others_T).all() for (frames_T, _), (others_T, _) in pairs)
    before, after = (np.concatenate([pair[which][1] for pair in pairs]) for which in (0, 1))
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    assert (before != after).any(axis=1).mean() > 0.5


def test_only_actionvla_pretrains_on_actions(study: Path) -> None:
    plan = Plan(sizes_of("debug"), Setting("in-domain", 3, 1), 0)
    assert open_dataset(plan.videos.folder(study)).action_dim == 2
    assert open_dataset(plan.videos_without_actions.folder(study)).action_dim is None
    for arm in ARMS:
        sees = plan.videos in [step for s in order(plan.policy(arm)) for step in s.inputs if "hide" not in s.verb]
        assert sees == (arm == "actionvla"), arm


def test_what_is_done_is_not_done_again(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = tmp_path / "study"
    shutil.copytree(study, again)
    ran: list[str] = []
    monkeypatch.setattr(study_run, "run_stages", lambda stages, ended: ran.extend(stage.title for stage in stages))
    config = StudyConfig(out=again, preset="debug", demonstrations=1)
    before = (again / "results" / "in-domain-3-1-lapa-0.json").read_bytes()
    study_run.run(config)
    assert ran == []
    assert (again / "results" / "in-domain-3-1-lapa-0.json").read_bytes() == before
    with pytest.raises(ValueError, match="another study"):
        study_run.run(replace(config, preset="cpu"))


def test_a_study_in_slices_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first slice ends in finetuning; nothing is lost, and nothing is reported as finished."""
    config = StudyConfig(out=tmp_path / "s", preset="debug", arm=("scratch",))
    ran: list[str] = []

    def stopped_once(stages: Sequence[Stage], ended: Ended) -> None:
        for stage in stages:
            ran.append(stage.title)
            if ran.count("finetuning scratch") == 1 and stage.title == "finetuning scratch":
                raise KeyboardInterrupt
            in_this_process([stage], ended)

    monkeypatch.setattr(study_run, "run_stages", stopped_once)
    with pytest.raises(KeyboardInterrupt):
        study_run.run(config)
    assert not (tmp_path / "s" / "results").exists()
    study_run.run(config)
    assert load_result(tmp_path / "s" / "results" / "in-domain-3-2-scratch-0.json").arm == "scratch"
    assert ran.count("labelled episodes") == 1


def test_inputs_of_a_step_that_is_done_are_not_made_again() -> None:
    """As where a study's models were copied to another machine without its datasets."""
    plan = Plan(CPU, Setting("in-domain", 30, 2), 0)
    done = {plan.policy("lapa").key, plan.measured.key}
    left = {step.title for step in order(plan.rollouts("lapa"), unless=lambda step: step.key in done)}
    assert left == {"rollouts lapa"}


def test_arms_and_seeds_share_what_they_can() -> None:
    plans = [Plan(CPU, Setting("in-domain", 30, 2), seed) for seed in (0, 1)]
    first, second = plans
    assert first.measured == second.measured
    for step in ("videos", "labelled", "latent_action_model", "inverse_dynamics"):
        assert getattr(first, step).key != getattr(second, step).key
    seeds = [[word for word in plan.rollouts("scratch").words if isinstance(word, str)] for plan in plans]
    assert [words[words.index("--seed") + 1] for words in seeds] == ["0", "1"]
    assert first.policy("vpt").key != first.policy("lapa").key
    assert first.inverse_dynamics.key in keys(first.policy("vpt")) & keys(first.policy("unipi"))
    assert first.latent_action_model.key == Plan(CPU, Setting("in-domain", 30, 5), 0).latent_action_model.key
    assert first.inverse_dynamics.key != Plan(CPU, Setting("in-domain", 30, 5), 0).inverse_dynamics.key


def test_a_step_is_another_where_anything_that_it_depends_on_is() -> None:
    more = Plan(CPU, Setting("in-domain", 31, 2), 0)
    plan = Plan(CPU, Setting("in-domain", 30, 2), 0)
    assert plan.policy("lapa").key != more.policy("lapa").key
    assert plan.policy("scratch").key == more.policy("scratch").key


def plans(preset: str) -> list[Plan]:
    """Of every split that the preset has."""
    lacking = {"debug": SPLITS[1:], "language-table": SPLITS[3:], "language-table-gpu": SPLITS[3:]}.get(preset, ())
    return [Plan(sizes_of(preset), Setting(split, 30, 2), 0) for split in SPLITS if split not in lacking]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_step_of_every_preset_is_a_command_that_parses(preset: str, tmp_path: Path) -> None:
    steps = [step for plan in plans(preset) for arm in ARMS for step in order(*steps_of(plan, arm).values())]
    for step in {step.key: step for step in steps}.values():
        command = step.command(tmp_path)
        verb = cli.find_verb(command)
        assert verb is not None, command
        cli.parse(verb, command[len(verb.name.split()) :])


@pytest.mark.parametrize("preset", PRESETS)
def test_arms_are_pretrained_and_finetuned_alike(preset: str, tmp_path: Path) -> None:
    """Whatever the presets of the two commands say: the same loop, batch, augmentation and frozen parts."""
    plan = plans(preset)[0]

    def training(step: Step) -> dict:
        verb = cli.find_verb(step.command(tmp_path))
        assert verb is not None
        config = to_dict(cli.parse(verb, step.command(tmp_path)[len(verb.name.split()) :]))
        del config["loop"]["eval_every"]
        shared = ("loop", "augment", "tiny", "freeze_vision", "lora_rank", "cameras")
        return {name: config[name] for name in shared}

    pretrained = [training(plan.pretrained(arm)) for arm in ("lapa", "captions", "vpt", "actionvla")]
    assert all(each == pretrained[0] for each in pretrained)
    finetuned = [training(plan.policy(arm)) for arm in ("scratch", "lapa", "vpt", "actionvla")]
    assert all(each == finetuned[0] for each in finetuned)


def test_inputs_come_first_and_each_step_once() -> None:
    plan = Plan(CPU, Setting("cross-task", 30, 2), 0)
    steps = list(order(plan.rollouts("lapa"), plan.probe))
    assert len({step.key for step in steps}) == len(steps)
    for place, step in enumerate(steps):
        assert {needed.key for needed in step.inputs} <= {before.key for before in steps[:place]}


def test_splits_differ_in_their_videos_alone() -> None:
    inside, task, view, body = (Plan(CPU, Setting(split, 30, 2), 0) for split in SPLITS)
    assert "--look" in view.videos.words and CPU.world.other_camera in view.videos.words
    assert CPU.world.other_tasks in task.videos.words
    assert set(body.videos.words) - set(inside.videos.words) == {"--embodiment", "hand"}
    assert inside.labelled == task.labelled == view.labelled == body.labelled
    assert len({plan.policy("scratch").key for plan in (inside, task, view, body)}) == 1
    with pytest.raises(ValueError, match="no other tasks"):
        Plan(sizes_of("debug"), Setting("cross-task", 30, 2), 0)
    with pytest.raises(ValueError, match="no other embodiment"):
        Plan(sizes_of("debug"), Setting("cross-embodiment", 30, 2), 0)


def test_seeds_of_recordings_never_meet() -> None:
    with pytest.raises(UserError, match="--seed must be from 0 to 999, got 4000"):
        Plan(CPU, Setting("in-domain", 30, 2), 4000)
    last = Plan(CPU, Setting("in-domain", 30, 2), 999)
    assert len({last.videos, last.labelled, last.measured}) == 3


def test_the_video_model_has_as_many_samples_as_the_policies() -> None:
    def samples(step: Step, stage: str) -> int:
        words = [word for word in step.words if isinstance(word, str)]
        given = dict(itertools.pairwise(words))
        batch = given.get("--batch-size") or presets.named(stage, given["--preset"]).loop.batch_size
        return int(given["--steps"]) * int(batch)

    for preset in PRESETS:
        plan = Plan(sizes_of(preset), Setting("in-domain", 30, 2), 0)
        assert samples(plan.video_model, "video") == samples(plan.pretrained("lapa"), "pretrain")
        (finetuning,) = [step for step in plan.policy("unipi").inputs if step.title == "video model finetuning"]
        assert samples(finetuning, "video") == samples(plan.policy("lapa"), "finetune")


def test_the_papers_splits_of_language_table() -> None:
    sizes = sizes_of("language-table-gpu")
    inside, task, view = (Plan(sizes, Setting(split, 30, 20), 0) for split in SPLITS[:3])
    assert inside.videos.verb == "data language-table" and inside.videos.words[:2] == ("--families", "all")
    assert all("--noise" in step.words for step in (inside.videos, inside.labelled, inside.measured))
    assert task.videos == inside.videos and task.labelled.words[:2] == ("--families", "separate")
    assert "--look" in view.videos.words and view.labelled == inside.labelled
    own = replace(sizes, world=replace(sizes.world, clips="REAL"))
    real = Plan(own, Setting("cross-environment", 30, 20), 0)
    assert real.videos_without_actions.words == ("REAL",)
    assert "REAL" in real.pretrained("actionvla").words
    assert Plan(own, Setting("in-domain", 30, 20), 0).videos == inside.videos


def test_pretraining_and_finetuning_have_options_of_their_own() -> None:
    plan = Plan(sizes_of("language-table"), Setting("in-domain", 30, 20), 0)
    for arm in ("lapa", "captions", "vpt", "actionvla"):
        assert "4e-4" in plan.pretrained(arm).words and "2e-4" not in plan.pretrained(arm).words
        assert "2e-4" in plan.policy(arm).words and "4e-4" not in plan.policy(arm).words
    assert "2e-4" in plan.policy("scratch").words


def test_rollouts_in_language_table_are_heard_where_their_blocks_and_places_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["push the red moon to the blue cube", "move the green star to the upper left corner"]
    episodes = [SimpleNamespace(instruction=instruction) for instruction in told]
    monkeypatch.setattr(study_run, "open_dataset", lambda path: SimpleNamespace(episodes=episodes))
    asked = {
        "move the red moon towards the blue cube": True,
        "push the blue cube to the red moon": False,
        "slide the green star to the top left of the board": True,
        "slide the green star to the top right of the board": False,
        "push the red star": False,
    }
    rows = [
        {"task": "block2block", "episode": n, "seed": n, "success": True, "steps": 9, "instruction": instruction}
        for n, instruction in enumerate(asked)
    ]
    plan = Plan(sizes_of("language-table"), Setting("in-domain", 30, 20), 0)
    assert [rollout.heard for rollout in study_run._rollouts(tmp_path, plan, rows)] == list(asked.values())


def test_what_pseudo_actions_explain_as_they_are_and_up_to_a_linear_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(CPU, Setting("in-domain", 30, 2), 0)
    true_NA = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32)
    told = {plan.videos.folder(tmp_path): true_NA, plan.pseudo_labelled.folder(tmp_path): 1 - 2 * true_NA[:, ::-1]}
    space = SimpleNamespace(names=("x", "y"), binary=(False, False))
    lengths = [np.array([10, 10, 10, 10])]

    def opened(path: Path | str) -> SimpleNamespace:
        actions_NA = told[Path(path)]
        return SimpleNamespace(
            action_space=space, action_dim=actions_NA.shape[1], lengths=lengths[0], all_actions=lambda: actions_NA
        )

    monkeypatch.setattr(study_run, "open_dataset", opened)
    found = study_run._inverse_figures(tmp_path, plan)
    assert found["inverse_r2"] < -1 and found["inverse_linear_r2"] == pytest.approx(1)
    # Every second video is measured, and has another map.
    told[plan.pseudo_labelled.folder(tmp_path)][10:20] *= -1
    told[plan.pseudo_labelled.folder(tmp_path)][30:] *= -1
    assert study_run._inverse_figures(tmp_path, plan)["inverse_linear_r2"] < 0
    lengths[0] = np.array([40])
    assert set(study_run._inverse_figures(tmp_path, plan)) == {"inverse_r2"}
    # Clips of another robot.
    told[plan.videos.folder(tmp_path)] = np.zeros((40, 7), np.float32)
    assert study_run._inverse_figures(tmp_path, plan) == {}


def test_clips_of_ones_own_make_another_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their path is in the study's settings, with which its page finds the steps again."""
    monkeypatch.setattr(study_run, "run_stages", lambda stages, ended: None)
    monkeypatch.setattr(study_run, "finish", lambda *_: None)
    config = StudyConfig(
        out=tmp_path / "s", preset="small", arm=("scratch",), split="cross-environment", clips=tmp_path / "clips"
    )
    write_synthetic_dataset(tmp_path / "clips", episodes=3, frames=4, size=32)
    study_run.run(config)
    assert read_json(config.out / "study.json")["sizes"]["world"]["clips"] == str(tmp_path / "clips")
    (noted,) = read_json_lines(config.out / "runs.jsonl")
    assert noted["setting"]["videos"] == 3
    with pytest.raises(ValueError, match="another study"):
        study_run.run(replace(config, clips=None))
    with pytest.raises(ValueError, match="--videos: those of --clips are all used"):
        study_run.run(replace(config, videos=10))


def test_the_number_of_videos_is_of_a_run_not_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Step] = []
    monkeypatch.setattr(study_run, "run_stages", lambda stages, ended: None)
    monkeypatch.setattr(study_run, "finish", lambda *_: None)
    monkeypatch.setattr(study_run, "_stage", lambda study, step: asked.append(step))
    config = StudyConfig(out=tmp_path / "s", preset="small", arm=("scratch", "lapa"))
    study_run.run(config)
    study_run.run(replace(config, videos=10))
    assert {run.setting.videos for run in wanted(config.out)} == {30, 10}
    assert {step.words[3] for step in asked if step.title == "videos"} == {"30", "10"}
    assert len({step.key for step in asked if step.title == "finetuning scratch"}) == 1
    with pytest.raises(ValueError, match="--videos must be at least 1, got 0"):
        study_run.run(replace(config, videos=0))


def test_settings_are_kept_beside_the_results(study: Path) -> None:
    assert read_json(study / "study.json")["preset"] == "debug"


def test_the_time_is_estimated_from_steps_of_the_same_kind(tmp_path: Path) -> None:
    plan = Plan(CPU, Setting("in-domain", 30, 2), 0)
    every = list(order(*steps_of(plan, "scratch").values()))
    config = StudyConfig(out=tmp_path, preset="cpu")
    # Labelled and measured episodes, finetuning, rollouts and the action error: 30 + 90 + 170 + 228 + 27 seconds.
    minutes = round(545 / AT_ONCE / 60)
    assert f"5 steps, {AT_ONCE} at once: about {minutes} minutes" in study_run._expected(config, every, every)
    done, left = every[0], every[1:]
    (done.folder(tmp_path) / done.artifact).parent.mkdir(parents=True)
    (done.folder(tmp_path) / done.artifact).write_text("{}")
    (tmp_path / "seconds.jsonl").write_text(json.dumps({"key": done.key, "seconds": 6000.0}) + "\n")
    again = next(
        step for step in order(Plan(CPU, Setting("in-domain", 30, 5), 0).rollouts("scratch")) if step.kind == done.kind
    )
    assert f"about {round(6000 / AT_ONCE / 60)} minutes" in study_run._expected(config, every, [again])
    gpu = StudyConfig(out=tmp_path, preset="gpu")
    assert "(of which 1 were never timed)" in study_run._expected(gpu, every, [again, left[-1]])
    unknown = study_run._expected(gpu, every, left)
    assert unknown.startswith("4 steps") and "how long is not known" in unknown and "minutes" not in unknown
