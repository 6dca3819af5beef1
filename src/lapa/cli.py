"""The command `lapa`: a table of verbs in the order of the flow, each imported only when it is called.

lapa --help
lapa latent train --help
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import multiprocessing
import operator
import os
import select
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from lapa import __version__
from lapa.errors import UserError, out_of_memory, printable

USAGE = """\
lapa {version}: from videos without actions to a robot policy (arXiv 2410.11758)

usage: lapa COMMAND [OPTIONS]        lapa help COMMAND shows a command's options

{commands}
start with: lapa demo
"""


# Options that may be given once with several values, or several times.
REPEATABLE = ("--data", "--labels", "--statistics", "--map")
# Entry points of other distributions that add commands: each loads to a Verb.
ENTRY_POINTS = "lapa.commands"
HELP = ("help", "-h", "--help")
INSTALL_COMPLETION = "--install-completion"
# Exit status after Ctrl-C.
INTERRUPTED = 130
# Exit status where the reader of the output has gone, as after `lapa help | head -3`.
OUTPUT_CLOSED = 1
# Of `difflib`: names less alike are not suggested.
ALIKE = 0.5
LESS_MEMORY = (
    "lower what the command holds at once (--batch-size, --workers, --decoders, --cache-gib, --size, a smaller model), "
    "or raise the limit (ulimit -v, the job's memory)"
)
# Of the list of commands, where there is no terminal.
WIDTH = 110
# The preset where none is named.
PRESET = "tiny"


@dataclass(frozen=True)
class Verb:
    """A command. config: "module:dataclass" of its options; run: "module:function", called with that dataclass.

    The module of `run` is imported only once the options are parsed and their inputs exist, so that help and mistakes
    need no torch. presets: the stage in lapa.presets whose named configs `--preset` chooses from, if it has any.
    """

    name: str
    config: str
    run: str
    help: str
    presets: str | None = None


# fmt: off
VERBS = (
    Verb("demo", "lapa.demo.config:DemoConfig", "lapa.demo.run:run",
         "the whole flow on Meta-World, from rendering to a table of success rates"),
    Verb("data videos", "lapa.sources.videos:VideosConfig", "lapa.data.convert:run",
         "a folder of videos and captions -> a dataset without actions"),
    Verb("data webdataset", "lapa.sources.webdataset:WebDatasetConfig", "lapa.data.convert:run",
         "shards of videos and texts (WebDataset tars, parquet) -> a dataset without actions"),
    Verb("data rlds", "lapa.sources.rlds.source:RldsConfig", "lapa.data.convert:run",
         "an RLDS folder, such as one of Open X-Embodiment -> a dataset"),
    Verb("data lerobot", "lapa.sources.lerobot:LeRobotConfig", "lapa.data.convert:run",
         "a LeRobot dataset, v2.1 or v3.0, a folder or on the hub -> a dataset"),
    Verb("data frames", "lapa.sources.frames:FramesConfig", "lapa.data.convert:run",
         "folders of numbered images -> a dataset without actions"),
    Verb("data sthv2", "lapa.sources.sthv2:Sthv2Config", "lapa.data.convert:run",
         "Something-Something v2 -> a dataset without actions"),
    Verb("data narrated", "lapa.sources.narrated:NarratedConfig", "lapa.data.convert:run",
         "long videos with narrations (Ego4D, EPIC-KITCHENS) -> a dataset of clips without actions"),
    Verb("data lapa-jsonl", "lapa.sources.lapa_jsonl:LapaJsonlConfig", "lapa.sources.lapa_jsonl:run",
         "JSON lines of the released LAPA code -> a dataset, and its labels"),
    Verb("data metaworld", "lapa.envs.metaworld:MetaworldConfig", "lapa.envs.metaworld.record:run",
         "demonstrations rendered in Meta-World -> a dataset"),
    Verb("data language-table", "lapa.envs.language_table:LanguageTableConfig", "lapa.envs.language_table.record:run",
         "demonstrations rendered in Language Table -> a dataset"),
    Verb("data synthetic", "lapa.sources.synthetic:SyntheticConfig", "lapa.sources.synthetic:run",
         "made-up videos of a moving square -> a dataset, for trying things out"),
    Verb("data hide-actions", "lapa.data.config:HideActionsConfig", "lapa.data.replace_actions:run",
         "a dataset -> the same videos without actions and states"),
    Verb("data merge", "lapa.data.config:MergeConfig", "lapa.data.merge:run",
         "datasets of the same cameras, rate and features -> one, without touching the videos"),
    Verb("data info", "lapa.data.config:InfoConfig", "lapa.data.info:run",
         "what a dataset holds, with a contact sheet"),
    Verb("data check", "lapa.data.config:CheckConfig", "lapa.data.check:run",
         "reads every file of a dataset and names the damaged ones"),
    Verb("latent train", "lapa.latent.config:LatentTrainConfig", "lapa.latent.train:run",
         "datasets -> a latent action model (LAM)", presets="latent"),
    Verb("latent probe", "lapa.latent.config:ProbeConfig", "lapa.latent.probe:run",
         "what a LAM has learned: a table, probe.json and an image"),
    Verb("latent compare", "lapa.latent.config:CompareConfig", "lapa.latent.probe:compare",
         "several LAMs measured side by side"),
    Verb("latent show", "lapa.latent.config:ShowConfig", "lapa.latent.show:run",
         "what each code of a LAM does to an image"),
    Verb("label", "lapa.labelling.config:LabelConfig", "lapa.labelling.run:run",
         "a LAM and a dataset -> latent action labels"),
    Verb("policy pretrain", "lapa.policy.config:PretrainConfig", "lapa.policy.pretrain:run",
         "a dataset and its labels -> a latent policy", presets="pretrain"),
    Verb("policy finetune", "lapa.policy.config:FinetuneConfig", "lapa.policy.finetune:run",
         "a latent policy and a few robot episodes -> a policy that acts", presets="finetune"),
    Verb("policy measure", "lapa.policy.config:MeasureConfig", "lapa.policy.open_loop:run",
         "open-loop evaluation: predicted against recorded actions of episodes"),
    Verb("baseline inverse", "lapa.baselines.config:InverseTrainConfig", "lapa.baselines.inverse:run",
         "a few robot episodes -> an inverse dynamics model", presets="inverse"),
    Verb("baseline pseudo-label", "lapa.baselines.config:PseudoLabelConfig", "lapa.baselines.pseudo_label:run",
         "videos -> the same with actions that an inverse dynamics model predicts (VPT)"),
    Verb("baseline shuffle-labels", "lapa.baselines.config:ShuffleLabelsConfig", "lapa.baselines.shuffled_labels:run",
         "labels -> the same with the codes of other frames, a control"),
    Verb("baseline video", "lapa.baselines.config:VideoTrainConfig", "lapa.baselines.video_train:run",
         "videos and captions -> a model that predicts future frames", presets="video"),
    Verb("baseline unipi", "lapa.baselines.config:UniPiConfig", "lapa.baselines.unipi:run",
         "a video model and an inverse dynamics model -> a policy (UniPi)"),
    Verb("import laq", "lapa.released.config:ImportLaqConfig", "lapa.released.laq:run",
         "a released latent action model, laq_openx.pt or LAPA-DINO -> a LAM"),
    Verb("import lapa-7b", "lapa.released.config:ImportLapaConfig", "lapa.released.lapa7b:run",
         "the released LAPA-7B or LWM-Chat-1M -> a policy"),
    Verb("import lerobot", "lapa.policy.config:ImportLeRobotConfig", "lapa.policy.lerobot:read_back",
         "a folder of `lapa export lerobot`, also as lerobot-train left it -> a policy"),
    Verb("export lerobot", "lapa.policy.config:ExportLeRobotConfig", "lapa.policy.lerobot:export",
         "a policy -> a folder that LeRobot's tools run, evaluate and finetune"),
    Verb("plot", "lapa.engine.config:PlotConfig", "lapa.engine.curves:run",
         "trainings -> an image of their curves, to compare them"),
    Verb("evaluate", "lapa.evaluation.config:EvaluateConfig", "lapa.evaluation.rollout:run",
         "a policy in a simulator -> success rates with intervals, and videos"),
    Verb("envs", "lapa.envs.listing:EnvsConfig", "lapa.envs.listing:run",
         "the simulators, what each needs, and whether it works on this machine"),
    Verb("serve", "lapa.serve.config:ServeConfig", "lapa.serve.server:run",
         "a policy for robots' clients: openpi's websocket, OpenVLA's REST, a page"),
    Verb("view", "lapa.view.config:ViewConfig", "lapa.view.server:run",
         "any artifact, results or study in the browser, or as a folder to send"),
    Verb("push", "lapa.hub.config:PushConfig", "lapa.hub.push:run",
         "a model, policy, labels, dataset or results -> the Hugging Face hub"),
    Verb("study run", "lapa.study.config:StudyConfig", "lapa.study.run:run",
         "arms of the study: LAPA, training from scratch, VPT, UniPi and true actions"),
    Verb("study report", "lapa.study.config:ReportConfig", "lapa.study.report:run",
         "the study's tables, plots and intervals"),
    Verb("completion", "lapa.completion:CompletionConfig", "lapa.completion:run",
         "a script that completes commands and options in bash or zsh"),
)
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. A user's mistake is one line on stderr and exit status 2, so is a lack of memory.

    Ctrl-C ends it with status 130, a second one at once. Where nobody reads the output any more it ends quietly.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            status = _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
        if in_main_thread:
            # What is left to do, such as waiting for threads, may be cut short.
            signal.signal(signal.SIGINT, _end_at_once)
    except Exception as error:
        gone = isinstance(error, BrokenPipeError) and _output_is_closed()
        status = OUTPUT_CLOSED if gone else _report(error)
    if handled and status != INTERRUPTED:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_process(status)
    sys.exit(status)


def _report(error: Exception) -> int:
    """Prints a mistake or a lack of memory as one line, and returns the exit status. Raises any other error again."""
    known = isinstance(error, UserError | FloatingPointError | OSError)
    shortage = out_of_memory(error)
    if os.environ.get("LAPA_TRACEBACK") or not (known or shortage):
        raise error
    message = f"out of memory ({shortage}); {LESS_MEMORY}" if shortage else printable(error)
    print(f"lapa: error: {message}", file=sys.stderr)
    return 2


def _output_is_closed() -> bool:
    """Whether standard output's reader has gone. What is still to be printed then goes nowhere."""
    number, poll = sys.stdout.fileno(), select.poll()
    poll.register(number, select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return gone


def end_process(status: int) -> NoReturn:
    """Ends one of several processes of torchrun, all of whose work is done, without Python's finalization.

    torch's caches of sharded tensors hold the process group and so its threads; one that drops a tensor while Python
    ends aborts the process ("terminate called without an active exception"), now and then on a busy machine.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _interrupt(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, _end_at_once)
    raise KeyboardInterrupt


def _end_at_once(number: int, frame: Any) -> None:
    """Ends the process and its workers. Every file is whole at any time."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(INTERRUPTED)


def _dispatch(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        print(__version__)
        return 0
    if arguments[:1] == [INSTALL_COMPLETION]:
        shell = arguments[1:] or [Path(os.environ.get("SHELL", "bash")).name]
        arguments = ["completion", *shell, "--install"]
    if arguments and arguments[0] in HELP:
        arguments = [*arguments[1:], "--help"]
    verb = find_verb(arguments)
    if verb is None:
        words = [word for word in arguments if word not in HELP]
        known = [v for v in all_verbs() if not words or v.name.split()[0] == words[0]]
        named = list(takewhile(lambda word: not word.startswith("-"), words[:2]))
        if (words and not named) or (known and len(named) < len(words[:2])):
            raise UserError(f"unknown option {words[len(named)]!r}; `lapa help` lists all commands")
        if not known or len(words) > 1:
            raise unknown_command(" ".join(named))
        print(usage(known), end="")
        if words == ["data"]:
            from lapa.help import data_help

            print("\n" + data_help(), end="")
        return 0
    config = parse(verb, arguments[len(verb.name.split()) :])
    carry_out(verb, config)
    return 0


def all_verbs() -> list[Verb]:
    """Our commands, then those of other distributions."""
    from importlib.metadata import entry_points

    return [*VERBS, *(entry_point.load() for entry_point in entry_points(group=ENTRY_POINTS))]


def unknown_command(wanted: str) -> UserError:
    """The error for a command that does not exist, with up to three that are alike."""
    names = ["help", *(verb.name for verb in all_verbs())]
    alike = list(map(repr, difflib.get_close_matches(wanted, names, n=3, cutoff=ALIKE)))
    listed = " or ".join(filter(None, [", ".join(alike[:-1]), *alike[-1:]]))
    meant = f"did you mean {listed}? " if alike else ""
    return UserError(f"unknown command {wanted!r}; {meant}`lapa help` lists all commands")


def find_verb(arguments: Sequence[str]) -> Verb | None:
    """The verb that the first one or two words name. Other distributions are asked only where it is not ours."""
    for verbs in (lambda: VERBS, all_verbs):
        for verb in verbs():
            words = verb.name.split()
            if list(arguments[: len(words)]) == words:
                return verb
    return None


def parse(verb: Verb, options: Sequence[str]) -> Any:
    """The verb's config from its options, starting from the preset that `--preset` names, if it has presets.

    Raises UserError on an unknown preset; ends the process with status 0 after `--help`, and by tyro with status 2 on
    unknown or missing options.
    """
    import tyro

    config, default = imported(verb.config), preset(verb, preset_name(options))
    if {"-h", "--help"} & set(options):
        from lapa.help import command_help

        print(command_help(verb.name, printable(verb.help), config, default, verb.run), end="")
        raise SystemExit(0)
    start = {} if default is None else {"default": default}
    return tyro.cli(config, args=gathered(options), prog=f"lapa {verb.name}", description=verb.help, **start)


def preset(verb: Verb, name: str) -> Any:
    """The config that the preset `name` of the verb's stage holds; None for a verb without presets."""
    from lapa import presets

    return None if verb.presets is None else presets.named(verb.presets, name)


OPEN_DATASET = "lapa.data.spec:open_dataset"
# By the name of an option: the function that opens its value, and raises UserError for one that does not exist.
OPENERS = {
    "data": OPEN_DATASET,
    "statistics": OPEN_DATASET,
    "labels": "lapa.data.labels:Labels.open",
    "lam": "lapa.hub.download:require_model",
    "lams": "lapa.hub.download:require_model",
    "exported": "lapa.hub.download:require_model",
    "policy": "lapa.hub.download:require_policy",
}
# By the name of an option of type Path: the error for one that does not exist.
MISSING = {
    "artifact": "no such folder; give that of a model, policy, labels, dataset or results",
    "runs": "no such folder; give that of a training",
    "inverse": "no such folder; train an inverse dynamics model with `lapa baseline inverse`",
    "video": "no such folder; train a video model with `lapa baseline video`",
}
OUTPUTS = ("out", "sheet", "export", "rerun")


def carry_out(verb: Verb, config: Any) -> None:
    """Runs a command, after a look at its config."""
    from lapa.config import require_plausible

    require_plausible(config)
    require_inputs(config)
    imported(verb.run)(config)


def require_inputs(config: Any) -> None:
    """Raises UserError for the first dataset, file, folder or hub id of a config that does not exist.

    This is cheap: an input that exists on this machine is not opened, and one behind a URL is left to the command.
    `NAMES` of a config are fields that are called like inputs, but only name something.
    """
    names = getattr(config, "NAMES", ())
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if field.name in (*OUTPUTS, *names) or not isinstance(item, str | Path):
                continue
            opener = OPENERS.get(field.name)
            path = str(item)
            if opener == OPEN_DATASET:
                from lapa.data.spec import HUB_SOURCE, DataSpec, known_sources
                from lapa.hub.download import as_hub_id, require_dataset

                spec = DataSpec.parse(path, known_sources())
                path = spec.path
                if spec.source in (None, HUB_SOURCE) and as_hub_id(path) is not None:
                    require_dataset(path)
                    continue
            if "://" in path or Path(path).exists():
                continue
            if opener:
                imported(opener)(item)
            elif isinstance(item, Path):
                raise UserError(f"{item}: {MISSING.get(field.name, 'no such file or folder')}")


def imported(name: str) -> Any:
    """The object of "module:name" or "module:class.name"."""
    module, _, attribute = name.partition(":")
    return operator.attrgetter(attribute)(importlib.import_module(module))


def gathered(options: Sequence[str]) -> list[str]:
    """The options, with `--data A --data B` turned into `--data A B`."""
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


def preset_name(options: Sequence[str]) -> str:
    """The value of `--preset` among the options."""
    for position, option in enumerate(options):
        if option == "--preset" and position + 1 < len(options):
            return options[position + 1]
        if option.startswith("--preset="):
            return option.removeprefix("--preset=")
    return PRESET


def usage(verbs: Sequence[Verb] = VERBS) -> str:
    """The help of the whole command, or of one group."""
    column = max(len(verb.name) for verb in VERBS) + 4
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    commands = "\n".join(
        textwrap.fill(
            f"  {printable(verb.name):<{column - 2}}{printable(verb.help)}", width, subsequent_indent=" " * column
        )
        for verb in verbs
    )
    return USAGE.format(version=__version__, commands=commands + "\n")
