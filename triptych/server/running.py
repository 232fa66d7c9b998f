"""Runs the application under uvicorn on a socket that was bound before, so that the port is known before it serves."""

import contextlib
import socket
from collections.abc import Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from triptych.server.connections import Connection

MAX_BACKLOG = 2048  # clients that wait to be accepted


class HttpServer(uvicorn.Server):
    """Leaves signals to whoever started it: set `should_exit` to end `serve(sockets=[...])`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http_server(app: ASGIApp, *, shutdown_s: int = 2, max_connections: int = 32_768) -> HttpServer:
    """Requests that are still running `shutdown_s` after the server was told to exit are cancelled.

    There are never more than `max_connections`, those included that were accepted only to be told that there are too
    many: as many of these as the backlog lets come at once.
    """
    backlog = min(MAX_BACKLOG, max_connections // 2)
    config = uvicorn.Config(
        app,
        http=partial(Connection, max_open=max_connections - backlog),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=backlog,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=shutdown_s,
    )
    return HttpServer(config)


def bind(host: str, port: int) -> socket.socket:
    """Port 0: one that is free. Raises OSError if the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it a token waits for the client's delayed ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound
