"""Prompts: a template around the task in words, one for all datasets or one for each.

    prompts = parse_prompts("prompts.json")     # {"default": "paper", "bridge": "In: {instruction}\\nOut:"}
    prompts.text("open the drawer", "bridge")

`paper` is LAPA's (https://arxiv.org/abs/2410.11758), `openvla` OpenVLA's (https://arxiv.org/abs/2406.09246).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lapa.console import warn
from lapa.errors import UserError, unknown
from lapa.files import errors_about, read_json, whole_characters

PLACE = "{instruction}"
PROMPTS = {
    "plain": "{instruction}",
    "paper": "<s> You are a helpful assistant. USER: What action should the robot take to `{instruction}` ASSISTANT:",
    "openvla": "In: What action should the robot take to {instruction}?\nOut:",
}


@dataclass(frozen=True)
class Prompts:
    """Templates in which `{instruction}` stands for the task in words. Part of a policy's config."""

    default: str = PROMPTS["plain"]
    """For datasets without a template of their own, and for a robot, whose observations belong to no dataset."""
    by_dataset: tuple[tuple[str, str], ...] = ()
    """(name of a dataset, its template)."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.by_dataset]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the dataset {name!r} has {names.count(name)} prompts; give it one")
        for template in (self.default, *(template for _, template in self.by_dataset)):
            if PLACE not in template:
                raise UserError(f"the prompt {template!r} lacks {PLACE}, which stands for the task in words")

    def template(self, dataset: str | None = None) -> str:
        """The template of a dataset; the default one where it has none of its own."""
        return dict(self.by_dataset).get(dataset or "", self.default)

    def text(self, instruction: str, dataset: str | None = None) -> str:
        """The prompt with this instruction, which may be empty and contain any character; its braces are kept."""
        # JSON may contain halves of surrogate pairs, on which tokenizers fail.
        return self.template(dataset).replace(PLACE, whole_characters(instruction))

    def acting_as(self, datasets: Sequence[str]) -> Prompts:
        """These prompts for a robot whose episodes are `datasets`: the template they share becomes the default.

        Where they have different ones, the default stays and a warning is printed.
        """
        templates = {self.template(dataset) for dataset in datasets}
        if len(templates) > 1:
            warn(
                "the datasets have several prompts: the policy acts with that of its --statistics-key, or else with "
                "the default one"
            )
            return self
        return replace(self, default=templates.pop()) if templates else self


def parse_prompts(prompt: str, datasets: Sequence[str] | None = None) -> Prompts:
    """The prompts of `--prompt`: a name, a template, or a JSON file of either by the name of a dataset.

    The file's key "default" is for datasets without a prompt of their own. datasets: the names that may have one;
    None: any. Raises UserError on an unknown name, a template without `{instruction}`, and an unknown dataset.
    """
    if not prompt.endswith(".json"):
        return Prompts(_template(prompt))
    written = read_json(Path(prompt))
    if not isinstance(written, dict) or not all(isinstance(value, str) for value in written.values()):
        raise UserError(f'{prompt}: expected an object of prompts by dataset, such as {{"default": "plain"}}')
    default = written.pop("default", "plain")
    with errors_about(Path(prompt)):
        for name in written:
            if datasets is not None and name not in datasets:
                raise unknown("dataset", name, datasets)
        return Prompts(_template(default), tuple((name, _template(value)) for name, value in written.items()))


def _template(name_or_template: str) -> str:
    if name_or_template in PROMPTS:
        return PROMPTS[name_or_template]
    if name_or_template.isidentifier():
        raise unknown("prompt", name_or_template, PROMPTS)
    return name_or_template
