"""Prompts: templates by name and dataset, any instruction, and the mistakes of the command line."""

from __future__ import annotations

import json

import pytest

from lapa.config import from_dict, to_dict
from lapa.policy.prompts import PROMPTS, Prompts, parse_prompts


def test_each_dataset_has_its_template_and_the_rest_the_default() -> None:
    prompts = parse_prompts("paper", ["bridge=Do {instruction}=now", "rt1=plain"], datasets=["bridge", "rt1", "arm"])
    assert prompts.text("lift", "bridge") == "Do lift=now"
    assert prompts.text("lift", "rt1") == "lift"
    assert prompts.text("lift", "arm") == prompts.text("lift") == PROMPTS["paper"].replace("{instruction}", "lift")


def test_prompts_are_saved_with_a_config() -> None:
    prompts = parse_prompts("openvla", ["bridge=greife: {instruction} ✋"])
    assert from_dict(Prompts, json.loads(json.dumps(to_dict(prompts)))) == prompts
    assert from_dict(Prompts, {}) == Prompts()


@pytest.mark.parametrize(
    "instruction", ["", "öffne die Schublade", "打开抽屉", "🤖", "{instruction} {0} }{", "\\n\x00"]
)
def test_any_instruction_stands_as_it_is(instruction: str) -> None:
    assert Prompts("go: {instruction}.").text(instruction) == f"go: {instruction}."


def test_surrogates_become_characters() -> None:
    assert Prompts().text("\ud83e\udd16 \ud83e!") == "🤖 \ufffd!"


def test_a_robot_acts_with_the_template_of_its_own_datasets() -> None:
    prompts = parse_prompts("plain", ["bridge=paper", "rt1=paper", "arm=openvla"])
    assert prompts.acting_as(["bridge", "rt1"]).default == PROMPTS["paper"]
    assert prompts.acting_as(["bridge", "arm"]).default == PROMPTS["plain"]
    assert prompts.acting_as([]) == prompts


@pytest.mark.parametrize(
    ("default", "pairs", "message"),
    [
        ("papr", [], "unknown prompt 'papr'; did you mean 'paper'"),
        ("do it", [], "'do it' lacks {instruction}"),
        ("", [], "'' lacks {instruction}"),
        ("plain", ["bridge=do {instrution}"], "lacks {instruction}"),
        ("plain", ["paper"], "--prompts takes DATASET=PROMPT, got 'paper'"),
        ("plain", ["bridg=paper"], "unknown dataset in --prompts 'bridg'; did you mean 'bridge'"),
        ("plain", ["bridge=paper", "bridge=plain"], "'bridge' has 2 prompts"),
    ],
)
def test_mistakes_are_named(default: str, pairs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompts(default, pairs, datasets=["bridge", "rt1"])
