"""The README's commands run as they stand, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

from lapa import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def readme_commands() -> list[str]:
    block = re.search(r"<!-- tested -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block.group(1).splitlines()


def test_the_stages_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in readme_commands():
        program, *arguments = shlex.split(command)
        assert program == "lapa"
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0, command
    assert (tmp_path / "runs" / "results" / "results.json").is_file()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_every_command_named_in_the_docs_exists() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ *(?:\$ )?lapa ([a-z].*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            verb = cli.find_verb(words)
            assert verb is not None, f"{path.name}: lapa {line}"
            options = words[len(verb.name.split()) :]
            if not {"--help", "..."} & set(options):
                cli.parse(verb, options)
