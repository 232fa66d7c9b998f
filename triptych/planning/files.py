"""JSON files that people write: read into a Struct or refused by name, and written whole or not at all.

Knows nothing about what is in them. The Structs forbid unknown fields, and refuse in `__post_init__` by ValueError what
no type can say, with a message that begins with the name of the field: "rate: 0 req/s is no rate; above 0 is needed".
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from triptych.config import valid_range
from triptych.errors import ConfigError
from triptych.planning.quantities import Quantity

Kind = TypeVar("Kind")

PATH = re.compile(r"\.([^.\[]+)|\[(\d+)\]|(\[\.\.\.\])")
PART = re.compile(r"([a-z0-9_]+)[^ ]*: ")
WRONG = re.compile(r"(?P<message>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?", re.DOTALL)
MOST_SHOWN = 60  # characters of a value in a message
FINITE = "only finite numbers are valid"
WANTED: dict[Any, tuple[Any, ...]] = {list: (list, tuple), dict: (dict,), str: (str, Literal)}


def read(path: str | Path, kind: type[Kind]) -> Kind:
    """What the file says. Raises ConfigError naming the file, the key and what is valid there."""
    try:
        value = _load(Path(path), _object)
        _check_finite(value, "")
        return convert(value, kind)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None


def load_object(path: str | Path) -> dict[str, Any]:
    """A JSON object of others, which may have anything in it. Raises ConfigError naming the file."""
    try:
        value = _load(Path(path), dict)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: is no JSON object")
    return value


def convert(value: Any, kind: type[Kind]) -> Kind:
    """What `json` would give, as `kind`. Raises ValueError naming the key and what is valid there."""
    try:
        return msgspec.convert(value, kind, dec_hook=_decode, str_keys=True)
    except msgspec.ValidationError as error:
        raise ValueError(_explained(str(error), value, kind)) from None


def write(path: str | Path, value: Any) -> None:
    """Raises ConfigError if it cannot be written."""
    write_bytes(path, dumped(value).encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Beside its place first, so that whoever reads it never sees a part, also if this process is killed. What a link
    names is replaced, and not the link; a pipe or a device, such as /dev/stdout, is written to.

    Raises ConfigError if it cannot be written; what was there is then untouched.
    """
    path = Path(path)
    beside = None
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                stream.write(content)
            return
        path = Path(os.path.realpath(path))
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            beside = file.name
            file.write(content)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if beside is not None:
            Path(beside).unlink(missing_ok=True)


def dumped(value: Any) -> str:
    """The text of the file. A number that is not finite is a fault of the program: ValueError."""
    builtins = msgspec.to_builtins(value, enc_hook=_encode, str_keys=True)
    return json.dumps(builtins, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def _load(path: Path, made: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=made)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("is not JSON: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice in one object")
        found[key] = value
    return found


def _check_finite(value: Any, name: str) -> None:
    """Python's JSON knows NaN, Infinity, and 1e999, which is infinite too."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_finite(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check_finite(part, f"{name}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not a finite number; {FINITE}")


def _decode(kind: type[Any], value: Any) -> Any:
    if issubclass(kind, Quantity):
        return kind.parse(value)
    raise NotImplementedError(kind)


def _encode(value: Any) -> Any:
    if isinstance(value, Quantity):
        return str(value)
    raise NotImplementedError(type(value))


# ---- what is wrong, in the words of the file


def _explained(text: str, value: Any, kind: Any) -> str:
    found = WRONG.fullmatch(text)
    assert found is not None
    place = _Place(value, kind)
    for key, index, some in PATH.findall(found["path"] or ""):
        place.enter(key or (int(index) if index else place.first_bad() if some else ""))
    message = found["message"]
    if name := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL):
        return place.inside(name[1]) + ": unknown key; " + _nearest(name[1], place.known())
    if name := re.fullmatch(r"Object missing required field `(.*)`", message):
        return f"{place.inside(name[1])}: is missing{place.needed(name[1])}"
    if part := PART.match(message):  # a Struct names the field itself
        return place.inside(message) if part[1] in place.known() else f"{place.name}: {message}"
    return f"{place.name}: {place.described(message)}" if place.name else place.described(message)


class _Place:
    """A place in a value that was read, and the type that it should have had."""

    def __init__(self, value: Any, kind: Any) -> None:
        self.name = ""
        self.value = value
        self.kind = _chosen(kind, value)
        self.range = valid_range(kind)

    def enter(self, step: str | int) -> None:
        self.name = f"{self.name}[{step}]" if isinstance(step, int) else self.inside(step)
        kind = _part(self.kind, step)
        try:
            self.value = self.value[step]
        except (LookupError, TypeError):
            self.value = None
        self.kind = _chosen(kind, self.value)
        self.range = valid_range(kind)

    def inside(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def first_bad(self) -> str:
        """msgspec does not say which key of a mapping."""
        for key, value in self.value.items():
            try:
                msgspec.convert({key: value}, self.kind, dec_hook=_decode, str_keys=True)
            except msgspec.ValidationError:
                return str(key)
        raise AssertionError(f"nothing is wrong in {self.name}")

    def known(self) -> list[str]:
        return list(_fields(self.kind)) + _tag_field(self.kind)

    def needed(self, key: str) -> str:
        kind = _fields(self.kind).get(key)
        if isinstance(kind, type) and issubclass(kind, Quantity):
            return f"; a number with its unit: {kind.known_units()}"
        tags = _tags(self.kind) if key in _tag_field(self.kind) else []
        return f"; one of {', '.join(map(str, tags))}" if tags else ""

    def described(self, message: str) -> str:
        shown = _shown(self.value)
        choices = [str(choice) for choice in get_args(self.kind)] if get_origin(self.kind) is Literal else []
        if message.startswith("Invalid value") or (choices and message.startswith("Invalid enum value")):
            choices = choices or list(map(str, _tags(self.kind)))
            return f"{shown} is not valid; {_nearest(str(self.value), choices)}"
        if self.range and message.startswith(("Expected `", "Number")) and isinstance(self.value, (int, float)):
            return f"{shown} is not valid; {self.range}"
        if message.startswith("Expected "):
            expected = message.removeprefix("Expected ").partition(", got")[0].replace("`", "")
            return f"expected {expected}, got {shown}" + (f"; {self.range}" if self.range else "")
        return message if message != "Number out of range" else f"{shown} is out of range; {FINITE}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known are {', '.join(known)}"


def _chosen(kind: Any, value: Any) -> Any:
    """Of a union the member that the value wants to be; an annotated type without its annotation."""
    if get_origin(kind) is Annotated:
        return _chosen(get_args(kind)[0], value)
    if get_origin(kind) not in (Union, UnionType):
        return kind
    members = [_chosen(member, value) for member in get_args(kind) if member is not type(None)]
    structs = [member for member in members if _is_struct(member)]
    if isinstance(value, dict) and structs:
        for struct in structs:
            config = struct.__struct_config__
            if config.tag_field is not None and value.get(config.tag_field) == config.tag:
                return struct
        return kind if len(structs) > 1 else structs[0]
    wanted = WANTED.get(type(value), ())
    fitting = [member for member in members if (get_origin(member) or member) in wanted]
    return fitting[0] if fitting else members[0] if len(members) == 1 else kind


def _part(kind: Any, step: str | int) -> Any:
    if _is_struct(kind):
        return _fields(kind).get(str(step), Any) if str(step) not in _tag_field(kind) else kind
    if get_origin(kind) in (Union, UnionType) and isinstance(step, str) and step in _tag_field(kind):
        return kind
    arguments = get_args(kind)
    if get_origin(kind) is tuple and isinstance(step, int):
        return arguments[0] if arguments[-1] is ... else arguments[step] if step < len(arguments) else Any
    return arguments[-1] if arguments and get_origin(kind) in (list, dict) else Any


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _fields(kind: Any) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)} if _is_struct(kind) else {}


def _structs(kind: Any) -> list[Any]:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [member for member in members if _is_struct(member)]


def _tag_field(kind: Any) -> list[str]:
    names = {struct.__struct_config__.tag_field for struct in _structs(kind)} - {None}
    return sorted(names)


def _tags(kind: Any) -> list[Any]:
    return [struct.__struct_config__.tag for struct in _structs(kind)]
