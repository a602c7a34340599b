"""Options and settings: dataclass fields that declare their values, and command lines of key=value.

A command declares its options as a dataclass of `option` fields; the settings of a run are `number`
and `choice` fields. A wrong name or value is reported in one line, with exit status 2; `--help`
prints the options of a command.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import select
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from proxynorm.errors import ConfigError, FileError, ProxynormError

WIDTH, COLUMN = 80, 27  # the width of help texts, and where their explanations begin
# The ranges of numbers, in words and as a test. Whether null is allowed depends on the type.
RANGES: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "at least 0 and finite": lambda value: 0 <= value < math.inf,
    "above 0 and finite": lambda value: 0 < value < math.inf,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0.001 to 1": lambda value: 0.001 <= value <= 1,
    "from 1 to 100": lambda value: 1 <= value <= 100,
    "from 1 to 65535": lambda value: 1 <= value <= 65_535,
}

# What the types of options and settings are called in messages.
KINDS = {
    "int": "a whole number in digits",
    "float": "a number",
    "bool": "true or false",
    "str": "one text",
    "list[str]": "a list of texts, as [a,b]",
    "list[float]": "a list of numbers, as [1,2]",
    "tuple[float, ...]": "a list of numbers, as [1,2]",
    "tuple[int, int]": "two whole numbers, as [0,5]",
    "dict[str, float]": "numbers by name, as {fc:10}",
}


def nearest(name: str, choices: Iterable[str], others: Iterable[str] = ()) -> str:
    """Return the end of an error message: the nearest name, and all `choices`.

    others: valid names that are too many to list.
    """
    choices = sorted(set(choices))
    close = get_close_matches(name.lower(), [*choices, *others], n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}valid: {', '.join(choices)}"


def option(default: Any, text: str, bounds: str = "", choices: Iterable[str] = ()) -> Any:
    """Declare an option of a command with its help text.

    bounds: its range, one of RANGES; choices: the words allowed for it, or for each item of a list.
    """
    metadata = {"help": text, "range": bounds, "choices": tuple(choices)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def number(default: Any, bounds: str) -> Any:
    """Declare a setting whose range is one of RANGES."""
    return dataclasses.field(default=default, metadata={"range": bounds})


def choice(default: Any, *others: Any, hint: str = "") -> Any:
    """Declare a setting that takes one of these values. hint: the end of an error message."""
    metadata = {"choices": (default, *others), "hint": hint}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(record: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first invalid value of a dataclass or of one nested in it.

    prefix: what precedes the names of the fields in the message.
    """
    for item in dataclasses.fields(record):
        key, value = f"{prefix}{item.name}", getattr(record, item.name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{key}.")
        elif isinstance(value, dict):
            for name, each in value.items():
                _check_value(f"{key}.{name}", each, item.metadata)
        elif isinstance(value, (list, tuple)):
            # if choices are given, an empty list is a mistake, refused like ""
            for each in value or ([""] if item.metadata.get("choices") else []):
                _check_value(key, each, item.metadata)
        elif value is not None:
            _check_value(key, value, item.metadata)


def _check_value(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    bounds, choices = metadata.get("range"), metadata.get("choices")
    if choices and value not in choices:
        valid = [str(word).lower() for word in choices]  # true, as in YAML
        near = nearest(str(value), valid) + metadata.get("hint", "")
        raise ConfigError(f"{key}={value}: {near}")
    if bounds and not RANGES[bounds](value):
        raise ConfigError(f"{key}={value:g}: must be {bounds}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{key}={value}: is too large")
    if value == "":
        raise ConfigError(f"{key}= is empty: give a value, or leave it out")


def wrong_type(error: OmegaConfBaseException, declared: Mapping[str, Any], values: Any) -> str:
    """Say in plain words what a key takes, for OmegaConf's error about the type of its value.

    declared: the fields by key; values: a mapping that holds the value.
    """
    key = (error.full_key or "").partition("[")[0]
    while key and key not in declared:
        key = key.rpartition(".")[0]
    kind = declared[key].type if key else ""
    words = KINDS.get(kind.removesuffix(" | None"))
    if words is None:
        return f"{error.full_key}: {first_line(error)}"
    value = OmegaConf.select(OmegaConf.create(values), key)
    null = ", or null" if kind.endswith(" | None") else ""
    return f"{key}={'null' if value is None else value}: must be {words}{null}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; OmegaConf and Hydra add details below it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def as_installed(text: str) -> str:
    """Replace the scripts in a text by `proxynorm NAME` if the command was started that way.

    An installed package has no scripts/.
    """
    if not sys.argv[0].startswith("proxynorm "):
        return text
    text = re.sub(r"(torchrun .*?)\btrain\.py", r"\1-m proxynorm train", text)
    text = re.sub(r"(?:python )?scripts/write_ffcv\.py", "proxynorm write-ffcv", text)
    return re.sub(r"(?:python )?(?:scripts/(\w+)|\b(train|eval))\.py", r"proxynorm \1\2", text)


def fail(error: ProxynormError) -> NoReturn:
    """Print one line on standard error and exit with the error's status."""
    # A single write, because other processes may print at the same time.
    sys.stderr.write(f"error: {as_installed(' '.join(str(error).split()))}\n")
    sys.exit(error.status)


def split_list(text: str) -> list[str]:
    """Split "a,b" or "[a,b]" at the commas outside of quotes and inner brackets."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    found = re.findall(r"""\s*('(?:\\.|[^\\'])*'|"(?:\\.|[^\\"])*"|(?:\[[^\]]*]|[^,])+)""", inner)
    return [item.strip() for item in found if item.strip()]


def in_quotes(text: str) -> bool:
    """Return whether a text has quotes around it."""
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def parse_options(options: type, arguments: list[str]) -> Any:
    """Create the dataclass `options` from key=value strings. Raises ConfigError."""
    types, values = get_type_hints(options), {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not separator:
            raise ConfigError(f"'{argument}' is not of the form key=value; {nearest(name, types)}")
        if name not in types:
            raise ConfigError(f"no option '{name}'; {nearest(name, types)}")
        values[name] = read_value(text, types[name])
    try:  # OmegaConf converts the texts to the types of the fields
        parsed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(options), values))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}= is missing; see --help") from None
    except OmegaConfBaseException as error:
        fields = {field.name: field for field in dataclasses.fields(options)}
        raise ConfigError(wrong_type(error, fields, values)) from error
    check_fields(parsed)
    return parsed


def read_value(text: str, kind: Any) -> Any:
    """Return None for null, a text without its quotes, or a list, whose brackets are optional."""
    if text == "null":
        return None
    if list[str] in (kind, *get_args(kind)):  # norms=ln means norms=[ln]
        if text.startswith("[") and not text.endswith("]"):
            raise ConfigError(f"{text}: a bracket is not closed")
        return [read_value(item, str) for item in split_list(text)]
    return text[1:-1] if in_quotes(text) else text


def options_help(options: type) -> str:
    """Return the help texts of the options, each with its default, in two columns."""
    rows = []
    for field in dataclasses.fields(options):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        shown = {"???": "…", "None": ""}.get(str(default), default)
        rows.append((f"{field.name}={shown}", field.metadata.get("help", "")))
    column = min(COLUMN, max(len(left) for left, _ in rows) + 4)
    return "".join(help_entry(left, right, column) for left, right in rows).rstrip()


def help_entry(left: str, text: str, column: int = COLUMN) -> str:
    """Return a word with its explanation beside it, or below it if the word is long."""
    head, indent = f"  {left}", " " * column
    body = textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    if len(head) < column - 1:
        return f"{head:<{column}}{body[column:]}".rstrip() + "\n"
    return f"{head}\n{body}".rstrip() + "\n"


def guard(action: Callable[[], int | None]) -> NoReturn:
    """Run `action` and exit with its status.

    User errors, such as a file that cannot be written, print one line and exit with status 2.
    Ctrl-C prints one line and exits with 130. A closed pipe, as with `| head`, exits silently with
    141.
    """
    try:
        status = action() or 0
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        if not pipe.poll(0):  # not standard output but another pipe
            raise
        # The interpreter flushes standard output again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
    except ProxynormError as error:
        fail(error)
    except OSError as error:
        if error.filename is None:
            raise
        fail(FileError(f"{error.filename}: {error.strerror}"))


def script(options: type, action: Callable[[Any], int | None], description: str) -> NoReturn:
    """Parse the arguments, run `action(options)` and exit with its status, or print the help."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        text = re.sub(
            r"(?m)^\S.*(?:\n\S.*)*",  # paragraphs; indented lines stay as they are
            lambda paragraph: textwrap.fill(paragraph[0], WIDTH),
            as_installed(description.strip()),
        )
        rows = as_installed(options_help(options))
        guard(lambda: print(f"{text}\n\nOptions (key=value):\n{rows}"))
    guard(lambda: action(parse_options(options, arguments)))
