"""What the policy reads: a template around the task in words, one for all datasets or one for each.

    prompts = parse_prompts("paper", ["bridge=In: {instruction}\\nOut:", "rt1=plain"], datasets=["bridge", "rt1"])
    prompts.text("open the drawer", "bridge")

`paper` is LAPA's (https://arxiv.org/abs/2410.11758), `openvla` OpenVLA's (https://arxiv.org/abs/2406.09246).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lapa.console import warn
from lapa.errors import UserError, unknown

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
    """For what has no template of its own, and for a robot at work, which belongs to no dataset."""
    by_dataset: tuple[tuple[str, str], ...] = ()
    """(name of a dataset, its template)."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.by_dataset]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the dataset {name!r} has {names.count(name)} prompts; give it one")
        for template in (self.default, *(template for _, template in self.by_dataset)):
            if PLACE not in template:
                raise UserError(f"the prompt {template!r} lacks {PLACE}, the place of the task's words")

    def template(self, dataset: str | None = None) -> str:
        """The template of a dataset; the default one where it has none of its own."""
        return dict(self.by_dataset).get(dataset or "", self.default)

    def require(self, dataset: str) -> None:
        """UserError for a dataset that has no prompt of its own."""
        known = [name for name, _ in self.by_dataset]
        if dataset not in known:
            raise unknown("dataset with a prompt of its own", dataset, known)

    def text(self, instruction: str, dataset: str | None = None) -> str:
        """What the policy reads. The instruction may be empty and hold any character; its braces stay as they are."""
        # Half a surrogate pair, as some JSON brings it, is no character: tokenizers stop at it.
        words = instruction.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.template(dataset).replace(PLACE, words)

    def acting_as(self, datasets: Sequence[str]) -> Prompts:
        """These prompts for a robot whose episodes are `datasets`: the template they share becomes the default.

        Where they have different ones the default stays, which the user is told.
        """
        templates = {self.template(dataset) for dataset in datasets}
        if len(templates) > 1:
            warn(
                "several prompts are learned: a robot at work reads that of its --statistics-key, or else the default "
                "one, unless it is said whose (`lapa evaluate --prompt-of DATASET`)"
            )
            return self
        return replace(self, default=templates.pop()) if templates else self


def parse_prompts(default: str, pairs: Sequence[str] = (), datasets: Sequence[str] | None = None) -> Prompts:
    """What the options `--prompt NAME_OR_TEMPLATE` and `--prompts DATASET=NAME_OR_TEMPLATE ...` mean.

    datasets: the names that may be given a prompt of their own; None: any. Raises UserError on an unknown name, a
    template without `{instruction}`, and a dataset that is not among them or is given twice.
    """
    by_dataset = []
    for pair in pairs:
        name, equals, prompt = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--prompts takes DATASET=PROMPT, got {pair!r}; --prompt sets the one for all datasets")
        if datasets is not None and name not in datasets:
            raise unknown("dataset in --prompts", name, datasets)
        by_dataset.append((name, _template(prompt)))
    return Prompts(_template(default), tuple(by_dataset))


def _template(name_or_template: str) -> str:
    if name_or_template in PROMPTS:
        return PROMPTS[name_or_template]
    if name_or_template.isidentifier():
        raise unknown("prompt", name_or_template, PROMPTS)
    return name_or_template
