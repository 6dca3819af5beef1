"""The command line: help in the order of the flow, at once; a mistake is one line and the nearest name."""

import dataclasses
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import typing
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import tyro
from rich.table import Table

from lapa import cli, console, presets
from lapa.cli import imported
from lapa.data.writer import DatasetWriter
from lapa.errors import UserError, printable
from lapa.help import command_help


def lapa(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lapa", *arguments], capture_output=True, text=True)


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_help_names_every_command_in_the_order_of_the_flow() -> None:
    lines = lapa("--help").stdout
    positions = [lines.index(f"\n  {verb.name} ") for verb in cli.VERBS]
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


def test_help_of_data_ends_with_the_form_of_a_dataset() -> None:
    code = (
        "import sys; from lapa.cli import main\n"
        "try: main(['data', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'av', 'lapa.data.spec'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "rlds:bridge_dataset/1.0.0,camera=image_0" in done.stdout
    assert "`[NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]`" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_help_cites_no_file_that_a_wheel_lacks(verb: cli.Verb) -> None:
    default = cli.preset(verb, "tiny")
    assert "docs/" not in command_help(verb.name, verb.help, imported(verb.config), default, verb.run)


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_help_lists_the_options_that_are_parsed(verb: cli.Verb, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*verb.name.split(), "--help"])
    assert exit_.value.code == 0
    ours = capsys.readouterr().out
    default = {"default": presets.named(verb.presets, "tiny")} if verb.presets else {}
    with pytest.raises(SystemExit):
        tyro.cli(imported(verb.config), args=["--help"], **default)
    listed = re.findall(r"^│? {1,4}(--[a-z][a-z0-9.-]+)", capsys.readouterr().out, re.MULTILINE)
    assert {name.replace("[no-]", "") for name in re.findall(r"^  (--\S+)", ours, re.MULTILINE)} == set(listed)
    assert max(map(len, ours.partition("Required:")[2].splitlines()), default=0) <= 100


def test_help_starts_with_examples_and_what_is_required(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["latent", "train", "--help", "--preset", "debug"])
    shown = capsys.readouterr().out
    headings = ["Examples", "Required", "Common", "Options", "Model", "Training loop", "Optimiser"]
    assert re.findall(r"^([A-Z].*):$", shown, re.MULTILINE) == headings
    assert "  lapa latent train --preset tiny --data DATASET --out LAM\n" in shown
    assert re.search(r"--steps INT +Optimiser steps. \(default: 40\)", shown)


@pytest.mark.parametrize("wrong", [False, True], ids=["--help", "a wrong path"])
def test_neither_help_nor_a_wrong_path_imports_torch(wrong: bool, tmp_path: Path) -> None:
    code = (
        "import sys; from lapa.cli import main\n"
        "for command in {commands}:\n"
        "    try: main(command)\n"
        "    except SystemExit as exit: assert exit.code == {code}, (command, exit)\n"
        "    assert not {{'torch', 'transformers'}} & set(sys.modules), command\n"
    )
    commands = [[*verb.name.split(), "--help"] for verb in cli.VERBS]
    if wrong:
        verbs = [verb for verb in cli.VERBS if verb.name not in NO_INPUTS]
        commands = [[*verb.name.split(), *wrong_paths(verb, tmp_path)] for verb in verbs]
    code = code.format(commands=commands, code=2 if wrong else 0)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if wrong:
        assert len(done.stderr.splitlines()) == len(commands), done.stderr
        assert all(line.startswith("lapa: error: ") for line in done.stderr.splitlines())


# Commands that read no file of the user's.
NO_INPUTS = ("demo", "data synthetic", "data metaworld", "data language-table", "envs", "study run", "completion")


def wrong_paths(verb: cli.Verb, folder: Path) -> list[str]:
    """Options in which every input is a path that does not exist."""
    options: list[str] = []
    config = imported(verb.config)
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            positional = tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ())
            value = str(folder / ("out" if field.name == "out" else "none"))
            options += [value] if positional else [f"--{field.name.replace('_', '-')}", value]
    return options


def test_commands_of_other_distributions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    verb = cli.Verb("robot greet", "test_cli:GreetConfig", "test_cli:greet", "greets a robot")
    entry_point = SimpleNamespace(load=lambda: verb)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point] * (group == "lapa.commands"))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "  robot greet " in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["robot", "greet", "--name", "Fetch"])
    assert (exit_.value.code, capsys.readouterr().out) == (0, "hello Fetch\n")


@dataclasses.dataclass(frozen=True)
class GreetConfig:
    name: str
    """Whom to greet."""


def greet(config: GreetConfig) -> None:
    print(f"hello {config.name}")


# Escapes that colour and set the title, a bell, C1, ends of lines, marks of direction, half a surrogate pair, markup.
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J\r\n\x0bdown\x85 \u202eevil\u2066 \u2028 \x00\x7f\ufeff\U000e0041 \ud800"
HOSTILE += " [/x] [bold]"


def without_controls(text: str) -> bool:
    return all(letter == "\n" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in text)


def test_texts_of_files_reach_no_control_of_the_terminal(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def lines() -> list[str]:
        shown = capsys.readouterr().err
        assert without_controls(shown)
        return shown.splitlines()

    for speak in (console.say, console.warn, lambda text: console.finish(text, "a")):
        speak(HOSTILE)
        (line,) = lines()
        assert r"\x1b[31mred\x1b]0;title\x07 \x9b2J down \u202eevil" in line and line.endswith(("[/x] [bold]", ": a"))
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.console.print(table)
    assert "[/x]" in "".join(lines())
    with console.progress() as bar:
        bar.add_task(HOSTILE, total=1, note=HOSTILE)
    lines()
    assert without_controls(str(UserError(HOSTILE))) and "\n" not in str(UserError(HOSTILE))
    assert printable("no\u200dthing of a t\u00e9xt \u05d0\u6587 \U0001f600 changes") == (
        "no\u200dthing of a t\u00e9xt \u05d0\u6587 \U0001f600 changes"
    )


def test_a_dataset_of_hostile_texts_is_shown(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    text = HOSTILE.replace("\ud800", "")
    names = [f"{text} {number}" for number in range(2)]
    writer = DatasetWriter(tmp_path / "d", fps=10, cameras={"front": (16, 16)}, action_names=names)
    writer.add_episode({"front": np.full((3, 16, 16, 3), 9, np.uint8)}, text, actions=np.zeros((3, 2), np.float32))
    writer.finish()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["data", "info", str(tmp_path / "d")])
    shown = capsys.readouterr()
    assert exit_.value.code == 0 and without_controls(shown.err + shown.out)
    assert r"\u202eevil" in shown.out and (tmp_path / "d" / "contact_sheet.png").exists()


def test_an_error_of_several_lines_is_one(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(f"{HOSTILE}\nTraceback"), UserError(f"a\n  b\r{HOSTILE}"), FloatingPointError("x\ny")):
        monkeypatch.setattr(cli, "find_verb", Mock(side_effect=error))
        shown = failure(capsys, "data", "info", "x")
        assert shown.startswith("lapa: error: ") and without_controls(shown) and len(shown.splitlines()) == 1


def test_a_lack_of_memory_is_one_line_and_a_bug_keeps_its_traceback(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = ValueError("wrapped")
    cause.__cause__ = MemoryError()
    for error in (
        MemoryError("Unable to allocate 8.00 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        pa.ArrowMemoryError("malloc of size 64 failed"),
        cause,
    ):
        monkeypatch.setattr(cli, "find_verb", Mock(side_effect=error))
        shown = failure(capsys, "data", "info", "x")
        assert shown.startswith("lapa: error: out of memory (") and "--batch-size" in shown
        assert len(shown.splitlines()) == 1
    for bug in (RuntimeError("shapes do not fit"), KeyError("a"), ImportError("no module named x")):
        monkeypatch.setattr(cli, "find_verb", Mock(side_effect=bug))
        with pytest.raises(type(bug)):
            cli.main(["data", "info", "x"])


INTERRUPTED = """
import os, signal, threading, time
from lapa import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's job in the background ignores it.
class Slow:
    def __del__(self):
        # A second Ctrl-C while the first one unwinds: in a finaliser, an exception would be printed.
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
def wait(arguments):
    slow = Slow()
    threading.Thread(target=time.sleep, args=(60,)).start()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
cli._dispatch = wait
cli.main([])
"""
INTERRUPTED_AT_EXIT = INTERRUPTED.replace(
    "slow = Slow()", "threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()"
)


@pytest.mark.parametrize("code", [INTERRUPTED, INTERRUPTED_AT_EXIT])
def test_a_second_ctrl_c_ends_quietly(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr, done.stdout) == (130, "", "")


def test_unknown_command(capsys: pytest.CaptureFixture) -> None:
    assert "did you mean 'latent train'" in failure(capsys, "latnt", "train")
    assert "unknown command 'data vidoes'; did you mean 'data videos'" in failure(capsys, "data", "vidoes")
    assert "did you mean 'help'" in failure(capsys, "hlp")
    assert failure(capsys, "xyzzy") == "lapa: error: unknown command 'xyzzy'; `lapa help` lists all commands\n"
    assert "unknown command 'data nosuch'" in failure(capsys, "help", "data", "nosuch")
    assert "unknown command 'frobnicate'" in failure(capsys, "frobnicate", "--foo")


@pytest.mark.parametrize("words", [["--foo"], ["--foo", "--bar"], ["latent", "--foo"], ["--foo", "latent", "train"]])
def test_unknown_option_in_place_of_a_command(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert failure(capsys, *words) == "lapa: error: unknown option '--foo'; `lapa help` lists all commands\n"


@pytest.mark.parametrize("words", [["help"], ["help", "latent", "probe"], ["completion", "bash"]])
def test_a_reader_that_goes_ends_a_command_quietly(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-m", "lapa", *words], stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_help_is_a_command_too(capsys: pytest.CaptureFixture) -> None:
    shown = {}
    asked = (["help", "latent", "probe"], ["latent", "probe", "--help"], ["--help", "latent", "probe"])
    for words in (*asked, ["help"], ["--help"], ["help", "help"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(words)
        assert not exit_.value.code
        shown[" ".join(words)] = capsys.readouterr().out
    assert shown["help latent probe"] == shown["latent probe --help"] and "--num-pairs" in shown["help latent probe"]
    assert shown["help latent probe"] == shown["--help latent probe"]
    assert shown["help"] == shown["--help"] == shown["help help"]


def test_help_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["help"])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_help_of_a_command_fits_into_80_columns(verb: cli.Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the examples, which are copied."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = command_help(verb.name, verb.help, cli.imported(verb.config), cli.preset(verb, cli.PRESET), verb.run)
    lines = [line for line in shown.splitlines() if not line.startswith(("  lapa ", "  torchrun "))]
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)


COMPLETE = """
source "$1"
function=$(complete -p lapa | sed 's/.*-F \\([^ ]*\\).*/\\1/')
completed() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
    "$function" lapa "${@: -1}" "${@: -2:1}"
    echo "${COMPREPLY[*]}"
}
completed lapa lat
completed lapa he
completed lapa latent ""
completed lapa latent train --augm
completed lapa policy finetune --head ""
completed lapa export lerobot --stat
completed lapa help export ""
"""
# zsh sets `words` and `CURRENT`, and shows what `_describe` is given.
COMPLETE_ZSH = """
_describe() { print -- ${completion_array} }
words=(lapa help export ""); CURRENT=4; source "$1"
words=(lapa latent train --quantizer v); CURRENT=5; source "$1"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_shell_completes_commands_options_and_values(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["completion", "bash"])
    (tmp_path / "lapa").write_text(capsys.readouterr().out)
    ran = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", tmp_path / "lapa"], capture_output=True, text=True, check=True
    )
    command, shows_help, commands, option, values, of_one, helped = ran.stdout.splitlines()
    assert (command, shows_help, option, values) == ("latent", "help", "--augment", "bins chunk flow")
    assert set(commands.split()) == {"compare", "probe", "show", "train"}
    assert (of_one, helped) == ("--statistics-key", "lerobot")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_installed_where_the_shell_looks(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--install-completion"])
    assert not exit_.value.code
    path = tmp_path / {"bash": ".local/share/bash-completion/completions/lapa", "zsh": ".zfunc/_lapa"}[shell]
    shown = capsys.readouterr()
    assert not shown.out and str(path.parent) in shown.err.splitlines()[-1]
    if shell == "zsh" and shutil.which("zsh"):
        ran = subprocess.run(["zsh", "-fc", COMPLETE_ZSH, "zsh", path], capture_output=True, text=True, check=True)
        policy, quantizers = ran.stdout.splitlines()
        assert policy == "lerobot:a policy -> a folder that LeRobot's tools run, evaluate and finetune"
        assert quantizers == "vq:vq"


def test_unknown_preset(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    error = failure(capsys, "latent", "train", "--preset", "tinny", "--data", "x", "--out", str(tmp_path / "lam"))
    assert error.startswith("lapa: error: unknown preset 'tinny'; did you mean 'tiny'?")


def test_missing_dataset_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    error = failure(capsys, "latent", "train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "lam"))
    assert "no such dataset folder" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "lam").exists()


def test_inputs_that_do_not_exist_are_named(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    none, data = str(tmp_path / "none"), str(tmp_path)
    error = failure(capsys, "policy", "finetune", "--policy", none, "--data", data, "--out", none)
    assert error == f"lapa: error: {none}: no such folder; make a policy with `lapa policy pretrain` or `finetune`\n"
    error = failure(capsys, "policy", "pretrain", "--labels", none, "--data", data, "--out", none)
    assert f"{none}: no such labels folder" in error
    error = failure(capsys, "latent", "train", "--data", "vidoes:x", "--out", none)
    assert "unknown source 'vidoes'; did you mean 'videos'" in error


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


def test_help_of_a_source_has_its_own_examples_and_texts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", "videos", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Examples: lapa data videos " in said and "clips without caption and captions without clip" in said


@pytest.mark.parametrize(
    "options", [("--frames", "0"), ("--fps", "0"), ("--fps", "-3"), ("--fps", "nan"), ("--size", "0"), ("--size", "9")]
)
def test_numbers_that_make_no_dataset_are_one_line(
    options: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["data", "synthetic", *options, "--out", str(tmp_path / "d")])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.startswith("lapa: error: ") and "Traceback" not in said
