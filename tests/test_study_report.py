"""The report of a study: figures equal hand counts, the page needs nothing else, what is missing is named."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from lapa.study import page
from lapa.study import plots as figures
from lapa.study.report import ReportConfig, chosen, findings, run
from lapa.study.results import ARMS, Arm, ArmResult, Curve, Rollout, load_results
from lapa.study.run import FIGURES
from lapa.study.statistics import Estimate, Gap, compare
from lapa.study.tables import FIGURE_MEANINGS, main_table, provenance_table
from lapa.study.verdicts import cautions, comparison, gap_text, missing, verdicts

# Successes of 20 rollouts of each of two tasks.
SUCCESSES: dict[Arm, tuple[int, int]] = {
    "scratch": (2, 4),
    "vpt": (8, 6),
    "unipi": (1, 3),
    "lapa": (14, 12),
    "actionvla": (18, 16),
}


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
        "split": "in-domain",
        "demonstrations": 2,
        "preset": "made-up",
        "sizes": {"world": {"env": "metaworld"}, "rollouts": 20},
        "figures": {"token_accuracy": sum(successes) / 40 + 0.01 * seed},
        "curves": (Curve(f"policy {arm}", (*rows, *held_out)),),
        "seconds": {f"policy {arm}": 60.0 + 4 * seed, "videos": 10.0},
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
    for split, demonstrations in (("cross-task", 2), ("in-domain", 5)):
        for arm in ("scratch", "lapa"):
            made_up(arm, split=split, demonstrations=demonstrations).save(study)  # type: ignore[arg-type]
    run(ReportConfig((study,)))
    return study / "report"


def test_the_table_holds_what_a_hand_count_gives(report: Path) -> None:
    groups = json.loads((report / "report.json").read_text())["groups"]
    assert [(group["split"], group["demonstrations"]) for group in groups] == [
        ("in-domain", 2),
        ("in-domain", 5),
        ("cross-task", 2),
    ]
    cells = groups[0]["cells"]
    assert {arm: cell["success"]["value"] for arm, cell in cells.items()} == pytest.approx(
        {"scratch": 0.15, "vpt": 0.35, "unipi": 0.1, "lapa": 0.65, "actionvla": 0.85}
    )
    assert cells["lapa"]["versus"]["scratch"]["value"] == pytest.approx(0.5)
    assert cells["lapa"]["versus"]["vpt"]["value"] == pytest.approx(0.3)
    assert cells["lapa"]["gap"]["value"] == pytest.approx(0.5 / 0.7)
    assert cells["unipi"]["gap"]["value"] == pytest.approx(-0.05 / 0.7)
    assert [cells[arm]["mean_rank"] for arm in ARMS] == [4.0, 3.0, 5.0, 2.0, 1.0]
    assert cells["lapa"]["by_task"] == {"push": 0.7, "<reach> & pull": 0.6}
    assert (cells["lapa"]["seeds"], cells["lapa"]["num_rollouts"]) == ([0, 1], 80)


def test_the_markdown_holds_the_same_table(report: Path) -> None:
    lines = (report / "table.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| in-domain, 2 | lapa "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith("65.0 [") and cells[3:5] == ["2", "80"]
    assert cells[5].startswith("+50.0 [") and cells[6].startswith("0.71 [") and cells[7] == "2.00"
    (theirs,) = [line for line in lines if line.startswith("| in-domain, seen |")]
    assert theirs == "| in-domain, seen | 15.6 | 44.0 | 22.0 | 62.0 | 77.0 | 0.46 | 0.76 |"
    (stage,) = [line for line in lines if line.startswith("| policy |")]
    # Runs of vpt take 60 and 64 seconds; scratch and lapa have two more runs, of 60.
    assert stage == "| policy | 61 | 62 | 62 | 61 | 62 |"
    assert "| all of a run | 71 | 72 | 72 | 71 | 72 |" in lines


def test_the_page_loads_nothing_and_embeds_every_picture(report: Path) -> None:
    text = (report / "report.html").read_text()
    sources = re.findall(r"src='([^']{0,40})", text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|srcset|<iframe", text)
    pictures = sorted(path.name for path in report.glob("*.png"))
    assert pictures == [
        "curves-cross-task.png",
        "curves-in-domain.png",
        "demonstrations.png",
        "figures.png",
        "success.png",
        "tasks.png",
    ]
    assert len(sources) == len(pictures) + len(ARMS) + 1  # a strip an arm, and the codes


def test_text_is_escaped_in_the_page(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert "&lt;reach&gt; &amp; pull" in text and "<reach>" not in text


def test_the_page_says_what_each_arm_is_and_what_is_missing(report: Path) -> None:
    text = (report / "report.html").read_text()
    for arm in ARMS:
        assert f"<b>{arm}</b>" in text
    assert "No run on the split cross-environment." in text
    assert "in-domain, 5 labelled episodes a task: no run of vpt, unipi, actionvla." in text
    assert "cross-task: nothing with 5 labelled episodes a task." in text
    assert "fewer than 3 seeds of scratch, vpt, unipi, lapa, actionvla." in text
    assert "fewer than 50 rollouts of a task under a seed (down to 20)" in text
    assert "and 6 others" in text  # of ten commands four are shown


def test_a_report_is_replaced_only_when_asked(tmp_path: Path) -> None:
    made_up("lapa", figures={}, curves=()).save(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("an older one")
    with pytest.raises(ValueError, match="--overwrite"):
        run(ReportConfig((tmp_path,)))
    assert (tmp_path / "report" / "report.html").read_text() == "an older one"
    run(ReportConfig((tmp_path,), overwrite=True))
    assert (tmp_path / "report" / "report.html").read_text().startswith("<!doctype html>")


def test_one_arm_alone_still_gives_a_report(tmp_path: Path) -> None:
    made_up("lapa", figures={}, curves=()).save(tmp_path)
    run(ReportConfig((tmp_path,), out=tmp_path / "elsewhere"))
    text = (tmp_path / "elsewhere" / "report.html").read_text()
    assert "There is nothing to compare" in text
    assert "no run of scratch, vpt, unipi, actionvla." in text
    assert "No pictures of rollouts of lapa." in text and "No pictures of what the codes do." in text
    assert "No explaining figures of in-domain-2-lapa-0." in text


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
    ArmResult("lapa", "in-domain", 2, 0, "made-up", {}, ()).save(tmp_path)
    with pytest.raises(ValueError, match="no result holds a rollout"):
        run(ReportConfig((tmp_path,)))


def test_a_run_without_rollouts_is_left_out_and_named(tmp_path: Path) -> None:
    made_up("scratch").save(tmp_path)
    values = made_up("lapa")
    ArmResult("lapa", "in-domain", 2, 0, values.preset, values.sizes, ()).save(tmp_path)
    found = findings(load_results([tmp_path]))
    assert list(found.groups[0].cells) == ["scratch"]
    assert "in-domain-2-lapa-0: no rollouts; it is left out of the tables." in found.missing


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "strip.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"strip\.png: not a PNG"):
        page.picture(tmp_path / "strip.png", "rollouts")


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (
            Estimate(0.12, 0.04, 0.2, 3),
            "LAPA is above scratch by 12.0 points (95% interval 4.0 to 20.0, which excludes zero).",
        ),
        (
            Estimate(-0.12, -0.2, -0.04, 3),
            "LAPA is below scratch by 12.0 points (95% interval 4.0 to 20.0, which excludes zero).",
        ),
        (
            Estimate(0.12, -0.01, 0.2, 3),
            "LAPA is not distinguishable from scratch: the difference is +12.0 points, its 95% interval -1.0 to 20.0.",
        ),
        (
            Estimate(0.0, 0.0, 0.0, 3),
            "LAPA is not distinguishable from scratch: the difference is +0.0 points, its 95% interval 0.0 to 0.0.",
        ),
        (
            Estimate(0.12, 0.04, 0.2, 1),
            "In these trainings (one seed), LAPA is above scratch by 12.0 points "
            "(95% interval over goals 4.0 to 20.0, which excludes zero).",
        ),
        (
            Estimate(0.12, -0.01, 0.2, 2),
            "In these trainings (two seeds), LAPA is not distinguishable from scratch: "
            "the difference is +12.0 points, its 95% interval -1.0 to 20.0.",
        ),
        (
            Estimate(0.12, None, None, 3),
            "LAPA is not compared with scratch: too few rollouts, under 10 goals a task "
            "(the difference is +12.0 points).",
        ),
    ],
)
def test_the_verdict_follows_the_interval(difference: Estimate, said: str) -> None:
    assert comparison("lapa", "scratch", difference) == said


def test_verdicts_turn_when_the_numbers_do() -> None:
    (high,) = compare([made_up("scratch"), made_up("lapa"), made_up("actionvla")])
    (low,) = compare([made_up("scratch", successes=(14, 12)), made_up("lapa", successes=(2, 4)), made_up("actionvla")])
    (same,) = compare([made_up("scratch"), made_up("lapa", successes=(2, 4)), made_up("actionvla", successes=(2, 4))])
    assert "LAPA is above scratch" in verdicts(high)[0] and "LAPA recovers 0.71 of the gap" in verdicts(high)[1]
    assert "LAPA is below scratch" in verdicts(low)[0] and "LAPA recovers -2.50 of the gap" in verdicts(low)[1]
    assert "not distinguishable" in verdicts(same)[0] and "is not defined: gap not above zero" in verdicts(same)[1]
    assert "In the paper: 0.76 (seen goals) and 0.79 (unseen goals)." in verdicts(high)[1]
    for group in (high, low):
        assert all(sentence.startswith("In these trainings (one seed), ") for sentence in verdicts(group))


def test_the_remark_on_training_goes_by_the_seeds_that_two_arms_share() -> None:
    runs = [made_up(arm, seed) for arm in ("scratch", "lapa") for seed in (0, 1, 2)]  # type: ignore[arg-type]
    (group,) = compare([*runs, made_up("actionvla", 1), made_up("vpt", 0), made_up("vpt", 2)])
    versus_scratch, versus_vpt, gap, vpt, actionvla = verdicts(group)
    assert versus_scratch.startswith("LAPA is above scratch by 50.0 points (95% interval ")
    assert versus_vpt.startswith("In these trainings (two seeds), LAPA is ")
    assert gap.startswith("In these trainings (one seed), LAPA recovers 0.71")
    assert vpt.startswith("In these trainings (two seeds), VPT is ")
    assert actionvla.startswith("In these trainings (one seed), ActionVLA is above")


def test_heard_goals_have_a_table_and_a_sentence(report: Path) -> None:
    lines = (report / "table.md").read_text().splitlines()
    header = next(n for n, line in enumerate(lines) if "success on heard goals" in line)
    (row,) = [line for line in lines[header:] if line.startswith("| in-domain, 2 | lapa ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Of 14 and 12 first episodes 7 and 6 of ten even ones succeed, and as many odd ones; of scratch 1 and 2 of ten.
    assert [cell.split(" ")[0] for cell in cells[2:]] == ["65.0", "65.0", "+50.0"]
    sentence = "on goals whose wording the labelled episodes hold, LAPA is above scratch by 50.0 points"
    assert f"In these trainings (two seeds), {sentence}" in (report / "table.md").read_text()
    page_text = (report / "report.html").read_text()
    assert "By wording" in page_text and "by the captions alone" in page_text and sentence in page_text


def test_without_a_word_on_wording_there_is_no_table_of_it(tmp_path: Path) -> None:
    rollouts = tuple(Rollout("push", episode, True, 9) for episode in range(20))
    for arm in ("scratch", "lapa"):
        ArmResult(arm, "in-domain", 2, 0, "made-up", {}, rollouts).save(tmp_path)  # type: ignore[arg-type]
    run(ReportConfig((tmp_path,)))
    for name in ("table.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "By wording" not in text and "whose wording" not in text


def test_the_preset_debug_says_first_that_it_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up("scratch", preset="debug").save(tmp_path)
    run(ReportConfig((tmp_path,)))
    said = "preset debug: says nothing about the method"
    assert said in capsys.readouterr().err
    assert (tmp_path / "report" / "table.md").read_text().splitlines()[2] == f"**{said}**"
    text = (tmp_path / "report" / "report.html").read_text()
    assert text.index(said) < text.index("Demonstrations with")
    assert cautions([made_up("scratch")]) == []


def test_runs_of_different_code_are_told_apart(tmp_path: Path) -> None:
    runs = [made_up("scratch"), made_up("lapa"), made_up("vpt", provenance={"code": "f00d"})]
    (said,) = cautions(runs)
    assert "2 different states of the code" in said
    assert "c0de: in-domain-2-scratch-0, in-domain-2-lapa-0; f00d: in-domain-2-vpt-0" in said
    (many,) = cautions([*runs, *(made_up("lapa", seed) for seed in (1, 2, 3, 4))])
    assert "in-domain-2-lapa-2 and 2 others; f00d" in many
    assert ("code", "c0de; f00d") in provenance_table(runs).rows


def test_the_page_explains_its_figures_and_pictures(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert (
        "<b>token_accuracy</b>" in text and "<b>held_out_action_error</b>" in text and "<b>lam_mlp_r2</b>" not in text
    )
    assert text.count("green frame: success, red: failure") == 2 * len(ARMS)  # as caption and as text for the blind
    assert "with the code at position p set to k (p:k)" in text
    assert all("is better" in meaning or name == "loss" for name, meaning in FIGURE_MEANINGS.items())


def test_every_figure_that_a_study_collects_is_explained() -> None:
    assert {name for names in FIGURES.values() for name in names} <= set(FIGURE_MEANINGS)


def test_few_goals_give_bars_without_intervals() -> None:
    rollouts = tuple(Rollout("push", episode, episode < 2, 9) for episode in range(4))
    groups = compare(
        [ArmResult(arm, "in-domain", n, 0, "x", {}, rollouts) for arm in ("scratch", "lapa") for n in (2, 5)]
    )  # type: ignore[arg-type]
    assert main_table(groups).rows[1][2] == "50.0 (too few rollouts, under 10 goals a task)"
    assert "too few rollouts" in verdicts(groups[0])[0]
    figure = figures.success_by_split(groups)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([50.0, 50.0])  # type: ignore[attr-defined]
    figures.success_by_demonstrations(groups)


def test_a_whole_study_lacks_nothing_but_other_numbers_of_episodes(tmp_path: Path) -> None:
    results = []
    for split in ("in-domain", "cross-task", "cross-environment"):
        for arm in ARMS:
            for seed in range(3):
                rollouts = tuple(Rollout("push", episode, episode % 2 == 0, 9) for episode in range(50))
                result = ArmResult(arm, split, 2, seed, "made-up", {}, rollouts, {"token_accuracy": 0.5})  # type: ignore[arg-type]
                path = result.save(tmp_path)
                for name in (f"{path.stem}.png", f"{path.stem}-codes.png"):
                    Image.new("RGB", (2, 2)).save(path.with_name(name))
    results = load_results([tmp_path])
    assert missing(results, compare(results)) == ["One number of labelled episodes a task (2) and no other."]


def test_a_missing_seed_and_a_missing_task_are_named() -> None:
    results = [made_up("scratch", 0), made_up("scratch", 1), made_up("lapa", 0)]
    few = ArmResult("vpt", "in-domain", 2, 0, "made-up", {}, results[0].rollouts[:20], {"token_accuracy": 0.1})
    text = " ".join(missing([*results, few], compare([*results, few])))
    assert "no difference to scratch" not in text
    assert "lapa lacks seed 1." in text and "vpt lacks the tasks <reach> & pull." in text


def test_arms_that_share_no_seed_with_scratch_are_named() -> None:
    results = [made_up("scratch", 0), made_up("vpt", 0), made_up("lapa", 1)]
    groups = compare(results)
    assert any(text.endswith("share no seed and goal, of lapa.") for text in missing(results, groups))
    assert verdicts(groups[0])[0].startswith("How much LAPA recovers of the gap") and len(verdicts(groups[0])) == 2


def test_details_are_shown_of_the_number_of_episodes_that_splits_share() -> None:
    keys = [("in-domain", 1), ("in-domain", 2), ("cross-task", 2)]
    runs = [made_up(arm, split=split, demonstrations=n) for split, n in keys for arm in ("scratch", "lapa")]  # type: ignore[arg-type]
    assert [(group.split, group.demonstrations) for group in chosen(compare(runs))] == keys[1:]


def test_the_gap_is_marked_where_it_may_be_chance() -> None:
    assert gap_text(None) == "-"
    assert gap_text(Gap(None, note="gap not above zero")) == "- (gap not above zero)"
    assert gap_text(Gap(0.5, note="gap not above zero for certain")) == "0.50 (gap not above zero for certain)"
    assert gap_text(Gap(0.5, 0.1, 0.9)) == "0.50 [0.10, 0.90]"


def test_an_arm_has_its_own_colour_and_marker() -> None:
    assert set(figures.COLOURS) == set(figures.MARKERS) == set(ARMS)
    assert len(set(figures.COLOURS.values())) == len(set(figures.MARKERS.values())) == len(ARMS)


def test_bars_are_as_high_as_the_success_rates() -> None:
    figure = figures.success_by_split(compare([made_up("scratch"), made_up("lapa")]))
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([15.0, 65.0])  # type: ignore[attr-defined]


def test_a_table_reads_the_same_in_the_terminal_with_brackets_in_it() -> None:
    table = main_table(compare([made_up("scratch"), made_up("lapa")]))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(page.table_rich(table))
    assert table.rows[1][2] in captured.get()
    assert page.table_markdown(page.Table("", ("a|b",), (("c|d",),))) == "| a\\|b |\n| --- |\n| c\\|d |"
