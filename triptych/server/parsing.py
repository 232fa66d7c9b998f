"""From the bytes of a body to a checked request. Every error names the field that is to blame and what it may be."""

import functools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import msgspec
from msgspec.inspect import FloatType, IntType, StructType, Type, UnionType, type_info

from triptych.errors import RequestError
from triptych.server.schema import PART_TYPES, AudioFormat, GenerateRequest

T = TypeVar("T", bound=msgspec.Struct)

_PLACE = re.compile(r"^(?P<text>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN_VALUE = re.compile(r"Invalid (?:enum )?value '?(.*?)'?$", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(\w+)`")
_MISTYPED = re.compile(r"Expected `(?P<expected>[^`]*)`(?P<bound> [^`]*?)?(?:, got `(?P<got>[^`]*)`)?$")
_UNTYPED_PART = re.compile(r"Object missing required field `type` - at `\$\.messages\[\d+\]\.content\[\d+\]`")

_WORDS = {
    "object": "an object",
    "array": "an array",
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}
_MAX_QUOTED = 100  # characters of what a client wrote, in an error


def decode_body(body: bytes, kind: type[T]) -> T:
    """Raises RequestError naming the field."""
    try:
        return _decoded(body, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not body.strip():
            raise RequestError("the body is empty; a JSON object is needed", code="invalid_json") from error
        path = _non_finite_field(body)
        if path is not None:
            raise _out_of_range(path, "JSON knows no NaN and no Infinity", kind) from error
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        decoder: msgspec.json.Decoder[T] = _decoder(kind)
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        if _UNTYPED_PART.fullmatch(str(error)) is None:
            raise
        tree = msgspec.json.decode(body)
        _name_types(tree["messages"])
        return msgspec.convert(tree, kind)


def _name_types(messages: list[Any]) -> None:
    """Content parts may leave their type out, as with vLLM: the field with the media says it."""
    parts = (part for message in messages if isinstance(message, dict) for part in _parts(message.get("content")))
    for part in parts:
        named = [kind for kind in PART_TYPES if kind in part]
        if "type" not in part and len(named) == 1:
            part["type"] = named[0]


def _parts(content: Any) -> list[dict[str, Any]]:
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


@functools.cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


def check_supported(request: GenerateRequest) -> None:
    """Raises RequestError for a field that would change the answer in a way this server cannot."""
    name = request.refused_field()
    if name is not None:
        raise unsupported(name)
    if request.skip_special_tokens is False:
        raise unsupported("skip_special_tokens")
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", "only the type 'text' is")


@contextmanager
def blamed(field: str) -> Iterator[None]:
    """Names `field` in errors that name none, unless it is the server that has no room."""
    try:
        yield
    except RequestError as error:
        if error.param is not None or error.status == 503:
            raise
        raise RequestError(f"{field}: {error}", status=error.status, param=field, code=error.code) from error


def unsupported(field: str, hint: str = "") -> RequestError:
    text = f"{field} is not supported by this server" + (f"; {hint}" if hint else "")
    return RequestError(text, param=field, code="unsupported_parameter")


# ---- what to tell the client


def _explained(message: str, kind: type[msgspec.Struct]) -> RequestError:
    match = _PLACE.match(message)
    assert match is not None
    text, path = match["text"], match["path"] or ""
    missing = _MISSING.match(text)
    if missing is not None:
        path = f"{path}.{missing[1]}".lstrip(".")
        return RequestError(f"{path}: this field is required", param=path, code="missing_field")
    stranger = _UNKNOWN_FIELD.match(text)
    if stranger is not None:
        return unsupported(f"{path}.{stranger[1]}")
    unknown = _UNKNOWN_VALUE.match(text)
    if unknown is not None:
        return _unknown_value(path, unknown[1])
    if text == "Expected `array` of length >= 1":
        text = "must not be empty"
    elif path.endswith("].content"):
        text = "expected a string or a list of content parts"
    else:
        text = _MISTYPED.sub(_in_words, text)
    return _out_of_range(path, text, kind)


def _unknown_value(path: str, value: str) -> RequestError:
    value = value if len(value) <= _MAX_QUOTED else f"{value[:_MAX_QUOTED]}..."
    if path.endswith(".type"):
        part = path.removesuffix(".type")
        text = f"{part}: content of type {value!r} is not supported; types are {_listed(PART_TYPES)}"
        return RequestError(text, param=part, code="unsupported_content")
    if path.endswith(".role"):
        text = f"{path}: {value!r} is no role; roles are 'system', 'developer', 'user' and 'assistant'"
        return RequestError(text, param=path, code="invalid_value")
    if path.endswith(".format"):
        text = f"{path}: {value!r} is no format of sounds; formats are {_listed(get_args(AudioFormat))}"
        return RequestError(text, param=path, code="invalid_value")
    return RequestError(f"{path}: {value!r} is not a valid value", param=path, code="invalid_value")


def _in_words(mistyped: re.Match[str]) -> str:
    """Of types as JSON calls them. The bound of a number is left out: its valid range follows."""
    expected, got = (_types(mistyped[name]) for name in ("expected", "got"))
    bound = mistyped["bound"] or ""
    return f"expected {expected}" + (bound if "length" in bound else "") + (f", got {got}" if got else "")


def _types(text: str | None) -> str:
    return " or ".join(_WORDS.get(name, name) for name in (text or "").split(" | "))


def _listed(names: tuple[str, ...]) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _out_of_range(path: str, text: str, kind: type[msgspec.Struct]) -> RequestError:
    valid = _valid_range(kind, path)
    message = f"{path or 'the body'}: {text}" + (f" (valid: {valid})" if valid else "")
    return RequestError(message, param=path or None, code="invalid_value")


def _valid_range(kind: type[msgspec.Struct], path: str) -> str | None:
    """In words, for a numeric field of `kind`, or of an object in it."""
    first, _, rest = path.partition(".")
    info = type_info(kind)
    assert isinstance(info, StructType)
    options = [option for field in info.fields if field.encode_name == first for option in _options(field.type)]
    if rest:
        inner = next((option.cls for option in options if isinstance(option, StructType)), None)
        return None if inner is None else _valid_range(inner, rest)
    return next((text for text in map(_bounds, options) if text), None)


def _options(kind: Type) -> Iterator[Type]:
    if isinstance(kind, UnionType):
        for option in kind.types:
            yield from _options(option)
    elif isinstance(kind, msgspec.inspect.Metadata):
        yield from _options(kind.type)
    else:
        yield kind


def _bounds(kind: Type) -> str:
    if not isinstance(kind, IntType | FloatType):
        return ""
    lower = f"at least {kind.ge:g}" if kind.ge is not None else f"more than {kind.gt:g}" if kind.gt is not None else ""
    upper = f"at most {kind.le}" if kind.le is not None else ""
    return " and ".join(bound for bound in (lower, upper) if bound)


def _non_finite_field(body: bytes) -> str | None:
    """The path of the first NaN or Infinity in a body that is JSON but for those, else None."""
    try:
        return next(_non_finite_paths(json.loads(body), ""), None)
    except (ValueError, RecursionError):
        return None


def _non_finite_paths(node: object, path: str) -> Iterator[str]:
    if isinstance(node, float) and not math.isfinite(node):
        yield path
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _non_finite_paths(child, f"{path}.{name}".lstrip("."))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _non_finite_paths(child, f"{path}[{index}]")
