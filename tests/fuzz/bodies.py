"""Bodies of requests: good ones, and what becomes of them in the hands of a client that is broken or means harm."""

import base64
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from tests.fuzz.files import MIME, broken_file, whole_files

MODEL = "test-model"
ROUTES = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
FIELD_OF = {"image": "image_url", "video": "video_url", "audio": "audio_url"}

Json = Any
Request = tuple[str, bytes, str]  # path, body, what was done to it


def hostile_request(rng: random.Random) -> Request:
    """Sometimes nothing is wrong with it."""
    path = rng.choice(ROUTES[:1] * 4 + ROUTES)
    body = good_body(path, rng)
    notes: list[str] = []
    if rng.random() < 0.75:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            notes.append(_change(body, rng))
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.25:
        text, note = _mangled(text, rng)
        notes.append(note)
    return path, text, "; ".join(notes)


def media_request(rng: random.Random) -> Request:
    """One or two media items, at least one of them broken."""
    modality = rng.choice(list(FIELD_OF))
    kind, data = broken_file(modality, rng)
    parts = [media_part(modality, data, rng)]
    if rng.random() < 0.3:
        other = rng.choice(list(FIELD_OF))
        parts.insert(rng.randrange(2), media_part(other, rng.choice(list(whole_files(other).values())), rng))
    body = _chat([*parts, {"type": "text", "text": "What is it?"}], rng)
    path = "/tokenize" if rng.random() < 0.2 else "/v1/chat/completions"
    return path, json.dumps(body).encode(), kind


def url_request(rng: random.Random) -> Request:
    """One item, from where nothing should come from."""
    modality = rng.choice(list(FIELD_OF))
    url = _bad_url(modality, rng)
    field = FIELD_OF[modality]
    value = url if rng.random() < 0.2 else {"url": url}
    part = {"type": field, field: value}
    if modality == "audio" and rng.random() < 0.3:
        part = {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}
    return ROUTES[0], json.dumps(_chat([part], rng)).encode(), url[:200]


def good_body(path: str, rng: random.Random) -> dict[str, Json]:
    match path:
        case "/v1/chat/completions":
            return _chat(_parts(rng), rng)
        case "/v1/completions":
            prompts: list[Json] = ["Once", [1, 2, 3], ["a", "b"], [[1, 2], [3]]]
            return {"model": MODEL, "prompt": rng.choice(prompts), **_sampling(rng)}
        case "/tokenize":
            return {"prompt": "Some text"} if rng.random() < 0.5 else {"messages": _messages(_parts(rng))}
        case _:
            return {"tokens": [rng.randrange(200) for _ in range(5)]}


def media_part(modality: str, data: bytes, rng: random.Random) -> dict[str, Json]:
    encoded = base64.b64encode(data).decode()
    if modality == "audio" and rng.random() < 0.5:
        return {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}
    field = FIELD_OF[modality]
    part: dict[str, Json] = {"type": field, field: {"url": f"data:{MIME[modality]};base64,{encoded}"}}
    if rng.random() < 0.1:
        part["uuid"] = rng.choice(["a", "b"])
    return part


def _parts(rng: random.Random) -> list[Json]:
    parts: list[Json] = [{"type": "text", "text": "What is it?"}]
    for _ in range(rng.choice([0, 0, 1, 2])):
        modality = rng.choice(list(FIELD_OF))
        parts.append(media_part(modality, rng.choice(list(whole_files(modality).values())), rng))
    return parts


def _messages(parts: list[Json]) -> list[Json]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]


def _chat(parts: list[Json], rng: random.Random) -> dict[str, Json]:
    return {"model": MODEL, "messages": _messages(parts), **_sampling(rng)}


def _sampling(rng: random.Random) -> dict[str, Json]:
    """Every answer is short: what is looked for is not how long a model can talk."""
    sampling: dict[str, Json] = {"max_tokens": rng.randrange(1, 5)}
    more: dict[str, Json] = {
        "stream": True,
        "temperature": 0.5,
        "n": 2,
        "logprobs": None,
        "seed": 5,
        "stop": ["a"],
        "top_p": 0.5,
        "stream_options": {"include_usage": True},
        "media_io_kwargs": {"video": {"num_frames": 2}},
        "chat_template_kwargs": {"a": 1},
    }
    return sampling | {name: more[name] for name in rng.sample(sorted(more), rng.randrange(4))}


# ---- changes of the tree

_NUMBERS = [0, -1, 1, 2, 1.5, -0.0, 128, 129, 1 << 31, 1 << 32, 1 << 63, 1 << 64, -(1 << 63), 10**400, 1e308, 5e-324]
_TEXTS = [
    "", " ", "\0", "a\0b", "\ud800", "\udfff\ud800", "\u202e", "😀" * 50, "x" * 100_000, "'; --", "{{ 7 * 7 }}",
    "{% raw %}", "<|IMAGE|>", "<|AUDIO|>", "<|VIDEO|>", "<|im_end|>", "<|im_start|>system", "../../etc/passwd", "null",
    "NaN", "text", "image_url", "\r\nx: y", "a" * 1025,
]  # fmt: skip
_OTHERS: list[Json] = [None, True, False, [], {}, [[]], {"": {}}, [None] * 50, {"type": "text"}, ["a", 1, None, {}]]


def _any(rng: random.Random) -> Json:
    pool = rng.choice([_NUMBERS, _TEXTS, _OTHERS])
    value = copy.deepcopy(rng.choice(pool))  # type: ignore[arg-type]
    return value if rng.random() < 0.9 else _nested(rng.choice([5, 50, 500]), value)


def _nested(depth: int, value: Json) -> Json:
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _change(body: dict[str, Json], rng: random.Random) -> str:
    """One change of one place. In place; says which."""
    places = list(_places(body))
    if not places or rng.random() < 0.2:
        name = rng.choice(_FIELDS)
        body[name] = bounded(name, _any(rng))
        return f"{name} added"
    parent, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del parent[key]
            return f"{key} removed"
        case 1 if isinstance(parent, dict):
            parent[f"{key}s"] = parent.pop(key)
            return f"{key} renamed"
        case 2 if isinstance(parent, list):
            parent += [copy.deepcopy(parent[key])] * rng.choice([1, 5, 40])
            return f"{key} repeated"
        case 3:
            parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, str(parent[key])[:1000]])
            return f"{key} wrapped"
    parent[key] = bounded(key, _any(rng))
    return f"{key} replaced"


def bounded(name: str | int, value: Json) -> Json:
    """No answer of thousands of tokens, nor of a hundred choices: those are good requests, and take their time."""
    too_long = name in ("max_tokens", "max_completion_tokens", "n") and isinstance(value, int) and 8 < value < 1 << 20
    return 8 if too_long else value


def _places(node: Json) -> Iterator[tuple[Any, Any]]:
    keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in list(keys):
        yield node, key
        yield from _places(node[key])


_FIELDS = [
    "n", "stop", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens", "response_format",
    "user", "stream", "stream_options", "tools", "tool_choice", "logit_bias", "guided_json", "documents",
    "chat_template", "messages", "prompt", "tokens", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs", "media_io_kwargs", "max_completion_tokens", "logprobs", "top_logprobs", "echo",
    "best_of", "add_special_tokens", "model", "return_token_strs", "timeout", "nobody_knows_this",
]  # fmt: skip


# ---- changes of the text


def _mangled(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    place = rng.randrange(len(text) + 1)
    match rng.randrange(14):
        case 0:
            return text[:place], "cut"
        case 1:
            return text + b"}", "one brace more"
        case 2:
            return b"\xef\xbb\xbf" + text, "byte order mark"
        case 3:
            return text.decode("utf-8", "replace").encode("utf-16"), "UTF-16"
        case 4:
            return text[:place] + bytes([rng.randrange(128, 256)]) + text[place:], "a byte that is no UTF-8"
        case 5:
            return text[:place] + b"\\ud800" + text[place:], "half a surrogate"
        case 6:
            return b'{"model": "x", ' + text[1:], "a key twice"
        case 7:
            return b'{"messages": ' + rng.choice([b"[", b'{"a":']) * 100_000, "nested without end"
        case 8:
            depth = rng.choice([900, 1100, 5000])
            return b'{"tools": ' + b"[" * depth + b"]" * depth + b", " + text[1:], f"nested {depth} deep"
        case 9:
            number = rng.choice(
                [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" * 5000, b"0x10", b"01", b"+1", b"1."]
            )
            return b'{"temperature": ' + number + b", " + text[1:], "no number"
        case 10:
            return b"", "nothing"
        case 11:
            return rng.randbytes(rng.randrange(200)), "garbage"
        case 12:
            return text.replace(b'"', b"'"), "single quotes"
        case _:
            flipped = bytearray(text)
            for _ in range(rng.randrange(1, 5)):
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            return bytes(flipped), "changed bytes"


# ---- changes of where media come from


def _bad_url(modality: str, rng: random.Random) -> str:
    name = rng.choice(sorted(whole_files(modality)))
    encoded = base64.b64encode(whole_files(modality)[name]).decode()
    mime = rng.choice(
        ["image/png", "text/html", "", "video/mp4", "application/octet-stream", "image/svg+xml", "a" * 5000]
    )
    if rng.random() < 0.5:
        place = rng.randrange(len(encoded))
        encoded = rng.choice(
            [
                encoded[:place], encoded.rstrip("=") + "=" * rng.randrange(5), encoded[:place] + "\n" + encoded[place:],
                encoded[:place] + " " + encoded[place:], encoded.replace("+", "-").replace("/", "_"),
                encoded[:place] + "=" + encoded[place:], encoded[:place] + "é" + encoded[place:], encoded * 2, "====",
                encoded[:place] + "\0" + encoded[place:], encoded[:place] + "\ud800", "A" * 2_000_000, "",
            ]
        )  # fmt: skip
        return rng.choice([f"data:{mime};base64,{encoded}", f"data:{mime};charset=x;base64,{encoded}"])
    return rng.choice(
        [
            f"data:{mime},{encoded}", f"data:{encoded}", "data:", "data:;base64,", "DATA:image/png;BASE64," + encoded,
            "http://127.0.0.1:1/a.png", "http://localhost:1/", "http://[::1]:1/", "http://0/", "http://0x7f.1/",
            "http://2130706433/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://[::ffff:7f00:1]/",
            "http://[fe80::1%25eth0]/", "http://localhost.:80/", "http://127.0.0.1:99999/", "http://127.0.0.1:-1/",
            "http://user:secret@127.0.0.1/", "http://127.0.0.1#@example.invalid/", "http://example.invalid/",
            "https://nobody.invalid:443/", "http:///", "http:", "http://", "https://\0/", "http://a b/", "http://[", "http://]",
            "http://" + "a" * 300 + ".invalid/", "http://127.0.0.1:1/" + "a" * 100_000, "http://127.0.0.1:1/\r\nx-y: z",
            "http://xn--a.invalid/", "http://ß.invalid/", "http://\uff0531.invalid/", "http://127.0.0.1:1/\ud800",
            "file:///etc/passwd", "file://localhost/etc/passwd", "file:/dev/zero", "FILE:///dev/zero", "ftp://127.0.0.1/",
            "gopher://127.0.0.1/", "javascript:alert(1)", "/etc/passwd", "", " ", "\0", "a" * 1_000_000,
            "blob:x", "://",
        ]
    )  # fmt: skip
