"""Options of a command from a YAML file: its keys are the names of the flags, with hyphens or underscores, as in vLLM.

JSON is YAML. What stands on the command line wins: the file only gives other defaults. What is wrong is told in the
words of whoever said it: keys of the file, or flags.
"""

import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import msgspec
import typer
import yaml

from triptych.config import refusal, require
from triptych.errors import ConfigError

JSON = "JSON"  # metavar of a flag whose text is JSON: in a file it may be a mapping
NO_KEYS = {"context", "config", "return"}  # of what a command is annotated with
NO_FLAGS = {"context", "model"}  # of its parameters
FILE = "file"  # in the notes of a context

Options = ParamSpec("Options")
Result = TypeVar("Result")


def load(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of an eager `--config`. Raises ConfigError naming the file and the key."""
    if path is not None:
        hints = get_type_hints(context.command.callback, include_extras=True)
        context.default_map = read(path, {name: hint for name, hint in hints.items() if name not in NO_KEYS})
        context.meta[FILE] = path
    return path


def naming_flags(command: Callable[Options, Result]) -> Callable[Options, Result]:
    """A command whose ConfigErrors name its flags, or, if it takes its context, the file where a value is from."""
    known = inspect.signature(command).parameters.keys() - NO_FLAGS

    @functools.wraps(command)
    def run(*args: Options.args, **options: Options.kwargs) -> Result:
        try:
            return command(*args, **options)
        except ConfigError as error:
            context: Any = options.get("context")
            key = _blamed(str(error), _from_file(context))
            if key is None:
                raise ConfigError(_with_flags(str(error), known)) from error
            field, colon, message = str(error).partition(": ")
            said = message if colon and _without_unit(field) == _without_unit(key) else str(error)
            named = "" if _words(said)[0] == key else f"{key}: "
            raise ConfigError(f"{context.meta[FILE]}: {named}{said}") from error

    return run


def read(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file, by parameters with their annotations. Raises ConfigError naming the file and the key."""
    found = _parse(path)
    require(isinstance(found, dict), str(path), f"expected keys and values, got {found!r:.100}")
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{_nearest(name, known)}")
        require(name not in values, str(path), f"{key} stands there twice")
        values[name] = _value(f"{path}: {key}", value, known[name])
    return values


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML 1.1, but for equal keys, which are refused, and for numbers such as 1e3, which are numbers as in JSON."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands there twice", problem_mark=mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(path: Path) -> Any:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config: {path} is not UTF-8 text") from None
    try:
        return yaml.load(text, _Loader) or {}
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise ConfigError(f"{where}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _value(where: str, value: Any, hint: Any) -> Any:
    """Of exactly the type that the parameter has. One value stands for a list of it, a mapping for its JSON text."""
    wanted, option = get_args(hint)
    if option.metavar == JSON and isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, str) and any(part == list[str] for part in get_args(wanted)):
        value = [value]
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {refusal(value, wanted, str(error))}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown key."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"


def _from_file(context: typer.Context | None) -> list[str]:
    """The keys whose values come from there."""
    if context is None or context.default_map is None:
        return []
    sources = {key: context.get_parameter_source(key) for key in context.default_map}
    return [key for key, source in sources.items() if source is not None and source.name == "DEFAULT_MAP"]


def _blamed(message: str, given: Iterable[str]) -> str | None:
    """The key of the file that an error is about: the field that it begins with, or another that it tells the value of.

    A field may hold in bytes what the key tells in GiB.
    """
    named = {_without_unit(word) for word in _words(message)}
    return next((key for key in given if _without_unit(key) in named), None)


def _words(message: str) -> list[str]:
    """Fields that a message of `require` names: before the colon, and before an equals sign."""
    head = re.match(r"(-*\w[-\w]*(, \w+)*)?", message)
    assert head is not None
    words = head[0].split(", ") + re.findall(r"(\w+)=", message)
    return [word.strip("-").replace("-", "_") for word in words]


def _without_unit(name: str) -> str:
    return re.sub(r"_(bytes|gib|mib)$", "", name)


def _with_flags(message: str, known: Iterable[str]) -> str:
    """Fields that a message begins with, or tells the value of, as the flags that they come from."""
    flags = {_without_unit(name): f"--{name.replace('_', '-')}" for name in known}

    def named(field: re.Match[str]) -> str:
        return flags.get(_without_unit(field[0]), field[0])

    head, colon, rest = message.partition(": ")
    if colon and re.fullmatch(r"\w+(, \w+)*", head):
        head = re.sub(r"\w+", named, head)
    return head + colon + re.sub(r"\b\w+(?==)", named, rest)
