"""Fetches media over HTTP without letting a client reach what only this host can reach.

A name is resolved once, every address it has is checked, and the connection goes to a checked address: what a name
server answers later cannot matter. TLS still verifies the name. Knows no requests and no images.
"""

import asyncio
import io
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urljoin, urlsplit

import httpcore

from triptych.errors import RequestError

MAX_REDIRECTS = 5
_MAX_LOOKUPS = 32  # at the same time, and as many threads
_REDIRECTS = {301, 302, 303, 307, 308}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet, also when it wraps another address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour
        if wrapped is None and ip in _NAT64:
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Opens connections to allowed addresses only."""

    def __init__(self, is_allowed: Callable[[str], bool]) -> None:
        self._is_allowed = is_allowed
        self._network = httpcore.AnyIOBackend()
        # Not the loop's own threads: names whose servers do not answer would keep all of them from reading headers.
        self._resolver = ThreadPoolExecutor(_MAX_LOOKUPS, thread_name_prefix="resolver")

    def close(self) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        for address in addresses[:-1]:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._network.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("unix sockets are not fetched from")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _resolve(self, host: str, port: int) -> list[str]:
        """All addresses of the host. Raises RequestError if a single one of them must not be reached."""
        try:
            look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
            found = await asyncio.get_running_loop().run_in_executor(self._resolver, look_up)
        except (OSError, ValueError) as error:
            raise RequestError(f"cannot resolve host {host!r}", code="media_unreachable") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise RequestError(
                f"host {host!r} is not on the public internet; private, loopback and link-local addresses are refused",
                code="media_forbidden",
            )
        return addresses


class Fetcher:
    """GET with a bound on redirects, size and total time. `close` when the server stops."""

    def __init__(self, *, max_bytes: int, timeout_s: float, is_allowed: Callable[[str], bool] = is_public) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._network = CheckedNetwork(is_allowed)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=64,
            max_keepalive_connections=0,  # a kept connection would skip the check of a later name
            network_backend=self._network,
        )

    async def get(self, url: str, count: Callable[[int], None], accept: str = "image/*") -> bytes:
        """The body. Raises RequestError for anything that goes wrong, in words for the client.

        `accept` is the kind of media that is looked for; if the host has another it is taken too. `count` is told of
        every piece of the body, in bytes, before it is kept: what it raises ends the fetch.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    body, location = await self._get_once(url, count, accept)
                    if location is None:
                        return body
                    url = _joined(url, location)
        except TimeoutError as error:
            raise RequestError(f"fetching took longer than {self._timeout_s:g} s", code="media_timeout") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise RequestError(f"fetching failed: {error or type(error).__name__}", code="media_unreachable") from error
        raise RequestError(f"more than {MAX_REDIRECTS} redirects", code="media_unreachable")

    async def close(self) -> None:
        await self._pool.aclose()
        self._network.close()

    async def _get_once(self, url: str, count: Callable[[int], None], accept: str) -> tuple[bytes, str | None]:
        """The body, or where a redirect points."""
        target = _checked_target(url)
        headers = [
            (b"host", _host_header(target)),
            (b"accept", f"{accept}, */*;q=0.1".encode()),
            (b"accept-encoding", b"identity"),
            (b"user-agent", b"triptych"),
        ]
        async with self._pool.stream("GET", target, headers=headers) as response:
            fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in fields:
                return b"", fields[b"location"]
            if response.status != 200:
                raise RequestError(f"the host answered with status {response.status}", code="media_unreachable")
            declared = fields.get(b"content-length", "")
            if declared.isdigit() and int(declared) > self._max_bytes:
                raise self._too_large()
            body = io.BytesIO()  # hands out what it holds without a copy
            async for piece in response.aiter_stream():
                if body.tell() + len(piece) > self._max_bytes:
                    raise self._too_large()
                count(len(piece))
                body.write(piece)
            return body.getvalue(), None

    def _too_large(self) -> RequestError:
        return RequestError(f"larger than the limit of {self._max_bytes} bytes", code="media_too_large")


def _checked_target(url: str) -> httpcore.URL:
    """Spelt in ASCII for the wire. Raises RequestError for what is no URL, or of another scheme than http and https."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        # A literal IPv6 address is ASCII already, and its labels are not those of a name.
        wire_host = host.encode("ascii" if ":" in host else "idna")
    except ValueError as error:  # also UnicodeError: a label that is empty, too long or not allowed
        raise RequestError(f"not a valid URL, or not a valid host in it: {error}", code="media_forbidden") from error
    if parts.scheme not in ("http", "https") or not wire_host:
        raise RequestError("only http and https URLs with a host are fetched", code="media_forbidden")
    path = parts.path or "/"
    target = f"{path}?{parts.query}" if parts.query else path
    return httpcore.URL(
        scheme=parts.scheme.encode(),
        host=wire_host,
        port=port,
        target="".join(c if 32 < ord(c) < 127 else _percent(c) for c in target).encode(),
    )


def _host_header(target: httpcore.URL) -> bytes:
    host = b"[%b]" % target.host if b":" in target.host else target.host
    return host if target.port is None else b"%b:%d" % (host, target.port)


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise RequestError(f"redirected to what is not a valid URL: {error}", code="media_unreachable") from error


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())
