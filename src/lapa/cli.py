"""The command `lapa`: verbs in the order of the flow, each imported only when it is called.

lapa --help
lapa latent train --help
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lapa import __version__
from lapa.errors import UserError, unknown

USAGE = """\
lapa {version}: from videos without action labels to a robot policy (arXiv 2410.11758)

usage: lapa COMMAND [OPTIONS]          lapa COMMAND --help shows a command's options

{commands}
start with: lapa demo
"""


# Options that may be given once with several values, or several times.
REPEATABLE = ("--data", "--labels", "--statistics")


@dataclass(frozen=True)
class Verb:
    """A command: `module` holds the dataclass `config` and the function `run(config)`.

    presets: the stage in lapa.presets whose named configs `--preset` chooses from, if it has any.
    """

    name: str
    help: str
    module: str
    config: str
    presets: str | None = None


VERBS = (
    Verb("demo", "the whole flow on Meta-World, from rendering to a table of success rates", "lapa.demo", "DemoConfig"),
    Verb(
        "data videos",
        "a folder of videos and captions -> a dataset without actions",
        "lapa.sources.videos",
        "VideosConfig",
    ),
    Verb(
        "data rlds",
        "an RLDS folder, such as one of Open X-Embodiment -> a dataset",
        "lapa.sources.rlds.source",
        "RldsConfig",
    ),
    Verb(
        "data lerobot",
        "a LeRobot dataset, v2.1 or v3.0, a folder or on the hub -> a dataset",
        "lapa.sources.lerobot",
        "LeRobotConfig",
    ),
    Verb(
        "data frames",
        "folders of numbered pictures -> a dataset without actions",
        "lapa.sources.frames",
        "FramesConfig",
    ),
    Verb(
        "data sthv2",
        "Something-Something v2 -> a dataset without actions",
        "lapa.sources.sthv2",
        "Sthv2Config",
    ),
    Verb(
        "data narrated",
        "long videos with narrations (Ego4D, EPIC-KITCHENS) -> a dataset of clips without actions",
        "lapa.sources.narrated",
        "NarratedConfig",
    ),
    Verb(
        "data lapa-jsonl",
        "JSON lines of the released LAPA code -> a dataset, and its labels",
        "lapa.sources.lapa_jsonl",
        "LapaJsonlConfig",
    ),
    Verb(
        "data metaworld",
        "demonstrations rendered in Meta-World -> a dataset",
        "lapa.envs.metaworld.record",
        "MetaworldConfig",
    ),
    Verb(
        "data synthetic",
        "made-up videos of a moving square -> a dataset, for trying things out",
        "lapa.sources.synthetic",
        "SyntheticConfig",
    ),
    Verb(
        "data hide-actions",
        "a dataset -> the same videos without actions and states",
        "lapa.data.replace_actions",
        "HideActionsConfig",
    ),
    Verb("data info", "what a dataset holds, with a contact sheet", "lapa.data.info", "InfoConfig"),
    Verb(
        "latent train",
        "datasets -> a latent action model (LAM)",
        "lapa.latent.train",
        "LatentTrainConfig",
        presets="latent",
    ),
    Verb(
        "latent probe", "what a LAM has learned: a table, probe.json and a picture", "lapa.latent.probe", "ProbeConfig"
    ),
    Verb("latent compare", "several LAMs measured side by side", "lapa.latent.compare", "CompareConfig"),
    Verb("latent show", "what each code of a LAM does to an image", "lapa.latent.show", "ShowConfig"),
    Verb("label", "a LAM and a dataset -> latent action labels", "lapa.label.run", "LabelConfig"),
    Verb(
        "policy pretrain",
        "a dataset and its labels -> a latent policy",
        "lapa.policy.pretrain",
        "PretrainConfig",
        presets="pretrain",
    ),
    Verb(
        "policy finetune",
        "a latent policy and a few robot episodes -> a policy that acts",
        "lapa.policy.finetune",
        "FinetuneConfig",
        presets="finetune",
    ),
    Verb(
        "policy measure",
        "what a policy says of recorded episodes, beside what was done",
        "lapa.policy.measure",
        "MeasureConfig",
    ),
    Verb(
        "baseline inverse",
        "a few robot episodes -> an inverse dynamics model",
        "lapa.baselines.inverse",
        "InverseTrainConfig",
        presets="inverse",
    ),
    Verb(
        "baseline pseudo-label",
        "videos -> the same with the actions that an inverse dynamics model sees in them (VPT)",
        "lapa.baselines.pseudo_label",
        "PseudoLabelConfig",
    ),
    Verb(
        "baseline video",
        "videos and captions -> a model of what happens next",
        "lapa.baselines.video_train",
        "VideoTrainConfig",
        presets="video",
    ),
    Verb(
        "baseline unipi",
        "a video model and an inverse dynamics model -> a policy (UniPi)",
        "lapa.baselines.unipi",
        "UniPiConfig",
    ),
    Verb(
        "import laq",
        "the released latent action model, laq_openx.pt -> a LAM",
        "lapa.released.laq",
        "ImportLaqConfig",
    ),
    Verb(
        "import lapa-7b",
        "the released LAPA-7B or LWM-Chat-1M -> a policy",
        "lapa.released.lapa7b",
        "ImportLapaConfig",
    ),
    Verb(
        "evaluate",
        "a policy in a simulator -> success rates with intervals, and videos",
        "lapa.evaluate.rollout",
        "EvaluateConfig",
    ),
    Verb(
        "study run",
        "arms of the study: LAPA beside training from scratch, VPT, UniPi and true actions",
        "lapa.study.run",
        "StudyConfig",
    ),
    Verb("study report", "the study's table, figures and page", "lapa.study.report", "ReportConfig"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. A user's mistake is one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments)
    except KeyboardInterrupt:
        status = 130
    except (UserError, FloatingPointError, OSError) as error:
        if os.environ.get("LAPA_TRACEBACK"):
            raise
        print(f"lapa: error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _dispatch(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        print(__version__)
        return 0
    verb = find_verb(arguments)
    if verb is None:
        asked_for_help = not arguments or arguments[-1] in ("-h", "--help", "help")
        group = [word for word in arguments if not word.startswith("-")][:1]
        known = [v for v in VERBS if not group or v.name.split()[0] == group[0]]
        if not known or (not asked_for_help and len(arguments) > 1):
            wanted = " ".join(word for word in arguments[:2] if not word.startswith("-"))
            raise UserError(f"{unknown('command', wanted, [v.name for v in VERBS])}; see `lapa --help`")
        print(usage(known), end="")
        return 0
    module = importlib.import_module(verb.module)
    module.run(parse(verb, arguments[len(verb.name.split()) :]))
    return 0


def find_verb(arguments: Sequence[str]) -> Verb | None:
    """The verb that the first one or two words name."""
    for verb in VERBS:
        words = verb.name.split()
        if list(arguments[: len(words)]) == words:
            return verb
    return None


def parse(verb: Verb, options: Sequence[str]) -> Any:
    """The verb's config from its options, starting from the preset that `--preset` names, if it has presets.

    Raises UserError on an unknown preset; tyro ends the process with status 2 on unknown or missing options.
    """
    import tyro

    config = getattr(importlib.import_module(verb.module), verb.config)
    default = {}
    if verb.presets is not None:
        from lapa import presets

        default = {"default": presets.named(verb.presets, preset_name(options))}
    return tyro.cli(
        config,
        args=gathered(options),
        prog=f"lapa {verb.name}",
        description=verb.help,
        **default,
    )


def gathered(options: Sequence[str]) -> list[str]:
    """The options, with what `--data A --data B` names several times named once: `--data A B`."""
    others: list[str] = []
    values: dict[str, list[str]] = {}
    current = others
    for option in options:
        name, _, value = option.partition("=")
        if name in REPEATABLE:
            current = values.setdefault(name, [])
            current += [value] if value else []
        elif option.startswith("--"):
            current = others
            current.append(option)
        else:
            current.append(option)
    return [*others, *(word for name, given in values.items() for word in (name, *given))]


def preset_name(options: Sequence[str], default: str = "tiny") -> str:
    """The value of `--preset` among the options."""
    for position, option in enumerate(options):
        if option == "--preset" and position + 1 < len(options):
            return options[position + 1]
        if option.startswith("--preset="):
            return option.removeprefix("--preset=")
    return default


def usage(verbs: Sequence[Verb] = VERBS) -> str:
    """The help of the whole command, or of one group."""
    width = max(len(verb.name) for verb in VERBS)
    commands = "\n".join(f"  {verb.name:<{width}}  {verb.help}" for verb in verbs)
    return USAGE.format(version=__version__, commands=commands + "\n")
