"""The command line: help in the order of the flow, at once; a mistake is one line and the nearest name."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lapa import cli


def lapa(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lapa", *arguments], capture_output=True, text=True)


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_help_names_every_command_in_the_order_of_the_flow() -> None:
    lines = lapa("--help").stdout
    positions = [lines.index(f"  {verb.name} ") for verb in cli.VERBS]
    assert positions == sorted(positions)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lapa.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'tyro', 'rich', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_help_answers_in_half_a_second() -> None:
    started = time.monotonic()
    lapa("--help")
    assert time.monotonic() - started < 0.5


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["data"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "data videos" in shown
    assert "latent train" not in shown


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_every_command_has_options_with_help(verb: cli.Verb, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*verb.name.split(), "--help"])
    assert exit_.value.code == 0
    assert "--" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture) -> None:
    assert "did you mean 'latent train'" in failure(capsys, "latnt", "train")
    assert "unknown command 'data vidoes'; did you mean 'data videos'" in failure(capsys, "data", "vidoes")


def test_unknown_preset(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    error = failure(capsys, "latent", "train", "--preset", "tinny", "--data", "x", "--out", str(tmp_path / "lam"))
    assert error.startswith("lapa: error: unknown preset 'tinny'; did you mean 'tiny'?")


def test_missing_dataset_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    error = failure(capsys, "latent", "train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "lam"))
    assert "no such dataset folder" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "lam").exists()


@pytest.mark.parametrize(
    ("options", "name"), [(["--preset", "paper"], "paper"), (["--preset=debug"], "debug"), ([], "tiny")]
)
def test_preset_name(options: list[str], name: str) -> None:
    assert cli.preset_name(options) == name


@pytest.mark.parametrize(
    ("given", "gathered"),
    [
        (["--data", "a", "b", "--out", "o"], ["--out", "o", "--data", "a", "b"]),
        (["--data", "a", "--seed", "1", "--data", "b:0.5"], ["--seed", "1", "--data", "a", "b:0.5"]),
        (["--data=x=a", "--labels", "l", "--data=y=b"], ["--data", "x=a", "y=b", "--labels", "l"]),
        (["LAM", "--overwrite"], ["LAM", "--overwrite"]),
    ],
)
def test_an_option_given_several_times_has_all_its_values(given: list[str], gathered: list[str]) -> None:
    assert cli.gathered(given) == gathered


def test_repeated_datasets_reach_the_command(tmp_path: Path) -> None:
    verb = cli.find_verb(["latent", "train"])
    assert verb is not None
    config = cli.parse(verb, ["--data", "one=a:2", "--steps", "3", "--data", "b", "--out", str(tmp_path)])
    assert (config.data, config.loop.steps) == (("one=a:2", "b"), 3)
