"""Command lines of the form key=value, for scripts that are not Hydra entries.

A script names its options as a dataclass; each field's metadata may hold its help. A wrong name or value is one
line and exit status 2; `--help` prints the options.
"""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from proxynorm.errors import ConfigError, ProxynormError

USER_ERROR = 2


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: the nearest of `choices`, and all of them."""
    choices = sorted(choices)
    close = get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}valid: {', '.join(choices)}"


def option(default: Any, text: str) -> Any:
    """A dataclass field with a help text."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(
            default_factory=lambda: type(default)(default), metadata={"help": text}
        )
    return dataclasses.field(default=default, metadata={"help": text})


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which for OmegaConf and Hydra is the one that tells."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fail(error: BaseException) -> NoReturn:
    """Print one line on standard error and exit with status 2."""
    sys.stderr.write(
        f"error: {' '.join(str(error).split())}\n"
    )  # in one piece, as other processes may write too
    sys.exit(USER_ERROR)


def parse_options(options: type, arguments: list[str]) -> Any:
    """An instance of the dataclass `options` from key=value strings. Raises ConfigError."""
    names = [field.name for field in dataclasses.fields(options)]
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        if not separator:
            raise ConfigError(f"'{argument}' is not of the form key=value; {nearest(name, names)}")
        if name.split(".")[0] not in names:
            raise ConfigError(f"no option '{name}'; {nearest(name, names)}")
    try:
        defaults, given = OmegaConf.structured(options), OmegaConf.from_dotlist(arguments)
        for name, value in given.items():
            if OmegaConf.is_list(defaults._get_node(name)) and not OmegaConf.is_config(
                value
            ):  # [name] of ??? raises
                given[name] = [value]  # norms=ln is norms=[ln]
        return OmegaConf.to_object(OmegaConf.merge(defaults, given))
    except (OmegaConfBaseException, YAMLError) as error:
        key = getattr(error, "full_key", None)
        if isinstance(error, MissingMandatoryValue):
            raise ConfigError(f"{key}= is missing; --help tells what it is") from None
        raise ConfigError(f"{key}: {first_line(error)}" if key else first_line(error)) from error


def options_help(options: type) -> str:
    """One aligned line an option: name=default and what it is for."""
    rows = []
    for field in dataclasses.fields(options):
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        shown = "…" if default == "???" else "" if default is None else default
        rows.append((f"{field.name}={shown}", field.metadata.get("help", "")))
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)


def guard(action: Callable[[], int | None]) -> NoReturn:
    """Run `action`, turning the user's mistakes into one line and status 2, and Ctrl-C into one line and 130; a reader of the
    output that has left, as head does, ends it without a word with 141."""
    try:
        status = action() or 0
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        leave_pipe()
        raise
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
    except ProxynormError as error:
        fail(error)


def leave_pipe() -> None:
    """Exit with status 141, as by SIGPIPE, if nobody reads standard output any more."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if pipe.poll(0):
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for the flush at the interpreter's exit
        sys.exit(128 + signal.SIGPIPE)


def script(options: type, action: Callable[[Any], int | None], description: str) -> NoReturn:
    """Entry of a script: parse its arguments, run `action(options)`, exit with what it returns."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        guard(
            lambda: print(f"{description.strip()}\n\nOptions (key=value):\n{options_help(options)}")
        )
    guard(lambda: action(parse_options(options, arguments)))
