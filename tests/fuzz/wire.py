"""Clients that speak HTTP badly, slowly, or not at all."""

import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.fuzz.bodies import MODEL

LONGEST_S = 20.0
_STATUS = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)
CHAT = "/v1/chat/completions"


@dataclass
class Heard:
    """What a client got to hear until the connection ended, or until it left."""

    data: bytes
    left: bool = False  # the client did, of its own accord

    @property
    def statuses(self) -> list[int]:
        """The last ones; 100 (go on) is none."""
        return [int(status) for status in _STATUS.findall(self.data) if status != b"100"]


class Line:
    """A connection to a server, and what a client does with it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self.host = parts.netloc
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=LONGEST_S)
        self._until = time.monotonic() + LONGEST_S

    def say(self, data: bytes) -> None:
        """A server that has heard enough may have hung up."""
        with suppress(ConnectionError):
            self.socket.sendall(data)

    def say_slowly(self, data: bytes, rng: random.Random) -> None:
        """Byte by byte, until all is said or the server hangs up."""
        for byte in data:
            if time.monotonic() > self._until - 5 or self._is_answered():
                return
            self.say(bytes([byte]))
            time.sleep(rng.choice([0.01, 0.1, 0.4]))

    def hear(self) -> Heard:
        """All that comes. Raises TimeoutError if the connection does not end in time."""
        pieces = []
        while True:
            self.socket.settimeout(max(0.01, self._until - time.monotonic()))
            try:
                piece = self.socket.recv(1 << 16)
            except ConnectionError:
                piece = b""
            if not piece:
                return Heard(b"".join(pieces))
            pieces.append(piece)

    def hear_some(self, num_bytes: int) -> Heard:
        with suppress(ConnectionError):
            return Heard(self.socket.recv(num_bytes), left=True)
        return Heard(b"", left=True)

    def reset(self) -> None:
        """Leaves in a way that the server is told of by an error."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _is_answered(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.socket.settimeout(LONGEST_S)
        return True


@contextmanager
def line(url: str) -> Iterator[Line]:
    one = Line(url)
    try:
        yield one
    finally:
        one.socket.close()


def request(line: Line, body: bytes = b"", *, method: bytes = b"POST", path: str = CHAT, version: bytes = b"1.1",
            length: bytes | None = None, more: bytes = b"", close: bool = True) -> bytes:  # fmt: skip
    """A whole one; `length` is what it says about its body, `more` are headers."""
    length = str(len(body)).encode() if length is None else length
    end = b"connection: close\r\n" if close else b""
    head = b"%b %b HTTP/%b\r\nhost: %b\r\ncontent-length: %b\r\n%b%b\r\n"
    return head % (method, path.encode(), version, line.host.encode(), length, more, end) + body


def chat(max_tokens: int = 2, **more: object) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens} | more
    return json.dumps(body).encode()


# ---- what they do


def good(line: Line, rng: random.Random) -> Heard:
    line.say(request(line, chat(), version=rng.choice([b"1.0", b"1.1"])))
    return line.hear()


def bad_chunks(line: Line, rng: random.Random) -> Heard:
    head = request(line, more=b"transfer-encoding: chunked\r\n").replace(b"content-length: 0\r\n", b"")
    size = rng.choice(
        [b"zz", b"-1", b"f" * 17, b"7fffffffffffffff", b"", b"0x10", b"5;" + b"a" * 70_000, b" 5", b"5\n"]
    )
    line.say(head + size + b"\r\nhello" + rng.choice([b"\r\n0\r\n\r\n", b"", b"hello\r\n0\r\n\r\n", b"\r\n0\r\nx: y"]))
    return line.hear()


def good_chunks(line: Line, rng: random.Random) -> Heard:
    """Of a byte each, and a trailer."""
    head = request(line, more=b"transfer-encoding: chunked\r\n").replace(b"content-length: 0\r\n", b"")
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in chat())
    line.say(head + pieces + rng.choice([b"0\r\n\r\n", b"0\r\nx-trailer: y\r\n\r\n", b"000\r\n\r\n"]))
    return line.hear()


def length_lies(line: Line, rng: random.Random) -> Heard:
    body = chat()
    length = rng.choice([b"0", b"5", b"%d" % (len(body) + 100), b"-1", b"abc", b"9" * 30, b"", b"1, 2", b"+5", b"0x20"])
    more = rng.choice(
        [b"", b"content-length: 7\r\n", b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip\r\n"]
    )
    line.say(request(line, body, length=length, more=more))
    return line.hear()


def too_much(line: Line, rng: random.Random) -> Heard:
    """A body over the limit, declared or not."""
    length = rng.choice([b"%d" % (9 << 20), b"%d" % (1 << 40)])
    line.say(request(line, length=length) + b"x" * (1 << 20))
    return line.hear()


def header_flood(line: Line, rng: random.Random) -> Heard:
    flood = rng.choice([
        b"".join(b"x-%d: %b\r\n" % (i, b"y" * 100) for i in range(20_000)),
        b"x: " + b"y" * (3 << 20) + b"\r\n",
        b"y" * (1 << 20) + b": x\r\n",
        b"x: y\r\n" * 300_000,
    ])  # fmt: skip
    line.say(request(line, chat(), more=flood))
    return line.hear()


def long_path(line: Line, rng: random.Random) -> Heard:
    path = rng.choice(["/v1/models/" + "a" * (1 << 20), "/" * 100_000, CHAT + "?" + "a=b&" * 100_000])
    line.say(request(line, chat(), path=path))
    return line.hear()


def odd_path(line: Line, rng: random.Random) -> Heard:
    path = rng.choice([
        "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/..%2f..%2fetc", "/../../etc/passwd", "//v1//models", "*",
        "/%", "/%zz", "http://other.invalid/v1/models", "/v1/models/{model}", "/v1/models/\u00fc", "/v1/models?x=%", "",
        "x", "/v1/models/ ",
        "/metrics/../cluster", "/v1/models/%0d%0ax: y", "/v1/models/" + "%41" * 1000, "/v1/models#x",
    ])  # fmt: skip
    line.say(request(line, method=b"GET", path=path))
    return line.hear()


def odd_method(line: Line, rng: random.Random) -> Heard:
    methods = [
        b"GET",
        b"PUT",
        b"DELETE",
        b"HEAD",
        b"OPTIONS",
        b"TRACE",
        b"CONNECT",
        b"PATCH",
        b"PRI",
        b"post",
        b"BREW",
        b"\0",
        b"",
    ]
    line.say(
        request(line, chat(), method=rng.choice(methods), version=rng.choice([b"1.1", b"1.0", b"2.0", b"9.9", b"x"]))
    )
    return line.hear()


def odd_headers(line: Line, rng: random.Random) -> Heard:
    more = rng.choice([
        b"expect: 100-continue\r\n", b"expect: the unexpected\r\n", b"upgrade: websocket\r\nconnection: upgrade\r\n",
        b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\n", b"content-encoding: gzip\r\n", b"host: other\r\n",
        b"x-request-id: " + b"a" * 5000 + b"\r\n", b"x-request-id: \xff\xfe\r\n", b"x\0y: z\r\n", b": empty\r\n",
        b"x: \0\r\n",
        b"no colon\r\n", b" folded: x\r\n", b"x: y\r\n folded\r\n", b"content-type: text/html; charset=\xff\r\n",
        b"authorization: Bearer \xff\r\n", b"x-request-timeout: -1\r\n", b"x-request-timeout: nan\r\n", b"x: y\n",
        b"x: y\r",
        b"x-request-timeout: 1e999\r\n", b"x-request-timeout: \xff\r\n", b"x-request-timeout: 0.001\r\n",
    ])  # fmt: skip
    line.say(request(line, chat(), more=more))
    return line.hear()


def garbage(line: Line, rng: random.Random) -> Heard:
    line.say(rng.choice([
        rng.randbytes(rng.randrange(1, 2000)), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 1000, b"\0" * 1000, b"GET /\r\n\r\n", b"SSH-2.0-x\r\n", b"{}",
        b"\n" * 70_000,
        b"HTTP/1.1 200 OK\r\n\r\n", b"GET / HTTP/1.1", b"EHLO x\r\nQUIT\r\n",
    ]))  # fmt: skip
    return line.hear()


def pipelined(line: Line, rng: random.Random) -> Heard:
    """Several at once, the last of them the last."""
    bodies = [rng.choice([chat(), b"{", chat(stream=True), chat(max_tokens=0)]) for _ in range(rng.randrange(1, 5))]
    line.say(b"".join(request(line, body, close=False) for body in bodies) + request(line, chat()))
    return line.hear()


def pipelined_garbage(line: Line, rng: random.Random) -> Heard:
    """Behind a request that is still answered."""
    line.say(request(line, chat(max_tokens=20, stream=True), close=False) + rng.randbytes(100) + b"\r\n\r\n")
    return line.hear()


def half_closed(line: Line, rng: random.Random) -> Heard:
    """After a whole request, or in the middle of one."""
    whole = request(line, chat(max_tokens=rng.choice([1, 20]), stream=rng.random() < 0.5))
    line.say(whole if rng.random() < 0.5 else whole[: rng.randrange(len(whole))])
    with suppress(OSError):
        line.socket.shutdown(socket.SHUT_WR)
    return Heard(line.hear().data, left=True)


def reset(line: Line, rng: random.Random) -> Heard:
    """At any moment of a stream."""
    line.say(request(line, chat(max_tokens=64, stream=True, n=2)))
    heard = line.hear_some(rng.choice([1, 100, 5000])) if rng.random() < 0.7 else Heard(b"", left=True)
    line.reset()
    return heard


def vanish(line: Line, rng: random.Random) -> Heard:
    """In the middle of a body, or of a head."""
    whole = request(line, chat())
    line.say(whole[: rng.randrange(len(whole))])
    line.reset() if rng.random() < 0.5 else line.socket.close()
    return Heard(b"", left=True)


def deaf(line: Line, rng: random.Random) -> Heard:
    """Asks for much and does not listen."""
    line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    line.say(request(line, chat(max_tokens=200, stream=True, n=4, logprobs=True, top_logprobs=20, ignore_eos=True)))
    time.sleep(rng.choice([0.0, 0.05, 0.5]))
    return Heard(b"", left=True)


def slow_head(line: Line, rng: random.Random) -> Heard:
    line.say_slowly(request(line, chat()), rng)
    return line.hear()


def slow_body(line: Line, rng: random.Random) -> Heard:
    whole = request(line, chat(user="x" * 1000))
    place = whole.index(b"\r\n\r\n") + 4
    line.say(whole[:place])
    line.say_slowly(whole[place:], rng)
    return line.hear()


def silent(line: Line, rng: random.Random) -> Heard:
    """Says nothing, or stops in the middle."""
    whole = request(line, chat())
    line.say(whole[: rng.choice([0, 1, 20, len(whole) - 1])])
    return line.hear()


QUICK: tuple[Callable[[Line, random.Random], Heard], ...] = (
    good, bad_chunks, good_chunks, length_lies, too_much, header_flood, long_path, odd_path, odd_method, odd_headers,
    garbage, pipelined, pipelined_garbage, half_closed, reset, vanish, deaf,
)  # fmt: skip
SLOW = (slow_head, slow_body, silent)
