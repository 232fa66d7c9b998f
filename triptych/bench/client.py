"""An HTTP/1.1 client for streamed answers that costs little, because it shares the cores with what it measures.

It stamps the time when bytes arrive, before they are looked at.
"""

import asyncio
import os
import socket
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

_ERROR_CHARACTERS = 300


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Answer:
    """One answer as it came in. Times are seconds of `time.perf_counter`."""

    sent_at: float
    status: int = 0
    token_times: list[float] = field(default_factory=list)  # of events that carry text
    ended_at: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    body: bytearray = field(default_factory=bytearray)  # what is not an event stream, and the unfinished last line
    is_stream: bool = False
    done: bool = False

    def feed(self, data: bytes, now: float) -> None:
        self.body += data
        if not self.is_stream:
            return
        *lines, rest = bytes(self.body).split(b"\n")
        self.body = bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def end(self, now: float) -> None:
        self.ended_at = now
        if self.status != 200:
            text = self.body.decode(errors="replace")[:_ERROR_CHARACTERS]
            self.error = f"status {self.status}: {text}"
        elif not self.is_stream:
            self.error = "the answer is not an event stream"
        elif self.error is None and not self.token_times:
            self.error = "the stream had no token"
        elif self.error is None and not self.done:
            self.error = "the stream ended without [DONE]"

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = _decode_event(data)
        if event.error is not None:
            self.error = str(event.error)[:_ERROR_CHARACTERS]
        if event.usage is not None:
            self.prompt_tokens = event.usage.prompt_tokens
            self.completion_tokens = event.usage.completion_tokens
        for choice in event.choices:
            delta = choice.delta
            says = delta is not None and (delta.content or delta.reasoning or delta.reasoning_content)
            # An answer of special tokens only has no text: its end is then the only sign of a token.
            if says or (choice.finish_reason is not None and not self.token_times):
                self.token_times.append(now)


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None  # the same one, for an option that asyncio does not offer
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._finished: asyncio.Future[None] | None = None
        self._now = 0.0
        self._keep_alive = True
        self._ends_with_connection = False  # a body without a length and without chunks

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Raises ConnectionError if the connection breaks before the answer is complete."""
        assert self._transport is not None, "not connected"
        self._answer = answer
        self._finished = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._finished
        finally:
            self._answer = self._finished = None

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.close()

    # ---- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its bases
        self.open = True
        if hasattr(socket, "TCP_QUICKACK"):
            self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._acknowledge_at_once()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:  # also wraps what `on_body` raises
            self._fail(f"unreadable answer: {error.__context__ or error}")

    def _acknowledge_at_once(self) -> None:
        """A server that leaves Nagle's algorithm on holds a token until the one before is acknowledged, by default
        after 40 ms: without this, the client's kernel would be measured. The option lasts for one packet."""
        if self._socket is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def connection_lost(self, error: Exception | None) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if error is None and self._ends_with_connection:
            self._now = time.perf_counter()
            self.on_message_complete()
        self._fail(str(error) if error else "the server closed the connection")

    # ---- called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False
        elif self._answer is not None and name == b"content-type":
            self._answer.is_stream = value.lower().startswith(b"text/event-stream")

    def on_message_begin(self) -> None:
        self._ends_with_connection = True

    def on_headers_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(body, self._now)

    def on_message_complete(self) -> None:
        if not self._keep_alive:
            self.close()
        if self._answer is not None and self._finished is not None and not self._finished.done():
            self._answer.end(self._now)
            self._finished.set_result(None)

    def _fail(self, reason: str) -> None:
        self.close()
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(ConnectionError(reason))


class Client:
    """Sends requests to one server over as many connections as there are requests at a time."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []
        key = "" if api_key is None else f"authorization: Bearer {api_key}\r\n"
        self._headers = f"host: {parts.netloc.rpartition('@')[2]}\r\nuser-agent: triptych-bench\r\n{key}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a whole request."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}"
        if body:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body

    async def send(self, request: bytes) -> Answer:
        """Never raises for what the server or the network does: `Answer.error` says it."""
        answer = Answer(time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(request, answer)
        except TimeoutError:
            answer.error = f"no complete answer within {self._timeout_s:g} s"
        except OSError as error:
            answer.error = f"connection: {error}"
        if not answer.ended_at:
            answer.ended_at = time.perf_counter()
        return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _send(self, request: bytes, answer: Answer) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                try:
                    await self._use(connection, request, answer)
                except ConnectionError:
                    if answer.status:
                        raise
                    continue  # the server had closed the idle connection; it never saw the request
                return
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        await self._use(connection, request, answer)

    async def _use(self, connection: Connection, request: bytes, answer: Answer) -> None:
        try:
            await connection.exchange(request, answer)
        except BaseException:
            connection.close()
            raise
        if connection.open:
            self._idle.append(connection)
