"""README and docs: commands and Python run as they stand or exist, links lead somewhere, the site holds every page."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lapa import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
# The tutorial's commands at the size of a test.
SMALLER = {
    r"--preset tiny": "--preset debug",
    r"--steps \d+": "--steps 3",
    r"--episodes (40|5)\b": "--episodes 2",
    r"--episodes 20": "--episodes 1 --max-steps 8 --workers 1",
}


def blocks_to_test(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block below `<!-- tested -->`."""
    return re.findall(r"<!-- tested -->\n```(\w+)\n(.*?)```", page.read_text(), re.DOTALL)


def run(blocks: list[tuple[str, str]]) -> None:
    names: dict[str, Any] = {}
    for language, text in blocks:
        if language == "python":
            exec(text, names)
            continue
        for command in text.replace("\\\n", "").splitlines():
            program, *arguments = shlex.split(command)
            assert program == "lapa"
            with pytest.raises(SystemExit) as exit_:
                cli.main(arguments)
            assert exit_.value.code == 0, command


def test_the_stages_of_the_readme_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(blocks_to_test(ROOT / "README.md"))
    assert (tmp_path / "runs" / "results" / "results.json").is_file()


@pytest.mark.usefixtures("simulators")
def test_the_tutorial_runs_at_the_size_of_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_to_test(DOCS / "tutorial.md")
    for long, short in SMALLER.items():
        assert any(re.search(long, text) for _, text in blocks), long
        blocks = [(language, re.sub(long, short, text)) for language, text in blocks]
    run(blocks)
    assert (tmp_path / "runs" / "tutorial" / "results_scratch" / "results.json").is_file()


def test_the_notebook_is_the_tutorial() -> None:
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = module.notebook((DOCS / "tutorial.md").read_text())
    written = json.loads((DOCS / "tutorial.ipynb").read_text())
    assert written == expected, "run python docs/notebook.py docs/tutorial.md docs/tutorial.ipynb"
    tested = [line for _, text in blocks_to_test(DOCS / "tutorial.md") for line in text.splitlines()]
    cells = ["".join(cell["source"]) for cell in written["cells"] if cell["cell_type"] == "code"]
    assert set(tested) <= {line.removeprefix("!") for cell in cells for line in cell.splitlines()}
    for cell in cells:
        if not cell.startswith("!"):
            compile(cell, "cell", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in set(re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", page.read_text())):
        target = (page.parent / link) if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings; MkDocs' own are checked when the site is built."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_exists(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^ *(?:\$ )?lapa ([a-z].*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        verb = cli.find_verb(words)
        assert verb is not None, f"lapa {line}"
        options = words[len(verb.name.split()) :]
        if not {"--help", "..."} & set(options):
            cli.parse(verb, options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_in_a_sentence_exists(page: Path) -> None:
    groups = {verb.name.split()[0] for verb in cli.VERBS}
    for words in map(str.split, re.findall(r"`lapa\s+([a-z][^`]*)`", page.read_text())):
        # A group alone or before a placeholder or an option, such as `lapa data SOURCE`.
        of_group = words[0] in groups and not "".join(words[1:2])[:1].islower()
        assert cli.find_verb(words) or of_group or words[0] == "help", f"lapa {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, page.name, "exec")


def test_the_site_names_every_page() -> None:
    named: list[str] = []

    def walk(entry: Any) -> None:
        if isinstance(entry, str):
            named.append(entry)
        for child in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            walk(child)

    walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    outside = {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert sorted(named) == sorted({page.name for page in DOCS.glob("*.md")} | outside)


def test_the_reference_has_every_public_name() -> None:
    import lapa

    documented = re.findall(r"^<!-- ::: lapa\.(\w+)", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(lapa.__all__)


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs MkDocs: pip install 'lapa-vla[docs]'")
    pytest.importorskip("mkdocstrings", reason="the site needs mkdocstrings: pip install 'lapa-vla[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "select_action" in (tmp_path / "reference.html").read_text()
