"""What a study found and what it lacks, in sentences made from its numbers, beside what the paper found.

The paper is LAPA (Ye et al., https://arxiv.org/abs/2410.11758).

LAPA is above scratch by 12.0 points (95% interval 4.0 to 20.0, which excludes zero).
In these trainings (one seed), LAPA is above scratch by 12.0 points (95% interval over goals 4.0 to 20.0, ...).
LAPA is not distinguishable from VPT: the difference is +2.0 points, its 95% interval -5.0 to 9.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lapa.study.results import ARMS, SPLITS, Arm, ArmResult, Split
from lapa.study.statistics import LEAST_GOALS, NUM_DRAWS, TOO_FEW, TRAININGS, Estimate, Gap, Group

LEAST_SEEDS, LEAST_ROLLOUTS = 3, 50  # a task, of what is reported (the project's own bar)
MAX_NAMES = 4  # of runs, in a sentence

ARM_MEANINGS: dict[Arm, str] = {
    "scratch": "learns from the labelled robot episodes alone and sees no video.",
    "vpt": "an inverse dynamics model, trained on the labelled episodes, guesses the actions between the frames of "
    "the videos; the policy is pretrained on these guesses, then finetuned on the labelled episodes.",
    "unipi": "a video model draws what should happen next from the picture and the instruction; the same inverse "
    "dynamics model reads the actions off the drawn frames.",
    "lapa": "a latent action model finds, without any action, a short code for what changes between two frames of a "
    "video; the policy is pretrained to predict these codes, then finetuned on the labelled episodes.",
    "actionvla": "is pretrained on the true actions of the same videos, which no other arm may see, then finetuned: "
    "what the videos would be worth if they had labels.",
}
SPLIT_MEANINGS: dict[Split, str] = {
    "in-domain": "the videos show the tasks of the labelled episodes, in the same surroundings.",
    "cross-task": "the videos show other tasks.",
    "cross-environment": "the videos show the same tasks from another camera, in other colours and textures.",
}
WHY_WORDING = (
    "Videos come with captions in every phrasing of a task, the few labelled episodes hold only some. On goals in "
    "words that scratch has never heard (unheard), an arm with video may win by the captions alone; on heard goals "
    "scratch knows the words too."
)
HEARD = "on goals whose wording the labelled episodes hold"


INTERVALS = (
    f"Intervals are 95% percentile intervals of {NUM_DRAWS} draws of the goals of each task, the same for every arm "
    f"(differences are paired); to each are added {TRAININGS} draws of how far the mean of a few trainings may lie "
    "from that of many, by Student's t over the seeds: with few seeds intervals are wide, with two very wide. With one "
    "seed they cover goals and no training at all, and are the narrower for it: what is said then is about these "
    "trainings only. "
    f"Under {LEAST_GOALS} goals a task there is no interval. An interval from 0 to 0 says that no rollout succeeded, "
    "not that none could. The success rate is the mean over tasks of the mean over seeds. Gap recovered is (arm - "
    "scratch) / (actionvla - scratch): 0 is no better than without video, 1 is as good as with true actions; draws in "
    "which actionvla is not above scratch count as beyond both ends of its interval. Mean rank: 1 is the best arm; it "
    "is taken over the tasks and seeds that all arms played."
)
STRIP = "a row is a task, columns are moments from start to end; green frame: success, red: failure"
CODES = (
    "rows: pairs of frames; columns: the first frame, the true second frame, what the model draws with the pair's own "
    "codes, then with the code at position p set to k (p:k); green: the pair's own code"
)


@dataclass(frozen=True)
class PaperColumn:
    """Success rates in percent from the paper's tables."""

    setting: str
    split: Split | None
    success: dict[Arm, float]

    def gap(self, arm: Arm) -> float:
        """Gap recovered."""
        return (self.success[arm] - self.success["scratch"]) / (self.success["actionvla"] - self.success["scratch"])


def _paper(setting: str, split: Split | None, *success: float) -> PaperColumn:
    return PaperColumn(setting, split, dict(zip(ARMS, success, strict=True)))


# Language Table (250 rollouts a cell) with goals seen and unseen in finetuning, and SIMPLER's WidowX average.
PAPER = (  #                                                        scratch  vpt  unipi  lapa  actionvla
    _paper("in-domain, seen", "in-domain", 15.6, 44.0, 22.0, 62.0, 77.0),
    _paper("in-domain, unseen", "in-domain", 15.2, 32.8, 13.2, 49.6, 58.8),
    _paper("cross-task, seen", "cross-task", 27.2, 72.0, 20.8, 73.2, 77.0),
    _paper("cross-task, unseen", "cross-task", 22.4, 60.8, 16.0, 54.8, 58.8),
    _paper("cross-environment, seen", "cross-environment", 15.6, 18.0, 13.6, 33.6, 64.8),
    _paper("cross-environment, unseen", "cross-environment", 15.2, 18.4, 12.0, 29.6, 54.0),
    _paper("SIMPLER", None, 34.4, 51.0, 1.3, 57.3, 63.5),
)


def where(group: Group) -> str:
    return f"{group.split}, {counted(group.demonstrations, 'labelled episode')} a task"


def stage_of(title: str, result: ArmResult) -> str:
    """A stage by what it is called in every arm: `pretraining` for `pretraining lapa`."""
    return title.removesuffix(f" {result.arm}")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def points(estimate: Estimate) -> str:
    """A difference of success rates and over how many seeds, where few: `+12.0 [4.0, 20.0] (1 seed)`."""
    seeds = f" ({counted(estimate.num_seeds, 'seed')})" if estimate.num_seeds < LEAST_SEEDS else ""
    return f"{_hundredths(estimate.value):+.1f} {_interval(estimate)}{seeds}"


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} {_interval(estimate)}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"({TOO_FEW})"
    return f"[{_hundredths(estimate.low):.1f}, {_hundredths(estimate.high):.1f}]"


def gap_text(gap: Gap | None) -> str:
    if gap is None:
        return "-"
    if gap.value is None:
        return f"- ({gap.note})"
    if gap.low is None or gap.high is None:
        return f"{gap.value:.2f} ({gap.note})"
    return f"{gap.value:.2f} [{gap.low:.2f}, {gap.high:.2f}]"


def verdicts(group: Group, heard: Group | None = None) -> list[str]:
    """What the numbers of one group say: each arm against scratch, lapa against vpt, and the gap recovered.

    heard: the same group on goals whose wording the labelled episodes hold.
    """
    if not any(cell.versus for cell in group.cells.values()):
        return ["There is nothing to compare: a difference needs scratch and another arm under one seed."]
    sentences = []
    order: list[Arm] = ["lapa", *(arm for arm in ARMS if arm not in ("lapa", "scratch"))]
    for arm in order:
        if (cell := group.cells.get(arm)) is None:
            continue
        # Scratch first, then for lapa also vpt.
        sentences += [comparison(arm, other, difference) for other, difference in cell.versus.items()]
        if arm == "lapa":
            if heard and "lapa" in heard.cells and "scratch" in heard.cells["lapa"].versus:
                sentences.append(comparison("lapa", "scratch", heard.cells["lapa"].versus["scratch"], HEARD))
            sentences.append(gap_verdict(cell.gap, group.split))
    return sentences


def comparison(arm: Arm, other: Arm, difference: Estimate, on: str = "") -> str:
    """Above, below, not distinguishable, or too few rollouts to say. on: which goals, where not all.

    With one or two shared seeds the sentence is about these trainings and no others.
    """
    opening = _opening(difference.num_seeds, on)
    if difference.low is None or difference.high is None:
        return (
            f"{opening}{_name(arm)} is not compared with {_name(other)}: {TOO_FEW} "
            f"(the difference is {_hundredths(difference.value):+.1f} points)."
        )
    value, low, high = (_hundredths(x) for x in (difference.value, difference.low, difference.high))
    interval = "95% interval over goals" if difference.num_seeds == 1 else "95% interval"
    if difference.sign:
        which = "above" if difference.sign > 0 else "below"
        near, far = sorted((abs(low), abs(high)))
        size = f"{abs(value):.1f} points ({interval} {near:.1f} to {far:.1f}, which excludes zero)"
        return f"{opening}{_name(arm)} is {which} {_name(other)} by {size}."
    return (
        f"{opening}{_name(arm)} is not distinguishable from {_name(other)}: the difference is {value:+.1f} points, "
        f"its {interval} {low:.1f} to {high:.1f}."
    )


def _opening(num_seeds: int, on: str = "") -> str:
    """How a sentence begins: `In these trainings (one seed), `."""
    seeds = {1: "one seed", 2: "two seeds"}.get(num_seeds)
    parts = [f"in these trainings ({seeds})"] if seeds else []
    text = "".join(f"{part}, " for part in [*parts, on] if part)
    return text[:1].upper() + text[1:]


def gap_verdict(gap: Gap | None, split: Split) -> str:
    """How much of the way from scratch to actionvla latent actions went."""
    theirs = " and ".join(
        f"{column.gap('lapa'):.2f} ({column.setting.split(', ')[1]} goals)" for column in PAPER if column.split == split
    )
    paper = f" In the paper: {theirs}."
    if gap is None or gap.value is None:
        note = gap.note if gap else ""
        return f"How much LAPA recovers of the gap between scratch and true actions is not defined: {note}.{paper}"
    size = f"{_opening(gap.num_seeds)}LAPA recovers {gap.value:.2f} of the gap between scratch and true actions"
    if gap.low is None or gap.high is None:
        return f"{size}, but the figure may be chance ({gap.note}).{paper}"
    interval = "95% interval over goals" if gap.num_seeds == 1 else "95% interval"
    return f"{size} ({interval} {gap.low:.2f} to {gap.high:.2f}).{paper}"


def cautions(results: Sequence[ArmResult]) -> list[str]:
    """What a reader must know before any number."""
    texts = []
    if results[0].preset == "debug":
        texts.append("preset debug: says nothing about the method")
    states: dict[str, list[str]] = {}
    for result in results:
        states.setdefault(str(result.provenance.get("code", "not noted")), []).append(result.name)
    if len(states) > 1:
        each = "; ".join(f"{state}: {_first(names)}" for state, names in states.items())
        texts.append(f"the runs were made by {len(states)} different states of the code ({each})")
    return texts


def missing(results: Sequence[ArmResult], groups: Sequence[Group]) -> list[str]:
    """All that a whole study would have and this one has not."""
    lacks = [f"No run on the split {split}." for split in SPLITS if split not in {group.split for group in groups}]
    numbers = sorted({group.demonstrations for group in groups})
    if len(numbers) == 1:
        lacks.append(f"One number of labelled episodes a task ({numbers[0]}) and no other.")
    for split in (split for split in SPLITS if split in {group.split for group in groups}):
        there = {group.demonstrations for group in groups if group.split == split}
        if absent := [number for number in numbers if number not in there]:
            lacks.append(f"{split}: nothing with {_list(map(str, absent))} labelled episodes a task.")
    for group in groups:
        lacks += [f"{where(group)}: {text}" for text in _missing_in(group, results)]
    lacks += [f"{run.name}: no rollouts; it is left out of the tables." for run in results if not run.rollouts]
    if no_strip := [arm for arm in ARMS if _any(results, arm) and not any(r.strip for r in results if r.arm == arm)]:
        lacks.append(f"No pictures of rollouts of {_list(no_strip)}.")
    if _any(results, "lapa") and not any(result.codes for result in results):
        lacks.append("No pictures of what the codes do.")
    if no_figures := [run.name for run in results if not run.figures]:
        lacks.append(f"No explaining figures of {_list(no_figures)}.")
    return lacks


def _missing_in(group: Group, results: Sequence[ArmResult]) -> list[str]:
    texts = []
    if absent := [arm for arm in ARMS if arm not in group.cells]:
        texts.append(f"no run of {_list(absent)}.")
    seeds = {seed for cell in group.cells.values() for seed in cell.seeds}
    tasks = {task for cell in group.cells.values() for task in cell.by_task}
    for arm, cell in group.cells.items():
        if lacking := sorted(seeds - set(cell.seeds)):
            texts.append(f"{arm} lacks seed {_list(map(str, lacking))}.")
        if lacking_tasks := sorted(tasks - set(cell.by_task)):
            texts.append(f"{arm} lacks the tasks {_list(lacking_tasks)}.")
    others = [arm for arm in group.cells if arm != "scratch" and "scratch" in group.cells]
    if alone := [arm for arm in others if "scratch" not in group.cells[arm].versus]:
        texts.append(f"no difference to scratch, with which they share no seed and goal, of {_list(alone)}.")
    if few := [arm for arm, cell in group.cells.items() if len(cell.seeds) < LEAST_SEEDS]:
        texts.append(f"fewer than {LEAST_SEEDS} seeds of {_list(few)}.")
    played: dict[Arm, list[int]] = {}
    for result in results:
        if (result.split, result.demonstrations) == (group.split, group.demonstrations):
            names = [rollout.task for rollout in result.rollouts]
            played.setdefault(result.arm, []).extend(names.count(task) for task in set(names))
    if few := [arm for arm, numbers in played.items() if numbers and min(numbers) < LEAST_ROLLOUTS]:
        least = min(min(played[arm]) for arm in few)
        texts.append(f"fewer than {LEAST_ROLLOUTS} rollouts of a task under a seed (down to {least}) of {_list(few)}.")
    if len({number for numbers in played.values() for number in numbers}) > 1:
        texts.append("tasks were not played equally often; each task weighs the same in the success rate.")
    return texts


def _first(names: Sequence[str]) -> str:
    more = f" and {counted(len(names) - MAX_NAMES, 'other')}" if len(names) > MAX_NAMES else ""
    return _list(names[:MAX_NAMES]) + more


def _hundredths(share: float) -> float:
    return round(100 * share, 1) + 0.0  # never -0.0


def _any(results: Iterable[ArmResult], arm: Arm) -> bool:
    return any(result.arm == arm for result in results)


def _name(arm: Arm) -> str:
    return {"lapa": "LAPA", "vpt": "VPT", "unipi": "UniPi", "actionvla": "ActionVLA"}.get(arm, arm)


def _list(items: Iterable[str]) -> str:
    return ", ".join(items)
