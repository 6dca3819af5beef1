"""The steps of a study: each a `lapa` command whose output folder is named by a hash of its options and inputs.

An option of a step may be another step, which stands for its folder. A step that several arms or seeds need is the same
step and runs once; a step with other options or inputs is another step, in another folder.

    plan = Plan(sizes_of("cpu"), Setting("in-domain", videos=30, demonstrations=2), seed=0)
    for step in order(plan.rollouts("lapa")):
        print(step.command(Path("STUDY")))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from lapa import presets
from lapa.config import to_dict
from lapa.errors import UserError
from lapa.study.config import StudySizes
from lapa.study.results import ARMS, Arm, Setting

Words: TypeAlias = "tuple[str | Step, ...]"
ARTIFACTS = "artifacts"
# Recorded episodes of different purposes have seeds apart from each other's; evaluation has seeds of its own kind.
VIDEO_SEED, DEMONSTRATION_SEED, MEASURED_SEED, ROLLOUT_SEED = 0, 1000, 5000, 0
SEEDS = DEMONSTRATION_SEED - VIDEO_SEED
# Metres, a fifth of a push of the expert: its episodes also show how it corrects itself.
LANGUAGE_TABLE_NOISE = "0.004"


@dataclass(frozen=True)
class Step:
    """A command and its options (`words`).

    artifact: the file in its folder that it writes last. again: the option that continues or repeats a killed command.
    """

    title: str
    verb: str
    words: Words
    artifact: str
    again: str = "--resume"

    @cached_property
    def key(self) -> str:
        """Eight hex digits: a hash of the command, its options and its inputs."""
        words = [self.verb, *(word.key if isinstance(word, Step) else word for word in self.words)]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]

    @property
    def kind(self) -> str:
        """The title without the arm."""
        return " ".join(word for word in self.title.split() if word not in ARMS)

    @property
    def inputs(self) -> tuple[Step, ...]:
        return tuple(word for word in self.words if isinstance(word, Step))

    def folder(self, study: Path) -> Path:
        return study / ARTIFACTS / f"{self.title.replace(' ', '-')}-{self.key}"

    def lock(self, study: Path) -> Path:
        """The file that a run holds locked while it makes the step."""
        return study / ARTIFACTS / f".{self.key}.lock"

    def done(self, study: Path) -> bool:
        return (self.folder(study) / self.artifact).exists()

    def command(self, study: Path) -> list[str]:
        words = [str(word.folder(study)) if isinstance(word, Step) else word for word in self.words]
        return [*self.verb.split(), *words, "--out", str(self.folder(study)), self.again]


def order(*wanted: Step, unless: Callable[[Step], bool] = lambda step: False) -> Iterator[Step]:
    """Yields the steps and all their inputs, each once, inputs first.

    Steps for which `unless` is true are left out, and the inputs that only they need.
    """
    seen: set[str] = set()

    def visit(step: Step) -> Iterator[Step]:
        if step.key in seen or unless(step):
            return
        seen.add(step.key)
        for needed in step.inputs:
            yield from visit(needed)
        yield step

    for step in wanted:
        yield from visit(step)


@dataclass(frozen=True)
class Plan:
    """The steps of one seed in one setting. All but the measured episodes depend on the seed.

    The arms of one seed have the same videos, labelled episodes and evaluation goals.
    """

    sizes: StudySizes
    setting: Setting
    seed: int

    def __post_init__(self) -> None:
        for name in ("videos", "demonstrations"):
            if (number := getattr(self.setting, name)) < 1:
                raise UserError(f"--{name} must be at least 1, got {number}")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"--seed must be from 0 to {SEEDS - 1}, got {self.seed}")
        world = self.sizes.world
        if self.setting.split == "cross-task" and not (world.other_tasks or world.labelled_tasks):
            raise UserError("--split cross-task: this preset has no other tasks; choose another split or preset")
        if self.setting.split == "cross-environment" and not (world.other_look or world.clips):
            raise UserError("--split cross-environment: this preset has no other view; choose another split or preset")
        if self.setting.split == "cross-embodiment" and world.env != "metaworld":
            raise UserError(
                "--split cross-embodiment: this preset has no other embodiment; choose another split or preset"
            )

    def rollouts(self, arm: Arm) -> Step:
        """Rollouts of the arm's policy in the simulator."""
        sizes, world = self.sizes, self.sizes.world
        words = (
            self.policy(arm),
            *("--env", world.env),
            *("--tasks", world.tasks),
            *("--episodes", str(sizes.rollouts)),
            # UniPi executes the whole chunk of its planned frames.
            *(() if arm == "unipi" else ("--steps-per-call", str(sizes.steps_per_call))),
            *("--max-steps", str(sizes.max_steps)),
            *("--seed", str(ROLLOUT_SEED + self.seed)),
            *("--videos", "1"),
        )
        return Step(f"rollouts {arm}", "evaluate", words, "results.json")

    def action_error(self, arm: Arm) -> Step:
        """Open-loop evaluation of the arm's policy on recorded episodes."""
        words = (self.policy(arm), "--data", self.measured, "--steps", str(self.sizes.chunk))
        return Step(f"action error {arm}", "policy measure", words, "measure.json", "--overwrite")

    @cached_property
    def token_accuracy(self) -> Step:
        """How often the pretrained policy predicts the labelled latent action, on videos that it was not trained on."""
        words: Words = ("--lam", self.latent_action_model, "--data", self.measured)
        labels = Step("labels of measured episodes", "label", words, "manifest.json")
        words = (self.pretrained("lapa"), "--data", self.measured, "--labels", labels)
        return Step("token accuracy", "policy measure", words, "measure.json", "--overwrite")

    def policy(self, arm: Arm) -> Step:
        """The arm's finetuned policy; of unipi the video model, finetuned as policies are, with inverse dynamics."""
        words: Words
        if arm == "unipi":
            words = ("--start", self.video_model, "--data", self.labelled, "--held-out", "0", *self._horizon)
            video = self._train("video model finetuning", "baseline video", words, self.sizes.finetune_steps)
            joined = ("--video", video, "--inverse", self.inverse_dynamics)
            return Step("planner unipi", "baseline unipi", joined, "config.json", "--overwrite")
        start = ("--from-scratch",) if arm == "scratch" else ("--policy", self.pretrained(arm))
        words = (*start, "--data", self.labelled, "--held-out", "0", *self._acting, *self.sizes.finetuning)
        return self._train(f"finetuning {arm}", "policy finetune", words, self.sizes.finetune_steps)

    def pretrained(self, arm: Arm) -> Step:
        """The policy before finetuning, of the arms lapa, captions, vpt and actionvla."""
        words: Words
        if arm in ("lapa", "captions"):
            labels = self.labels if arm == "lapa" else self.shuffled_labels
            verb, words = "pretrain", ("--data", self.videos_without_actions, "--labels", labels, *self.sizes.policy)
        else:
            assert arm in ("vpt", "actionvla"), f"the arm {arm} has no pretrained policy"
            data = self.videos if arm == "actionvla" else self.pseudo_labelled
            # Pseudo-actions have a narrower range than the robot's actions.
            statistics = ("--statistics", self.labelled)
            verb, words = "finetune", ("--from-scratch", "--data", data, *statistics, *self._acting)
        words = (*words, *self.sizes.pretraining)
        return self._train(f"pretraining {arm}", f"policy {verb}", words, self.sizes.pretrain_steps)

    @cached_property
    def latent_action_model(self) -> Step:
        words: Words = ("--data", self.videos_without_actions, *self._horizon)
        return self._train("latent action model", "latent train", words, self.sizes.latent_steps)

    @cached_property
    def probe(self) -> Step:
        words = (self.latent_action_model, "--data", self.measured)
        return Step("probe", "latent probe", words, "probe.json", "--overwrite")

    @cached_property
    def labels(self) -> Step:
        words = ("--lam", self.latent_action_model, "--data", self.videos_without_actions)
        return Step("labels", "label", words, "manifest.json")

    @cached_property
    def shuffled_labels(self) -> Step:
        words: Words = (self.labels, "--seed", str(self.seed))
        return Step("shuffled labels", "baseline shuffle-labels", words, "manifest.json", "--overwrite")

    @cached_property
    def inverse_dynamics(self) -> Step:
        words: Words = ("--data", self.labelled, "--held-out", "0", *self._horizon)
        return self._train("inverse dynamics", "baseline inverse", words, self.sizes.inverse_steps)

    @cached_property
    def pseudo_labelled(self) -> Step:
        words = ("--inverse", self.inverse_dynamics, "--data", self.videos_without_actions)
        return Step("pseudo-labelled videos", "baseline pseudo-label", words, "meta/info.json")

    @cached_property
    def video_model(self) -> Step:
        words: Words = ("--data", self.videos_without_actions, *self._horizon)
        return self._train("video model", "baseline video", words, self.sizes.pretrain_steps)

    @property
    def clips(self) -> str | None:
        """The dataset of the user that is in place of recorded videos, where the split takes it."""
        return self.sizes.world.clips if self.setting.split == "cross-environment" else None

    @cached_property
    def videos(self) -> Step | str:
        """The videos of the split, or the user's own, with the true actions that only the arm actionvla may use."""
        world = self.sizes.world
        if self.clips is not None:
            return self.clips
        tasks = (world.other_tasks or world.tasks) if self.setting.split == "cross-task" else world.tasks
        shown: tuple[str, ...] = ()
        camera = world.camera
        if self.setting.split == "cross-environment":
            camera, shown = world.other_camera, ("--look", str(world.other_look))
        elif self.setting.split == "cross-embodiment":
            shown = ("--embodiment", "hand")
        return self._episodes("videos", tasks, self.setting.videos, VIDEO_SEED + self.seed, camera, shown)

    @cached_property
    def videos_without_actions(self) -> Step:
        return Step("videos without actions", "data hide-actions", (self.videos,), "meta/info.json")

    @cached_property
    def labelled(self) -> Step:
        """The few labelled episodes."""
        world, seed = self.sizes.world, DEMONSTRATION_SEED + self.seed
        tasks = (world.labelled_tasks or world.tasks) if self.setting.split == "cross-task" else world.tasks
        return self._episodes("labelled episodes", tasks, self.setting.demonstrations, seed)

    @cached_property
    def measured(self) -> Step:
        """Recorded episodes that no arm learns from."""
        return self._episodes("measured episodes", self.sizes.world.tasks, self.sizes.measured, MEASURED_SEED)

    @property
    def _acting(self) -> tuple[str, ...]:
        return ("--head", self.sizes.head, "--chunk", str(self.sizes.chunk), *self.sizes.policy)

    @property
    def _horizon(self) -> tuple[str, ...]:
        return ("--horizon-seconds", str(self.sizes.horizon_seconds))

    def _train(self, title: str, verb: str, words: Words, steps: int) -> Step:
        words = ("--preset", self.sizes.stage, *words, "--steps", str(steps), "--seed", str(self.seed))
        return Step(title, verb, words, "config.json")

    def _episodes(
        self, title: str, tasks: str, number: int, seed: int, camera: str = "", shown: tuple[str, ...] = ()
    ) -> Step:
        """Recorded episodes, `number` of each task."""
        world = self.sizes.world
        if world.env == "synthetic":
            words: tuple[str, ...] = ("--episodes", str(8 * number), "--actions")
        elif world.env == "language_table":
            words = ("--families", tasks, "--episodes", str(number), *shown, "--noise", LANGUAGE_TABLE_NOISE)
        else:
            words = ("--tasks", tasks, "--episodes", str(number), "--cameras", camera or world.camera, *shown)
        verb = f"data {world.env.replace('_', '-')}"
        return Step(title, verb, (*words, "--seed", str(seed)), "meta/info.json")


def steps_of(plan: Plan, arm: Arm) -> dict[str, Step]:
    """Returns the steps that an arm's result is read from; the keys but `rollouts` are those of run.FIGURES."""
    steps = {"rollouts": plan.rollouts(arm), "action error": plan.action_error(arm)}
    if arm == "lapa":
        steps |= {"probe": plan.probe, "token accuracy": plan.token_accuracy}
    return steps


def stage_presets(sizes: StudySizes) -> dict[str, dict[str, Any]]:
    """Returns the stages' own presets as plain values, without required options, by stage."""
    return {
        stage: {
            name: value
            for name, value in to_dict(presets.named(stage, sizes.stage)).items()
            if value is not presets.REQUIRED
        }
        for stage in presets.STAGES
    }
