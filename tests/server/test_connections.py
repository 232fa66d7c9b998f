"""Connections of clients that send slowly or without end are told so, and end; others are not touched."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.server.fakes import Stack
from triptych.server import connections, http

PATIENCE_S = 0.3
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(http, "BODY_GRACE_S", PATIENCE_S)
    with Stack() as stack:
        yield stack


def heard(stack: Stack, *said: bytes, pause_s: float = 0.0) -> bytes:
    """All that comes until the server hangs up."""
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        pieces = []
        with suppress(ConnectionError):  # it hung up before all was said
            for piece in said:
                line.sendall(piece)
                time.sleep(pause_s)
        with suppress(ConnectionError):
            while piece := line.recv(1 << 16):
                pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("said", [b"", b"POST ", HEAD, HEAD + b"content-length: 5\r\n"])
def test_a_head_that_does_not_end_is_408(stack: Stack, said: bytes) -> None:
    assert heard(stack, said).startswith(b"HTTP/1.1 408 ")
    assert stack.chat().status_code == 200


def test_the_head_of_a_second_request_has_its_own_time(stack: Stack) -> None:
    whole = b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n"
    answers = heard(stack, *[whole] * 4, whole[:-2], pause_s=PATIENCE_S / 2)
    assert answers.count(b"HTTP/1.1 200 ") == 4
    assert answers.count(b"HTTP/1.1 408 ") == 1


def test_a_head_without_bound_is_431(stack: Stack) -> None:
    flood = [
        b"x: " + b"y" * 1000 + b"\r\n"
    ] * 80  # little more than is read: what is unread when it hangs up costs the answer
    answer = heard(stack, HEAD, *flood, pause_s=0.001)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert stack.chat().status_code == 200


@pytest.mark.parametrize("length", [b"content-length: 100", b"transfer-encoding: chunked"])
def test_a_body_that_does_not_come_is_408(stack: Stack, length: bytes) -> None:
    answer = heard(stack, HEAD + length + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_a_long_answer_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", PATIENCE_S)
    with Stack(step_s=0.1) as stack:
        assert stack.chat(stream=True).text.endswith("[DONE]\n\n")
