"""One client connection: what uvicorn makes of its bytes, with bounds on how long and how large the head of a request
may be, on how long an answer may lie unread, and on how many there are, so that a client that sends slowly or without
end, or does not read, holds neither a socket nor memory for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10  # request line and headers; what comes with the first read is not counted
HEAD_TIMEOUT_S = 60.0  # from the connection, or the first byte of a further request, to the end of the head
UNREAD_TIMEOUT_S = 60.0  # in which a client reads nothing of its answer, while more waits than sockets take
LINGER_S = 60.0  # after an answer to a body that was not read: many clients send all of it before they listen


class Connection(HttpToolsProtocol):
    """Bodies are bounded where they are read (`Exchange.body`), idle connections between requests by uvicorn."""

    def __init__(self, *args: Any, max_open: int, **kwargs: Any) -> None:
        """`max_open`: connections of the server; whoever comes then is told to come again."""
        super().__init__(*args, **kwargs)
        self._max_open = max_open
        self._in_head = True
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_open:
            self._refuse(b"503 Service Unavailable\r\nretry-after: 1")
        else:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, b"408 Request Timeout")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        for timer in (self._unread_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._num_head_bytes += len(data)
        if self.transport.is_closing():  # it was refused; what had arrived by then is of no use
            return
        super().data_received(data)
        if self._in_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:  # a further request on the same connection
            self._in_head = True
            self._num_head_bytes = 0
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, b"408 Request Timeout")

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:  # the rest of its body is thrown away as it comes
            self.cycle.body.clear()
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait for a client that does not read
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _watch_reader(self) -> None:
        """The client has to read something of what waits for it from time to time; else it is gone."""
        waiting = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() < waiting:
                self._watch_reader()
            else:
                self.transport.abort()

        self._unread_timer = self.loop.call_later(UNREAD_TIMEOUT_S, check)

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: bytes) -> None:
        """Behind an answer that is still on its way nothing can be said: then the connection just ends with it."""
        self._end_head()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
            self.transport.close()
        else:
            self.cycle.keep_alive = False
