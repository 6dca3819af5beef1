"""Verdicts: one sentence on what was measured, good, doubtful or bad, and why.

The thresholds are in one table here; docs/metrics.md has the measurement that each comes from. A verdict is that of the
worst figure.

    verdict = judge(of_latent_actions(figures, codebook_size=8))    # level, reasons; str(verdict) is the sentence
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["good", "doubtful", "bad"]
# From the best on.
LEVELS: tuple[Level, ...] = ("good", "doubtful", "bad")
MOST_REASONS = 3


@dataclass(frozen=True)
class Threshold:
    """good, bad: from where on a figure is good, and where it is bad; a figure between them is doubtful.

    Small figures are good where `good` is below `bad`. text: the figure in words, to so many decimal places.
    """

    good: float
    bad: float
    text: str
    places: int = 2

    def level(self, value: float) -> Level:
        sign = 1 if self.good < self.bad else -1
        return "good" if sign * value <= sign * self.good else "bad" if sign * value >= sign * self.bad else "doubtful"

    def reason(self, value: float) -> str:
        """The figure in words, and what is good where it is not."""
        side = "at most" if self.good < self.bad else "at least"
        wanted = "" if self.level(value) == "good" else f" (good: {side} {self.good:g})"
        return self.text.format(self._rounded(value)) + wanted

    def _rounded(self, value: float) -> float:
        """The nearest rounded number that is on the same side of both thresholds."""
        scale = 10.0**self.places
        near = (rounded(value * scale) / scale for rounded in (round, math.floor, math.ceil))
        return next((each for each in near if self.level(each) == self.level(value)), value)


PERPLEXITY = "the codes of a position have a perplexity of {:.1f}"
THRESHOLDS = {
    # Of a latent action model.
    "perplexity": Threshold(2.0, 1.5, PERPLEXITY, places=1),
    "perplexity_of_two": Threshold(1.5, 1.1, PERPLEXITY, places=1),
    "shuffled_over_own": Threshold(
        2.0, 1.05, "another pair's latent action gives {:.2f} times the error of a pair's own"
    ),
    "error_over_copying": Threshold(0.6, 1.0, "the error is {:.2f} of that of copying the first frame"),
    "codes_used": Threshold(0.5, 0.0, "{:.0%} of the codes are used"),
    "donor_share": Threshold(0.6, 0.9, "in another scene, {:.2f} of what a latent action brings is its own frame"),
    "same_code_over_chance": Threshold(1.5, 1.05, "in another scene a code returns {:.2f} times as often as by chance"),
    "action_over_pixels": Threshold(0.5, 0.1, "the codes explain {:.2f} of the true actions that pixels explain"),
    "relative_error_over_frames": Threshold(
        0.6, 0.9, "the codes' error of LARYBench's relative actions is {:.2f} of that without them"
    ),
    # Of a policy on recorded episodes.
    "normalised_error": Threshold(0.35, 1.0, "the action error is {:.2f} of that of always the mean action"),
    "token_gain": Threshold(0.4, 0.0, "the policy predicts {:.0%} of the codes that are not the most frequent one"),
}
# R2 of the pixel difference below which true actions cannot be read off these pairs, and latent actions are not judged.
READABLE = 0.2
# Seeds of each arm of a study; with fewer the interval is wrong too often.
LEAST_SEEDS = 3
# Below it errors are alike.
SMALLEST_ERROR = 1e-12


@dataclass(frozen=True)
class Verdict:
    """level: good, doubtful or bad. reasons: why, each a clause."""

    level: Level
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"verdict: {self.level}: {'; '.join(self.reasons)}"

    def advised(self, advice: str) -> Verdict:
        """The same with what to try, where it is not good."""
        return self if self.level == "good" else Verdict(self.level, (*self.reasons, advice))

    def at_best_doubtful(self, reason: str) -> Verdict:
        """The same with one more reason, for which it is not good."""
        return Verdict("doubtful" if self.level == "good" else self.level, (reason, *self.reasons))

    def as_json(self) -> dict[str, Any]:
        return {"level": self.level, "reasons": list(self.reasons)}


def judge(figures: Mapping[str, float]) -> Verdict:
    """The verdict of the worst figure. figures: by their names in THRESHOLDS."""
    if not figures:
        return Verdict("doubtful", ("nothing was measured that has a threshold",))
    levels = {name: THRESHOLDS[name].level(value) for name, value in figures.items()}
    worst = max(levels.values(), key=LEVELS.index)
    reasons = [THRESHOLDS[name].reason(figures[name]) for name in THRESHOLDS if levels.get(name) == worst]
    return Verdict(worst, tuple(reasons[:MOST_REASONS]))


def suggested(verdict: Verdict, go_on: Sequence[str], look: Sequence[str] = ()) -> list[str]:
    """The commands to run next, by their words; an empty one is left out.

    To go on where the verdict is good or doubtful, and to look first where it is doubtful or bad.
    """
    fitting = {"good": [go_on], "doubtful": [look, go_on], "bad": [look]}
    return [shlex.join(command) for command in fitting[verdict.level] if command]


def perplexity_name(codebook_size: int) -> str:
    """The threshold of a codebook's perplexity, which is at most its size."""
    return "perplexity_of_two" if codebook_size == 2 else "perplexity"


def of_latent_actions(figures: Mapping[str, Any], codebook_size: int) -> dict[str, float]:
    """What is judged of the figures of `lapa latent probe`, as far as they are there and defined."""
    errors, usage, transfer = (figures.get(part, {}) for part in ("reconstruction", "usage", "transfer"))
    actions = figures.get("action", {}).get("mlp", {})
    pixels = actions.get("pixel_difference", {}).get("r2", 0.0)
    found = {
        perplexity_name(codebook_size): usage.get("perplexity"),
        "shuffled_over_own": max(errors["mse_shuffled"], SMALLEST_ERROR) / max(errors["mse"], SMALLEST_ERROR),
        "error_over_copying": ratio(errors["mse"], errors["mse_copy"]),
        "codes_used": usage.get("codes_used"),
        "donor_share": transfer.get("donor_share"),
        "same_code_over_chance": ratio(transfer.get("same_code"), transfer.get("same_code_chance")),
        "relative_error_over_frames": figures.get("lary", {}).get("relative_error_over_frames"),
        "action_over_pixels": ratio(actions["quantized"]["r2"], pixels) if pixels >= READABLE else None,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def of_policy(figures: Mapping[str, Any]) -> dict[str, float]:
    """What is judged of the figures of `lapa policy measure`, as far as they are there and defined."""
    found = {"normalised_error": figures.get("normalised_error")}
    if "token_accuracy" in figures:
        most = figures["most_frequent_token"]
        found["token_gain"] = ratio(figures["token_accuracy"] - most, 1 - most)
    return {name: float(value) for name, value in found.items() if value is not None}


def ratio(value: float | None, over: float | None) -> float | None:
    """value / over; None where one is missing, or `over` is 0 but for rounding."""
    return None if value is None or over is None or over <= 1e-12 else value / over
