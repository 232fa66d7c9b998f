"""Whatever a client gets wrong: an OpenAI error body that names the field, and a server that goes on."""

import base64
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import httpx
import openai
import pytest

from tests.server.fakes import Stack, data_url, image_part, picture, processor

MiB = 1 << 20


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(max_body_bytes=MiB, max_image_pixels=10_000, limit_mm_per_prompt={"image": 2}) as stack:
        yield stack


def messages(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, *parts]}]}


TRUNCATED = picture(90, 90, kind="JPEG")[:-100]
IMAGE_FIELD = "messages[0].content[1].image_url"

BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "wizard"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string or a list"),
    (
        messages({"type": "model_url", "model_url": {"url": "x"}}),
        "messages[0].content[1]",
        "'model_url' is not supported",
    ),
    (messages({"picture": "x"}), "messages[0].content[1].type", "required"),
    (messages({"image_url": "x", "video_url": "x"}), "messages[0].content[1].type", "required"),
    (messages(3), "messages[0].content[1]", "a whole number"),
    (messages({"type": "image_url"}), IMAGE_FIELD, "required"),
    (messages({"type": "image_url", "image_url": None}), IMAGE_FIELD, "required"),
    (messages(image_part("")), IMAGE_FIELD, "required"),
    (messages({"type": "image_url", "video_url": "x"}), IMAGE_FIELD, "required"),
    (messages({"type": "image_url", "image_url": 3}), IMAGE_FIELD, "a whole number"),
    (
        messages({"type": "input_audio", "input_audio": {}}),
        "messages[0].content[1].input_audio",
        "not supported by this",
    ),
    (messages(image_part("data:image/png;base64,@@@@")), IMAGE_FIELD, "base64"),
    (messages(image_part("data:image/png;base64,abc")), IMAGE_FIELD, "base64"),
    (messages(image_part("data:image/png,abc")), IMAGE_FIELD, "data:"),
    (messages(image_part(data_url(b"this is no picture"))), IMAGE_FIELD, "decoded"),
    (messages(image_part(data_url(b""))), IMAGE_FIELD, "decoded"),
    (messages(image_part(data_url(picture(2, 401)))), IMAGE_FIELD, "at most 200 times the shorter"),
    (messages(image_part(data_url(TRUNCATED, "image/jpeg"))), IMAGE_FIELD, "decoded"),
    (messages(image_part(data_url(picture(101, 100)))), IMAGE_FIELD, "101 x 100"),
    (messages(*[image_part(data_url(picture()))] * 3), "messages[0].content[3].image_url", "at most 2"),
    (messages(image_part("ftp://example.com/a.png")), IMAGE_FIELD, "http"),
    (messages(image_part("a.png")), IMAGE_FIELD, "http"),
    (messages(image_part("file:///etc/passwd")), IMAGE_FIELD, "file:"),
    (messages({"type": "text", "text": "<|image_pad|>"}), "messages[0].content[1].text", "stands for media"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages", "maximum context length"),
    ({"messages": [{"role": "user", "content": "x" * 900_000}]}, "messages", "maximum context"),
    ({"messages": [{"role": "user", "content": ""}] * 20_000}, "messages", "maximum context"),
    ({"max_completion_tokens": 10_000}, "max_completion_tokens", "10000 > 512"),
    ({"max_tokens": 10_000}, "max_tokens", "10000 > 512"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -1}, "max_tokens", "at least 1"),
    ({"max_tokens": 1.5}, "max_tokens", "a whole number"),
    ({"min_tokens": 20, "max_tokens": 10}, "min_tokens", "more than max_tokens"),
    ({"temperature": -0.1}, "temperature", "at least 0 and at most 100"),
    ({"temperature": 101}, "temperature", "at least 0 and at most 100"),
    ({"temperature": "hot"}, "temperature", "a number"),
    ({"top_p": 0}, "top_p", "more than 0 and at most 1"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"min_p": 1.1}, "min_p", "at least 0 and at most 1"),
    ({"seed": -1}, "seed", "at least 0"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 1000}, "n", "at most 128"),
    ({"presence_penalty": 3}, "presence_penalty", "at least -2 and at most 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "at least 0.001 and at most 1000"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty", "at least 0.001"),
    ({"repetition_penalty": 1e300}, "repetition_penalty", "at most 1000"),
    ({"top_k": 1 << 31}, "top_k", "at most 2147483647"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"stop": ["a", ""]}, "stop[1]", "empty"),
    ({"stop": ["a"] * 129}, "stop", "at most 128"),
    ({"stop": ["a" * 10_000, "b" * 10_000]}, "stop", "16384 characters"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "0"),
    ({"stop_token_ids": [1, len(processor().tokenizer)]}, "stop_token_ids[1]", "expected 0 to"),
    ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "1024"),
    (messages(image_part("http://a..b/x")), IMAGE_FIELD, "host"),
    (messages(image_part(f"http://{'a' * 64}.com/x")), IMAGE_FIELD, "host"),
    (messages(image_part("http://a\0b/x")), IMAGE_FIELD, "host"),
    (messages(image_part("http://[foo/x")), IMAGE_FIELD, "URL"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
    ({"mm_processor_kwargs": {"max_pixels": 5}}, "mm_processor_kwargs", "not supported"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    ({"chat_template_kwargs": {"x": [[]] * 30_000}}, "chat_template_kwargs", "at most 65536 bytes"),
    *[
        ({"chat_template_kwargs": {name: "x"}}, f"chat_template_kwargs.{name}", name)
        for name in ("chat_template", "self", "messages", "conversation", "tokenize", "add_generation_prompt")
    ],
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "hint"), BAD_FIELDS, ids=[f"{param}-{hint}" for _, param, hint in BAD_FIELDS]
)
def test_a_bad_field_is_named(stack: Stack, fields: dict[str, Any], param: str, hint: str, stream: bool) -> None:
    response = stack.chat(**({"stream": stream} | fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert hint in error["message"]
    assert error["type"] == "invalid_request_error"
    stack.wait_until_idle()
    assert stack.chat().status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "frequency_penalty", "max_tokens", "seed"])
def test_numbers_that_are_none_are_refused_by_name(stack: Stack, field: str, number: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "Hi"}}], "{field}": {number}}}'
    error = refused(stack, body, 400)
    assert error["param"] == field
    assert "valid: " in error["message"]


@pytest.mark.parametrize(
    "body", ["", "{", "not json", '{"model": "fake",}', '"text"', "[]", "\xff", '{"a": "\\ud800"}']
)
def test_malformed_json_is_refused(stack: Stack, body: str) -> None:
    refused(stack, body.encode("latin-1"), 400)


def test_json_nested_without_end_is_refused(stack: Stack) -> None:
    refused(stack, '{"messages": ' + "[" * 100_000, 400)


@pytest.mark.parametrize("depth", [1100, 5000, 100_000])
def test_json_nested_too_deeply_is_refused(stack: Stack, depth: int) -> None:
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        nested = opened * depth + "1" + closed * depth
        refused(stack, f'{{"messages": [{{"role": "user", "content": "Hi"}}], "tools": {nested}}}', 400)
        refused(stack, f'{{"messages": [{{"role": "user", "content": "Hi"}}], "tools": [{nested}, NaN]}}', 400)


def test_media_too_long_for_the_model_are_named_once(stack: Stack) -> None:
    response = stack.chat(**messages(*[image_part(data_url(picture(100, 90)))] * 2, {"type": "text", "text": "x"}))
    assert response.status_code == 200
    with Stack(max_model_len=4) as small:
        message = small.chat(**messages(image_part(data_url(picture(100, 90))))).json()["error"]["message"]
        assert message.count("messages:") == 1, message


def test_prompts_without_end_are_refused(stack: Stack) -> None:
    for fields in ({"prompt": [[1]] * 3000}, {"prompt": [[1]] * 100, "n": 100}):
        response = stack.http.post("/v1/completions", json=fields)
        assert response.status_code == 400
        assert "2048" in response.json()["error"]["message"]


def test_an_unknown_model_is_404(stack: Stack) -> None:
    error = refused(stack, '{"model": "gpt-9", "messages": [{"role": "user", "content": "Hi"}]}', 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        stack.openai.models.retrieve("gpt-9")


def test_unknown_routes_and_methods_have_the_same_form(stack: Stack) -> None:
    for response, status in (
        (stack.http.get("/v1/nothing"), 404),
        (stack.http.get("/v1/chat/completions"), 405),
        (stack.http.post("/health"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]
        assert response.headers["x-request-id"]


def test_a_declared_length_over_the_limit_is_413(stack: Stack) -> None:
    error = refused(stack, b"x" * (MiB + 1), 413)
    assert str(MiB) in error["message"]


def test_a_chunked_body_over_the_limit_is_413(stack: Stack) -> None:
    pieces = (b"x" * 65536 for _ in range(40))
    response = stack.http.post("/v1/chat/completions", content=pieces)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "request_too_large"
    assert stack.chat().status_code == 200


def test_a_decompression_bomb_is_refused_from_its_header(stack: Stack) -> None:
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunks = [
        len(chunk[4:]).to_bytes(4, "big") + chunk + crc32(chunk).to_bytes(4, "big") for chunk in (header, b"IDATx")
    ]
    error = refused_picture(stack, b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert "60000 x 60000 pixels" in error["message"]


def test_an_item_over_the_byte_limit_is_refused() -> None:
    with Stack(max_media_bytes=1000) as stack:
        error = refused_picture(stack, bytes(2000))
        assert "1000 bytes" in error["message"]


def test_media_over_the_limit_of_a_request_are_413() -> None:
    with Stack(max_body_bytes=4000, allowed_local_media_path="/") as stack:
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            Path(file.name).write_bytes(picture() + b"x" * 1900)
            response = stack.chat(**messages(*[image_part(f"file://{file.name}")] * 3))
        assert response.status_code == 413, response.text
        error = response.json()["error"]
        assert error["param"].startswith("messages[0].content[")
        assert "4000 bytes" in error["message"]


def test_too_many_items_have_a_code(stack: Stack) -> None:
    response = stack.chat(**messages(*[image_part(data_url(picture()))] * 3))
    assert response.json()["error"]["code"] == "too_many_media"


def test_the_key_is_asked_for_except_by_monitoring() -> None:
    with Stack(api_key="secret") as stack:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            for path in ("/v1/models", "/cluster", "/nothing"):
                response = httpx.get(stack.url + path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["x-request-id"]
        assert httpx.get(stack.url + "/health").status_code == 200
        assert httpx.get(stack.url + "/metrics").status_code == 200
        assert stack.openai.models.list().data[0].id == "fake"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{stack.url}/v1", api_key="wrong").models.list()


def refused(stack: Stack, body: str | bytes, status: int) -> dict[str, Any]:
    response = stack.http.post("/v1/chat/completions", content=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert stack.chat().status_code == 200
    return dict(error)


def refused_picture(stack: Stack, data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    response = stack.chat(**messages(image_part(url)))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == IMAGE_FIELD
    return dict(response.json()["error"])
