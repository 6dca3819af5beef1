"""What commands print: results on standard output, progress in a log and in a terminal on standard error."""

from __future__ import annotations

import json
import re

import pytest
from rich.progress import Progress, ProgressSample
from rich.table import Table

from lapa import console


@pytest.fixture
def table() -> Table:
    table = Table("figure", "value")
    table.add_row("error", "0.5")
    return table


def test_results_go_to_standard_output(table: Table, capsys: pytest.CaptureFixture) -> None:
    console.say("a message")
    console.print_results({"error": 0.5}, table, "verdict: good: it is\x1b[2J small", as_json=False)
    printed = capsys.readouterr()
    assert printed.err == "a message\n"
    assert "error" in printed.out and "verdict: good: it is\\x1b[2J small" in printed.out


def test_json_is_one_object(table: Table, capsys: pytest.CaptureFixture) -> None:
    figures = {"error": 0.5, "name": "a long line " * 40}
    console.print_results(figures, table, as_json=True)
    printed = capsys.readouterr().out
    assert json.loads(printed) == figures and printed.count("\n") == 1


def test_names_between_colons_are_no_emoji(capsys: pytest.CaptureFixture) -> None:
    table = Table("a :100: title")
    table.add_row("a :100: cell")
    console.say("a :100: message")
    console.finish("a :100: artifact", "folder:100:")
    console.print_results({"name": ":100:"}, as_json=True)
    console.print_results({}, table, "a :100: line", as_json=False)
    printed = capsys.readouterr()
    assert (printed.err.count(":100:"), printed.out.count(":100:")) == (3, 4)


@pytest.mark.parametrize(("figure", "error"), [(float("nan"), ValueError), (object(), TypeError)])
def test_json_holds_no_figure_that_json_has_not(figure: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        console.print_results({"error": figure}, as_json=True)


def shown(bar: Progress) -> None:
    with bar:
        task = bar.add_task("latent action model", total=4, completed=1, note="")
        bar.update(task, completed=2, note="loss 0.1")
        bar.advance(task)
        bar.advance(task)


def test_without_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.console, "is_interactive", False)
    shown(console.progress())
    (line,) = capsys.readouterr().err.splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"{stamp}  latent action model  4/4 \(100%\), loss 0\.1, 0:00:00 elapsed", line)
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    shown(console.progress())
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"\d/4 \(\d+%\)", line) for line in lines] == [["2/4 (50%)"], ["3/4 (75%)"], ["4/4 (100%)"]]
    assert " left" in lines[1] and " left" not in lines[2]


def test_a_loop_that_is_stopped_ends_with_a_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.console, "is_interactive", False)
    with pytest.raises(KeyboardInterrupt), console.progress() as bar:
        bar.update(bar.add_task("episodes", total=4, note=""), completed=3)
        raise KeyboardInterrupt
    assert "episodes  3/4 (75%)" in capsys.readouterr().err


def test_the_bar_labels_its_two_times() -> None:
    with Progress(disable=True) as bar:
        number = bar.add_task("episodes", total=100)
        task = bar.tasks[number]
        assert console.times_of(task) == "0:00:00 elapsed"
        task._progress.extend([ProgressSample(0.0, 1.0), ProgressSample(1.0, 1.0)])
    assert console.times_of(task) == "0:00:00 elapsed, 0:01:40 left"
