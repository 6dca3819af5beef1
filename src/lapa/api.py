"""The commands as functions: `lapa.train_latent(...)` is `lapa latent train ...`.

    import lapa

    lapa.train_latent(preset="debug", data="runs/videos", out="runs/lam", steps=100)
    config = lapa.configure("latent train", preset="debug", data="runs/videos", out="runs/lam")
    lapa.train_latent(config)

Options have the names that `lapa latent train --help` lists, with `_` for `-`; a group with a dot (`--flow.width`) is
a dict (`flow={"width": 64}`). Every function raises UserError for a mistake of the user, and FloatingPointError where
a loss is not finite.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

from lapa import cli
from lapa.errors import UserError, unknown


def configure(command: str, /, **options: Any) -> Any:
    """Returns the config of a command such as "latent train", a frozen dataclass, from its options.

    Raises UserError for an unknown command, preset or option, a missing option, and a value of another type.
    """
    from lapa.help import options_of

    verb = _verb(command)
    kind, default = cli.imported(verb.config), cli.preset(verb, str(options.get("preset", cli.PRESET)))
    given, known = dict(_named(options)), {option.name: option for option in options_of(kind, default)}
    for name in given:
        if name not in known:
            raise unknown(f"option of lapa {command}", name, known)
    if missing := [name for name, option in known.items() if option.required and name not in given]:
        raise UserError(f"lapa {command} needs {', '.join(missing)}")
    positional = [word for name, value in given.items() if known[name].positional for word in _words(value)]
    words = [
        word
        for name, value in given.items()
        if not known[name].positional
        for word in (
            [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", *_words(value)]
        )
    ]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return cli.parse(verb, [*positional, *words])
    except SystemExit:
        message = " ".join(printed.getvalue().translate(BOX).split())
        raise UserError(f"lapa {command}: {message}") from None


def train_latent(config: Any = None, /, **options: Any) -> None:
    """Trains a latent action model on datasets, no actions needed; writes it to `out`. See `lapa latent train`."""
    _run("latent train", config, options)


def probe(config: Any = None, /, **options: Any) -> None:
    """Measures what a latent action model has learned; writes probe.json. See `lapa latent probe`."""
    _run("latent probe", config, options)


def label(config: Any = None, /, **options: Any) -> None:
    """Labels a dataset with the codes of a latent action model. See `lapa label`."""
    _run("label", config, options)


def pretrain(config: Any = None, /, **options: Any) -> None:
    """Pretrains a policy on latent actions; writes it to `out`. See `lapa policy pretrain`."""
    _run("policy pretrain", config, options)


def finetune(config: Any = None, /, **options: Any) -> None:
    """Finetunes a policy on robot episodes with actions; writes it to `out`. See `lapa policy finetune`."""
    _run("policy finetune", config, options)


def evaluate(config: Any = None, /, **options: Any) -> None:
    """Rolls a policy out in a simulator; writes results.json and videos. See `lapa evaluate`."""
    _run("evaluate", config, options)


# The frame that the parser draws around its messages.
BOX = dict.fromkeys(map(ord, "╭─╮│╰╯"), " ")


def _run(command: str, config: Any, options: Mapping[str, Any]) -> None:
    verb = _verb(command)
    kind = cli.imported(verb.config)
    if config is None:
        config = configure(command, **options)
    elif options:
        raise UserError("give a config or options, not both; dataclasses.replace changes a config")
    elif not isinstance(config, kind):
        raise UserError(f"expected a {kind.__name__}, got {type(config).__name__}; make one with lapa.configure")
    cli.carry_out(verb, config)


def _verb(command: str) -> cli.Verb:
    verb = cli.find_verb(command.split())
    if verb is None or verb.name != command:
        raise cli.unknown_command(command)
    return verb


def _named(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their names on the command line; None is an option that is not given."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name.replace('_', '-')}.")
        elif value is not None:
            yield f"{prefix}{name.replace('_', '-')}", value


def _words(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
