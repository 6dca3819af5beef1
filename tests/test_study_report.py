"""The report of a study: figures equal hand counts, what is missing is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from lapa.errors import UserError
from lapa.study import plots
from lapa.study.blocks import Table, markdown, rich_table
from lapa.study.config import ReportConfig
from lapa.study.report import (
    cautions,
    comparison,
    comparisons,
    content,
    cpu_table,
    detailed_groups,
    findings,
    gap_text,
    main_table,
    run,
    savings,
    settings_table,
)
from lapa.study.results import ARMS, Arm, ArmResult, Curve, Rollout, Setting, load_results
from lapa.study.statistics import Estimate, Gap, compare

# The report draws with it.
pytest.importorskip("matplotlib")

# Successes of 20 rollouts of each of two tasks.
SUCCESSES: dict[Arm, tuple[int, int]] = {
    "scratch": (2, 4),
    "captions": (0, 2),
    "vpt": (8, 6),
    "unipi": (1, 3),
    "lapa": (14, 12),
    "actionvla": (18, 16),
}


IN_DOMAIN = Setting("in-domain", 30, 2)
NAME = "in-domain, 30 videos and 2 labelled episodes a task"


def made_up(arm: Arm, seed: int = 0, successes: tuple[int, ...] = (), **rest: object) -> ArmResult:
    successes = successes or SUCCESSES[arm]
    rollouts = tuple(
        Rollout(task, episode, episode < number, 30, heard=episode % 2 == 0)
        for task, number in zip(("push", "<reach> & pull"), successes, strict=True)
        for episode in range(20)
    )
    rows = ({"step": 1, "seconds": 0.1, "loss": 3.0}, {"step": 2, "seconds": 0.2, "loss": 2.0})
    held_out = ({"step": 2, "seconds": 0.3, "eval/held_out_action_error": 0.1},)
    values: dict[str, object] = {
        "setting": IN_DOMAIN,
        "preset": "made-up",
        "sizes": {"world": {"env": "metaworld"}, "rollouts": 20},
        "figures": {
            "action_r2": sum(successes) / 40 + 0.02 * seed,
            **({"token_accuracy": 0.25} if arm == "lapa" else {}),
        },
        "curves": (Curve(f"policy {arm}", (*rows, *held_out)),),
        "seconds": {f"finetuning {arm}": 60.0 + 4 * seed, "videos": 10.0},
        "cpu_seconds": {f"finetuning {arm}": 120.0 + 8 * seed, "videos": 20.0},
        "provenance": {
            "torch": "2.13",
            "code": "c0de",
            "mujoco": "3.3",
            "command": f"lapa study run --arm {arm} --seed {seed}",
        },
        **rest,
    }
    return ArmResult(arm=arm, seed=seed, rollouts=rollouts, **values)  # type: ignore[arg-type]


def whole_study(study: Path, seeds: int = 1) -> Path:
    for arm in ARMS:
        for seed in range(seeds):
            result = made_up(arm, seed)
            path = result.save(study)
            Image.new("RGB", (8, 4), (255, 0, 0)).save(path.with_suffix(".png"))
            if arm == "lapa":
                Image.new("RGB", (8, 4), (0, 0, 255)).save(path.with_name(f"{result.name}-codes.png"))
    return study


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = whole_study(tmp_path_factory.mktemp("study"), seeds=2)
    for setting in (Setting("cross-task", 30, 2), Setting("in-domain", 30, 5), Setting("in-domain", 100, 2)):
        for arm in ("scratch", "lapa"):
            made_up(arm, setting=setting).save(study)
    run(ReportConfig((study,)))
    return study / "report"


def test_the_table_holds_what_a_hand_count_gives(report: Path) -> None:
    groups = json.loads((report / "report.json").read_text())["groups"]
    assert [tuple(group["setting"].values()) for group in groups] == [
        ("in-domain", 30, 2),
        ("in-domain", 30, 5),
        ("in-domain", 100, 2),
        ("cross-task", 30, 2),
    ]
    cells = groups[0]["cells"]
    assert {arm: cell["success"]["value"] for arm, cell in cells.items()} == pytest.approx(
        {"scratch": 0.15, "captions": 0.05, "vpt": 0.35, "unipi": 0.1, "lapa": 0.65, "actionvla": 0.85}
    )
    assert cells["lapa"]["versus"]["scratch"]["value"] == pytest.approx(0.5)
    assert cells["lapa"]["versus"]["vpt"]["value"] == pytest.approx(0.3)
    assert cells["lapa"]["gap"]["value"] == pytest.approx(0.5 / 0.7)
    assert cells["unipi"]["gap"]["value"] == pytest.approx(-0.05 / 0.7)
    assert [cells[arm]["mean_rank"] for arm in ARMS] == [4.0, 6.0, 3.0, 5.0, 2.0, 1.0]
    assert cells["lapa"]["by_task"] == {"push": 0.7, "<reach> & pull": 0.6}
    assert (cells["lapa"]["seeds"], cells["lapa"]["num_rollouts"]) == ([0, 1], 80)


def test_the_markdown_holds_the_same_table(report: Path) -> None:
    lines = (report / "table.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| in-domain, 30, 2 | lapa "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith("65.0 [") and cells[3:5] == ["2", "80"]
    assert all(cell.startswith("+50.0 [") for cell in cells[5:7]) and cells[7].startswith("0.71 [")
    assert "| in-domain, 30, 2 | - | - | - | - | 0.25 |" in lines
    assert len(lines) < 75, "short"


def test_long_tables_are_on_the_page_alone(report: Path) -> None:
    assert "## Tables" not in (report / "table.md").read_text()
    found = findings(load_results([report.parent]))
    lines = markdown("Study", content(found, {})).splitlines()
    assert "## Tables" in lines and not any("Each row is a task" in line for line in lines), "no captions of images"
    # Of two runs of vpt one has 14 / 40, the other two hundredths more.
    assert "| action_r2 | 0.160 | 0.060 | 0.360 | 0.110 | 0.660 | 0.860 |" in lines
    (stage,) = [line for line in lines if line.startswith("| finetuning |")]
    # Runs of vpt take 60 and 64 seconds; scratch and lapa have three more runs, of 60.
    assert stage == "| finetuning | 61 | 62 | 62 | 62 | 61 | 62 |"
    assert "| all of a run | 71 | 72 | 72 | 72 | 71 | 72 |" in lines
    assert any("and 8 others" in line for line in lines)  # of twelve commands four are shown


def test_cpu_seconds_are_split_by_what_they_are_spent_on(report: Path) -> None:
    lines = (report / "table.md").read_text().splitlines()
    # Twice the seconds: vpt 120 and 128 in finetuning, 20 for the videos.
    assert "| vpt | 0 | 124 | 20 | 144 |" in lines
    runs = [
        made_up("lapa", cpu_seconds={"videos": 5.0, "labels": 7.0, "pretraining lapa": 100.0, "finetuning lapa": 40.0},
                seconds={"labels": 1.0}),
        made_up("scratch", cpu_seconds={"finetuning scratch": 40.0}),
    ]  # fmt: skip
    assert cpu_table(runs).rows == (("lapa", "107", "40", "5", "152"),), "not all steps of scratch were timed so"


def test_what_has_no_result_is_named(report: Path) -> None:
    lines = (report / "table.md").read_text().split("## Missing\n\n")[1].splitlines()
    lacking = "videos and 2 labelled episodes a task: scratch (seed 1), captions, vpt, unipi, lapa (seed 1), actionvla"
    assert lines == [
        f"- in-domain, 30 {lacking.replace('2', '5')}",
        f"- in-domain, 100 {lacking}",
        f"- cross-task, 30 {lacking}",
        "- cross-environment: no arm",
        "- cross-embodiment: no arm",
    ]


def test_what_lapa_saves_follows_the_results() -> None:
    arms: tuple[Arm, ...] = ("scratch", "vpt", "lapa", "actionvla")
    above = [made_up(arm) for arm in arms]
    labels, vpt = savings(findings(above))
    assert labels.startswith("what lapa saves over actionvla is labels: the actions of the videos (CPU")
    assert "lapa 120, actionvla 120" in labels and f"gap recovered in {NAME}: 0.71 [" in labels
    assert vpt == f"over vpt lapa saves nothing (CPU seconds of training: lapa 120, vpt 120); it is above it in {NAME}"
    same = [made_up(arm, successes=SUCCESSES["vpt"]) for arm in arms]
    (vpt,) = savings(findings(same))
    assert vpt.endswith("it is not above it in " + NAME)
    away = [made_up(arm, setting=Setting("cross-environment", 30, 2)) for arm in arms]
    other = NAME.replace("in-domain", "cross-environment")
    assert savings(findings([*same, *away]))[1].endswith(
        f"it is above it in {other} and not above it in {NAME}, so what it gains is robustness"
    )
    cheap = [
        made_up(arm, cpu_seconds={f"finetuning {arm}": 60.0 if arm == "lapa" else 90.0, "videos": 1.0}) for arm in arms
    ]
    assert "over vpt lapa saves compute, no labels (" in savings(findings(cheap))[1]
    untimed = [replace(run, cpu_seconds={}) if run.arm == "lapa" else run for run in cheap]
    assert savings(findings(untimed))[1].startswith("over vpt lapa saves no labels; it is above it in")
    elsewhere = [*cheap, made_up("lapa", setting=Setting("cross-task", 30, 2), cpu_seconds={"finetuning lapa": 9e9})]
    assert savings(findings(elsewhere))[1] == savings(findings(cheap))[1], "costs are compared where both arms are"
    assert savings(findings([made_up("lapa"), made_up("scratch")])) == []
    assert savings(findings([made_up("lapa"), made_up("scratch", seed=1), made_up("actionvla")])) == []


def test_the_plots_are_written(report: Path) -> None:
    assert sorted(path.name for path in report.glob("*.png")) == [
        "curves.png",
        "demonstrations.png",
        "success.png",
        "tasks.png",
        "videos.png",
    ]


def test_the_report_explains_each_arm(report: Path) -> None:
    text = (report / "table.md").read_text()
    for arm in ARMS:
        assert f"**{arm}**" in text
    assert "| in-domain, 30, 5 | scratch |" in text
    assert "A seed has its own videos" in text


def test_a_report_is_replaced_only_when_asked(tmp_path: Path) -> None:
    made_up("lapa", figures={}, curves=()).save(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("an older one")
    with pytest.raises(ValueError, match="--overwrite"):
        run(ReportConfig((tmp_path,)))
    assert (tmp_path / "report" / "report.json").read_text() == "an older one"
    run(ReportConfig((tmp_path,), overwrite=True))
    assert json.loads((tmp_path / "report" / "report.json").read_text())["groups"]


def test_one_arm_alone_still_gives_a_report(tmp_path: Path) -> None:
    made_up("lapa", figures={}, curves=()).save(tmp_path)
    run(ReportConfig((tmp_path,), out=tmp_path / "elsewhere"))
    text = (tmp_path / "elsewhere" / "table.md").read_text()
    assert "lapa" in text and "statistically" not in text
    assert "The effect of each code" not in text and "Each row is a task" not in text
    assert comparisons(compare([made_up("lapa")])) == []


def test_results_of_two_machines_are_one_study(tmp_path: Path) -> None:
    made_up("scratch").save(tmp_path / "a")
    made_up("lapa").save(tmp_path / "b")
    run(ReportConfig((tmp_path / "a", tmp_path / "b")))
    (group,) = json.loads((tmp_path / "a" / "report" / "report.json").read_text())["groups"]
    assert group["cells"]["lapa"]["versus"]["scratch"]["value"] == pytest.approx(0.5)


def test_machines_that_disagree_are_refused(tmp_path: Path) -> None:
    made_up("lapa").save(tmp_path / "a")
    made_up("lapa", successes=(1, 1)).save(tmp_path / "b")
    with pytest.raises(ValueError, match="leave one of them out"):
        run(ReportConfig((tmp_path / "a", tmp_path / "b")))
    assert not (tmp_path / "a" / "report").exists()


def test_a_study_without_rollouts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lapa study run"):
        run(ReportConfig((tmp_path,)))
    ArmResult("lapa", IN_DOMAIN, 0, "made-up", {}, ()).save(tmp_path)
    with pytest.raises(ValueError, match="no result has a rollout"):
        run(ReportConfig((tmp_path,)))


def spoilt(**changes: object) -> object:
    return lambda values: {**values, **changes}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda values: [values], "expected an object"),
        (lambda values: None, "expected an object"),
        (spoilt(curves=[None]), "curves: expected an object"),
        (spoilt(curves=[{"name": "policy", "rows": [None]}]), "curves: rows: expected an object"),
        (spoilt(curves=[{"name": "policy", "rows": [{"loss": 1.0}]}]), "a row of the curve 'policy' has no step"),
        (spoilt(figures={"token_accuracy": "high"}), "figures.token_accuracy: expected float"),
        (spoilt(figures=[1.0]), "figures: expected an object"),
        (spoilt(seconds={"policy": None}), "seconds.policy: expected float"),
        (spoilt(rollouts=[1]), "rollouts: expected an object"),
        (spoilt(sizes=None), "sizes: expected an object"),
    ],
)
def test_a_damaged_result_is_named(tmp_path: Path, spoil: Callable[[object], object], complaint: str) -> None:
    path = made_up("scratch").save(tmp_path)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=rf"in-domain-30-2-scratch-0\.json: {complaint}"):
        load_results([tmp_path])


def test_a_number_that_no_float_holds_is_named(tmp_path: Path) -> None:
    path = made_up("scratch").save(tmp_path)
    path.write_text(path.read_text().replace("60.0", "1e400"))
    with pytest.raises(UserError, match=r"scratch-0\.json: not valid JSON \(1e400 is no number of JSON\)"):
        load_results([tmp_path])


def test_a_run_without_rollouts_is_left_out(tmp_path: Path) -> None:
    made_up("scratch").save(tmp_path)
    values = made_up("lapa")
    ArmResult("lapa", IN_DOMAIN, 0, values.preset, values.sizes, ()).save(tmp_path)
    found = findings(load_results([tmp_path]))
    assert list(found.groups[0].cells) == ["scratch"]


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        (Estimate(0.12, 0.04, 0.2, 3), "lapa is 12.0 points above scratch (95% interval +4.0 to +20.0, 3 seeds)"),
        (Estimate(-0.12, -0.2, -0.04, 3), "lapa is 12.0 points below scratch (95% interval -20.0 to -4.0, 3 seeds)"),
        (
            Estimate(0.12, -0.01, 0.2, 2),
            "lapa and scratch are statistically indistinguishable: +12.0 points (95% interval -1.0 to +20.0, 2 seeds)",
        ),
        (
            Estimate(0.0, 0.0, 0.0, 3),
            "lapa and scratch are statistically indistinguishable: +0.0 points (95% interval +0.0 to +0.0, 3 seeds)",
        ),
        (
            Estimate(0.12, 0.04, 0.2, 1),
            "lapa is 12.0 points above scratch (95% interval +4.0 to +20.0, 1 seed, goals alone)",
        ),
        (
            Estimate(0.12, None, None, 3),
            "lapa is not compared with scratch: too few rollouts, under 10 goals a task (+12.0 points, 3 seeds)",
        ),
    ],
)
def test_the_comparison_follows_the_interval(difference: Estimate, sentence: str) -> None:
    assert comparison("lapa", "scratch", difference) == sentence


def test_comparisons_turn_when_the_numbers_do() -> None:
    high = compare([made_up("scratch"), made_up("lapa"), made_up("actionvla")])
    low = compare([made_up("scratch", successes=(14, 12)), made_up("lapa", successes=(2, 4)), made_up("actionvla")])
    same = compare([made_up("scratch"), made_up("lapa", successes=(2, 4)), made_up("actionvla", successes=(2, 4))])
    assert "lapa is 50.0 points above scratch" in comparisons(high)[0]
    assert main_table(high).rows[1][6].startswith("0.71")
    assert "lapa is 50.0 points below scratch" in comparisons(low)[0]
    assert main_table(low).rows[1][6].startswith("-2.50")
    assert "indistinguishable" in comparisons(same)[0] and main_table(same).rows[1][6] == "- (gap not above zero)"
    for groups in (high, low):
        assert all(line.endswith("1 seed, goals alone)") for line in comparisons(groups))


def test_a_comparison_goes_by_the_seeds_that_two_arms_share() -> None:
    runs = [made_up(arm, seed) for arm in ("scratch", "lapa") for seed in (0, 1, 2)]  # type: ignore[arg-type]
    groups = compare([*runs, made_up("actionvla", 1), made_up("vpt", 0), made_up("vpt", 2)])
    vpt, versus_scratch, versus_vpt, actionvla = comparisons(groups)
    assert versus_scratch.startswith(
        "in-domain, 30 videos and 2 labelled episodes a task: lapa is 50.0 points above scratch ("
    )
    assert versus_scratch.endswith("3 seeds)")
    assert "lapa is 30.0 points above vpt" in versus_vpt and versus_vpt.endswith("2 seeds)")
    assert "vpt is" in vpt and vpt.endswith("2 seeds)")
    assert "actionvla is" in actionvla and actionvla.endswith("1 seed, goals alone)")


def test_heard_goals_have_a_table(report: Path) -> None:
    lines = markdown("Study", content(findings(load_results([report.parent])), {})).splitlines()
    header = next(n for n, line in enumerate(lines) if "success on heard goals" in line)
    (row,) = [line for line in lines[header:] if line.startswith("| in-domain, 30, 2 | lapa ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Of 14 and 12 first episodes 7 and 6 of ten even ones succeed, and as many odd ones; of scratch 1 and 2 of ten.
    assert [cell.split(" ")[0] for cell in cells[2:]] == ["65.0", "65.0", "+50.0"]
    text = "\n".join(lines)
    assert "By wording" in text and "by the captions alone" in text


def test_without_a_word_on_wording_there_is_no_table_of_it(tmp_path: Path) -> None:
    rollouts = tuple(Rollout("push", episode, True, 9) for episode in range(20))
    for arm in ("scratch", "lapa"):
        ArmResult(arm, IN_DOMAIN, 0, "made-up", {}, rollouts).save(tmp_path)  # type: ignore[arg-type]
    run(ReportConfig((tmp_path,)))
    assert "wording" not in (tmp_path / "report" / "table.md").read_text()


def test_the_preset_debug_is_marked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up("scratch", preset="debug").save(tmp_path)
    run(ReportConfig((tmp_path,)))
    said = "preset debug: these numbers measure nothing"
    assert said in capsys.readouterr().out
    assert (tmp_path / "report" / "table.md").read_text().splitlines()[2] == f"- {said}"
    text = (tmp_path / "report" / "table.md").read_text()
    assert text.index(said) < text.index("Demonstrations with")
    assert cautions([made_up("scratch")]) == []


def test_runs_of_different_code_are_told_apart(tmp_path: Path) -> None:
    runs = [made_up("scratch"), made_up("lapa"), made_up("vpt", provenance={"code": "f00d"})]
    (caution,) = cautions(runs)
    assert "2 versions of the code" in caution
    # All steps of each were begun with one version and ended with another.
    (caution,) = cautions([made_up(arm, provenance={"code": "c0de, f00d"}) for arm in ("scratch", "lapa")])
    assert "2 versions of the code" in caution
    assert ("code", "c0de; f00d") in settings_table(runs).rows


def test_few_goals_give_bars_without_intervals() -> None:
    rollouts = tuple(Rollout("push", episode, episode < 2, 9) for episode in range(4))
    groups = compare(
        [
            ArmResult(arm, Setting("in-domain", 30, n), 0, "x", {}, rollouts)
            for arm in ("scratch", "lapa")
            for n in (2, 5)
        ]
    )  # type: ignore[arg-type]
    assert main_table(groups).rows[1][2] == "50.0 (too few rollouts, under 10 goals a task)"
    assert "too few rollouts" in comparisons(groups)[0]
    figure = plots.success_by_split(groups)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([50.0] * 4)  # type: ignore[attr-defined]
    assert plots.success_by("demonstrations", groups) is not None
    assert plots.success_by("videos", groups) is None


def test_arms_that_share_no_seed_with_scratch_are_not_compared() -> None:
    groups = compare([made_up("scratch", 0), made_up("vpt", 0), made_up("lapa", 1)])
    (line,) = comparisons(groups)
    assert "vpt" in line
    assert {row[1]: row[5] for row in main_table(groups).rows}["lapa"] == "-"


def test_details_are_shown_of_the_number_of_episodes_that_splits_share() -> None:
    settings = [Setting("in-domain", 30, 1), Setting("in-domain", 30, 2), Setting("cross-task", 30, 2)]
    runs = [made_up(arm, setting=setting) for setting in settings for arm in ("scratch", "lapa")]
    assert [group.setting for group in detailed_groups(compare(runs))] == settings[1:]


def test_the_gap_is_marked_where_it_may_be_chance() -> None:
    assert gap_text(None) == "-"
    assert gap_text(Gap(None, note="gap not above zero")) == "- (gap not above zero)"
    assert gap_text(Gap(0.5, note="gap not above zero for certain")) == "0.50 (gap not above zero for certain)"
    assert gap_text(Gap(0.5, 0.1, 0.9, num_seeds=3)) == "0.50 [0.10, 0.90]"
    assert gap_text(Gap(0.5, 0.1, 0.9, num_seeds=1)) == "0.50 [0.10, 0.90] (1 seed)"


def test_an_arm_has_its_own_colour_and_marker() -> None:
    assert set(plots.COLOURS) == set(plots.MARKERS) == set(ARMS)
    assert len(set(plots.COLOURS.values())) == len(set(plots.MARKERS.values())) == len(ARMS)


def test_bars_are_as_high_as_the_success_rates() -> None:
    figure = plots.success_by_split(compare([made_up("scratch"), made_up("lapa")]))
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([15.0, 65.0])  # type: ignore[attr-defined]


def test_a_table_reads_the_same_in_the_terminal_with_brackets_in_it() -> None:
    table = main_table(compare([made_up("scratch"), made_up("lapa")]))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(rich_table(table))
    assert table.rows[1][2] in captured.get()
    text = markdown("Study", [Table("Success", ("a|b",), (("c|d",),))])
    assert text == "# Study\n\n**Success**\n\n| a\\|b |\n| --- |\n| c\\|d |\n"
