"""Connections of clients that send slowly or without end are told so, and end; others are not touched."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from starlette.types import Receive, Scope, Send

from tests.server.fakes import Stack, ids
from tests.server.test_leaving import wait_until
from triptych.server import connections, http
from triptych.server.running import bind, make_http_server

PATIENCE_S = 0.3
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(http, "BODY_GRACE_S", PATIENCE_S)
    monkeypatch.setattr(connections, "LINGER_S", PATIENCE_S)
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


def test_the_rest_of_a_body_that_is_not_wanted_is_awaited_for_a_while_only(stack: Stack) -> None:
    head = HEAD + b"content-length: %d\r\n\r\n" % (1 << 40)
    answer = heard(stack, head, *[b"x" * 1000] * 3, pause_s=PATIENCE_S / 5)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert not connections_of(stack)


# ---- answers that nobody reads

LONG = ids("abc ") * 4000


@pytest.fixture
def talker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """Gives long answers, of which little lies in sockets unread."""
    monkeypatch.setattr(connections, "UNREAD_TIMEOUT_S", PATIENCE_S)
    stack = Stack(lambda order: LONG, max_model_len=20_000)
    stack._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with stack:
        yield stack
        stack.wait_until_idle()


def asking(stack: Stack, **fields: object) -> socket.socket:
    """A connection on which an answer was asked for, that takes little before it is read."""
    host, port = stack.url.removeprefix("http://").split(":")
    line = socket.socket()
    line.settimeout(10)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.connect((host, int(port)))
    content = json.dumps({"prompt": "Hi", "max_tokens": 4000, "logprobs": 5} | fields).encode()
    line.sendall(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content))
    return line


def connections_of(stack: Stack) -> set[object]:
    return set(stack._server.server_state.connections)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_its_answer_is_gone(talker: Stack, stream: bool) -> None:
    with asking(talker, stream=stream):
        wait_until(lambda: bool(connections_of(talker)))
        wait_until(lambda: not connections_of(talker))
        talker.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_one_that_reads_slowly_is_not(talker: Stack, stream: bool) -> None:
    began = time.monotonic()
    with asking(talker, stream=stream) as line:
        end = b""
        while piece := line.recv(16 << 10):
            end = (end + piece)[-10:]
            time.sleep(PATIENCE_S / 10)
        assert end.endswith(b"0\r\n\r\n" if stream else b"}"), "it was cut off"
        assert time.monotonic() - began > 2 * PATIENCE_S


# ---- as many as there is room for


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while True:
            await send({"type": (await receive())["type"] + ".complete"})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@contextmanager
def small_server(max_connections: int) -> Iterator[tuple[str, int]]:
    bound, server = bind("127.0.0.1", 0), make_http_server(hello, max_connections=max_connections)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield bound.getsockname()
    finally:
        server.should_exit = True
        thread.join()


def ask(line: socket.socket) -> bytes:
    """The whole answer, or what comes of one until the server hangs up."""
    answer = b""
    with suppress(ConnectionError):
        line.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        while not answer.endswith(b"hi") and (piece := line.recv(1 << 16)):
            answer += piece
    return answer


def test_whoever_comes_when_there_are_too_many_is_told_to_come_again() -> None:
    with small_server(max_connections=8) as address, ExitStack() as stack:
        lines = [stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(4)]
        assert all(ask(line).startswith(b"HTTP/1.1 200 ") for line in lines)
        for _ in range(20):
            with socket.create_connection(address, timeout=5) as line:
                answer = line.recv(1 << 16)
                assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in answer
        assert all(ask(line).startswith(b"HTTP/1.1 200 ") for line in lines), "the others go on"
        lines[0].close()
        wait_until(lambda: _is_answered(address))


def _is_answered(address: tuple[str, int]) -> bool:
    with socket.create_connection(address, timeout=5) as line:
        return ask(line).startswith(b"HTTP/1.1 200 ")
