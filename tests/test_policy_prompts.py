"""Prompts: templates by name and dataset, any instruction, and the mistakes of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lapa.config import from_dict, to_dict
from lapa.policy.prompts import PROMPTS, Prompts, parse_prompts


def prompt_file(folder: Path, prompts: object) -> str:
    path = folder / "prompts.json"
    path.write_text(json.dumps(prompts))
    return str(path)


def test_each_dataset_has_its_template_and_the_rest_the_default(tmp_path: Path) -> None:
    written = {"default": "paper", "bridge": "Do {instruction}=now", "rt1": "plain"}
    prompts = parse_prompts(prompt_file(tmp_path, written), datasets=["bridge", "rt1", "arm"])
    assert prompts.text("lift", "bridge") == "Do lift=now"
    assert prompts.text("lift", "rt1") == "lift"
    assert prompts.text("lift", "arm") == prompts.text("lift") == PROMPTS["paper"].replace("{instruction}", "lift")


def test_prompts_are_saved_with_a_config() -> None:
    prompts = Prompts(PROMPTS["openvla"], (("bridge", "greife: {instruction} ✋"),))
    assert from_dict(Prompts, json.loads(json.dumps(to_dict(prompts)))) == prompts
    assert from_dict(Prompts, {}) == Prompts()


@pytest.mark.parametrize(
    "instruction", ["", "öffne die Schublade", "打开抽屉", "🤖", "{instruction} {0} }{", "\\n\x00"]
)
def test_any_instruction_stands_as_it_is(instruction: str) -> None:
    assert Prompts("go: {instruction}.").text(instruction) == f"go: {instruction}."


def test_surrogates_become_characters() -> None:
    assert Prompts().text("\ud83e\udd16 \ud83e!") == "🤖 \ufffd!"


def test_a_robot_acts_with_the_template_of_its_own_datasets(tmp_path: Path) -> None:
    prompts = parse_prompts(prompt_file(tmp_path, {"bridge": "paper", "rt1": "paper", "arm": "openvla"}))
    assert prompts.acting_as(["bridge", "rt1"]).default == PROMPTS["paper"]
    assert prompts.acting_as(["bridge", "arm"]).default == PROMPTS["plain"]
    assert prompts.acting_as([]) == prompts


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("papr", "unknown prompt 'papr'; did you mean 'paper'"),
        ("do it", "'do it' lacks {instruction}"),
        ("", "'' lacks {instruction}"),
        ({"bridge": "do {instrution}"}, r"prompts\.json: .*lacks {instruction}"),
        ({"bridge": 3}, r"prompts\.json: expected an object of prompts by dataset"),
        (["paper"], r"prompts\.json: expected an object of prompts by dataset"),
        ({"bridg": "paper"}, r"prompts\.json: unknown dataset 'bridg'; did you mean 'bridge'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompts(prompt if isinstance(prompt, str) else prompt_file(tmp_path, prompt), datasets=["bridge", "rt1"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts\.json: no such file"):
        parse_prompts(str(tmp_path / "prompts.json"))
