"""What every route needs of HTTP: bodies with bounds, JSON out, errors in OpenAI's form, a watch on the client."""

import asyncio
import hmac
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.errors import RequestError
from triptych.router.ledger import Ledger, Reservation
from triptych.server.schema import MAX_TIMEOUT_S, ErrorBody, ErrorResponse

logger = logging.getLogger(__name__)

encode_json = msgspec.json.Encoder().encode

_JSON = [(b"content-type", b"application/json")]
_TIMEOUT_HEADER = "x-request-timeout"
_USUAL_RETRY_S = 1.0  # after a 503 that does not say when to ask again
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}


# A body has to come at this pace on the whole, after some seconds in which it need not: else 408.
BODY_GRACE_S = 60.0
BODY_BYTES_PER_S = 1000


class ClientGoneError(Exception):
    """Nobody is there to answer."""


class Exchange:
    """One request and the way to answer it. `reservation` is all that it holds of its body and media; without one it
    can be answered and nothing else."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, reservation: Reservation | None = None) -> None:
        self.scope = scope
        self._reservation = reservation
        self.request_id: str = scope["state"]["request_id"]
        self.arrived_at = time.monotonic()
        self._receive = receive
        self._send = send
        self._started = False
        self._complete = False

    @property
    def reservation(self) -> Reservation:
        assert self._reservation is not None, f"{self.request_id} was to be answered unread"
        return self._reservation

    def deadline(self, timeout_s: float | None = None) -> float | None:
        """When the request has to be answered, in `time.monotonic`: the sooner of what its body and its header say.
        Raises RequestError(400) for a header that is no time."""
        given = next((value for name, value in self.scope["headers"] if name == _TIMEOUT_HEADER.encode()), None)
        limits_s = [timeout_s, None if given is None else _seconds(given)]
        return min((self.arrived_at + limit_s for limit_s in limits_s if limit_s is not None), default=None)

    async def body(self, max_bytes: int) -> bytes:
        """The whole body. Raises RequestError: 413 as soon as it is known to be larger than `max_bytes`, 503 as soon as
        it does not fit beside what other requests hold, 408 when it comes too slowly."""
        declared = dict(self.scope["headers"]).get(b"content-length", b"")
        if declared.isdigit():
            if int(declared) > max_bytes:
                raise _too_large(max_bytes)
            self.reservation.expect(int(declared))
        latest = asyncio.get_running_loop().time() + BODY_GRACE_S
        pieces: list[bytes] = []  # hundreds of buffers that grow side by side would leave holes of their old sizes
        size, more = 0, True
        try:
            async with asyncio.timeout_at(latest) as limit:
                with self.reservation.arriving(lambda: _end_now(limit)):
                    while more:
                        piece, more = await self._piece()
                        size += len(piece)
                        if size > max_bytes:
                            raise _too_large(max_bytes)
                        self.reservation.arrive(len(piece))
                        pieces.append(piece)
                        limit.reschedule(latest + size / BODY_BYTES_PER_S)
        except TimeoutError:
            self.reservation.arrive(0)  # raises where others needed its place
            raise _too_slow() from None
        return b"".join(pieces)

    async def _piece(self) -> tuple[bytes, bool]:
        """Of the body, and whether more of it comes. Raises ClientGoneError."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message.get("body", b""), message.get("more_body", False)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Inside, the client leaving cancels what runs and raises ClientGoneError. Only after the body was read."""
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            if not self._complete:
                gone = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if gone and task.uncancel() == 0:
                raise ClientGoneError from None
            raise
        finally:
            watcher.cancel()

    async def json(self, body: msgspec.Struct, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        await self.payload(encode_json(body), [*_JSON, *headers], status)

    async def payload(self, body: bytes, headers: list[tuple[bytes, bytes]], status: int = 200) -> None:
        self._started = self._complete = True
        length = (b"content-length", str(len(body)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": body})

    async def begin_stream(self) -> None:
        self._started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        self._complete = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def error(self, error: RequestError) -> None:
        """As a response, or as the last event of a stream that has begun."""
        body = error_body(error)
        if self._started:
            await self.write(b"data: " + encode_json(body) + b"\n\n", more=False)
        else:
            unread = (
                [(b"connection", b"close")] if error.status == 408 else []
            )  # the rest of the body is not waited for
            await self.json(body, error.status, [*_retry_after(error), *unread])


Handler = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """An ASGI application out of a handler: the boundary at which every failure of a request ends."""

    def __init__(self, handler: Handler, ledger: Ledger) -> None:
        """What a request holds is counted in `ledger`, until its handler returns."""
        self._handler = handler
        self._ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reservation = self._ledger.reserve()
        exchange = Exchange(scope, receive, send, reservation)
        try:
            with reservation:
                await self._handler(exchange)
        except ClientGoneError:
            logger.info("%s: the client left", exchange.request_id)
        except RequestError as error:
            await exchange.error(error)
        except Exception:
            logger.exception("%s: failed", exchange.request_id)
            await exchange.error(RequestError("internal server error", status=500, code="internal_error"))


class RequestIds:
    """Gives every request its `x-request-id`, the client's own where it is a decent one, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        decent = 0 < len(given) <= 128 and all(32 < byte < 127 for byte in given)
        request_id = given if decent else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKey:
    """401 for requests without the key, but for what monitoring reads."""

    OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version"})

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                error = RequestError("missing or wrong API key", status=401, code="invalid_api_key")
                await Exchange(scope, receive, send).error(error)
                return
        await self._app(scope, receive, send)


def error_body(error: RequestError) -> ErrorResponse:
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return ErrorResponse(ErrorBody(str(error), kind, error.param, error.code))


def _seconds(given: bytes) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        text = f"{_TIMEOUT_HEADER}: expected seconds (valid: more than 0 and at most {MAX_TIMEOUT_S})"
        raise RequestError(text, param=_TIMEOUT_HEADER, code="invalid_value")
    return seconds


def _end_now(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(0.0)


def _retry_after(error: RequestError) -> list[tuple[bytes, bytes]]:
    """Whole seconds, rounded up."""
    seconds = _USUAL_RETRY_S if error.retry_after_s is None and error.status == 503 else error.retry_after_s
    return [] if seconds is None else [(b"retry-after", str(max(math.ceil(seconds), 1)).encode())]


def _too_slow() -> RequestError:
    text = f"the body comes too slowly: less than {BODY_BYTES_PER_S} bytes a second"
    return RequestError(text, status=408, code="request_timeout")


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the body is larger than the limit of {max_bytes} bytes", status=413, code="request_too_large")
