"""The bytes of media items, from wherever a request says that they come. Knows nothing of what is in them."""

import asyncio
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from triptych.config import ServerConfig
from triptych.errors import RequestError
from triptych.router.ledger import Reservation
from triptych.server.fetch import Fetcher, is_public
from triptych.server.media_store import MediaName
from triptych.server.threads import in_thread

MAX_FETCHES = 32  # at the same time, of all requests together: bounds what is held of bodies that are half here
LARGE = 1 << 20  # characters or bytes; decoding and hashing more would hold up every stream for milliseconds
_PIECE = 1 << 18  # characters, a multiple of 4: decoding never lets other threads run, so it goes by pieces
_MAX_DATA_HEAD = 1000  # characters of a data: URL before its data


@dataclass(frozen=True, slots=True)
class MediaSource:
    """Where one media item comes from: a URL or text in base64; neither where its `uuid` is to be remembered.

    `field` is the path of the part of the request that brought it.
    """

    field: str
    modality: str
    url: str | None = None
    base64: str | None = None
    uuid: str | None = None

    @property
    def brings_bytes(self) -> bool:
        return self.url is not None or self.base64 is not None

    @property
    def name(self) -> MediaName | None:
        return None if self.uuid is None else (self.modality, self.uuid)


class MediaBudget:
    """Bytes that all media of one request may have together, wherever they come from, and room for them beside what
    other requests hold."""

    def __init__(self, limit: int, reservation: Reservation) -> None:
        self._limit = limit
        self._reservation = reservation
        self._num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Of an item that came in the body: the reservation of the body covers it. Raises RequestError(413)."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._limit:
            text = f"all media of a request together are larger than the limit of {self._limit} bytes"
            raise RequestError(text, status=413, code="media_too_large")

    def take(self, num_bytes: int) -> None:
        """Of an item that comes from elsewhere, before it is here. Raises RequestError(413, 503)."""
        self.count(num_bytes)
        self._reservation.take(num_bytes)


class SourceReader:
    """Fetches, reads and decodes. `close` when the server stops."""

    def __init__(self, config: ServerConfig) -> None:
        self._max_bytes = config.max_media_bytes
        folder = config.allowed_local_media_path
        self._folder = None if folder is None else Path(folder).resolve()
        self._fetcher = Fetcher(
            max_bytes=config.max_media_bytes,
            timeout_s=config.media_fetch_timeout_s,
            is_allowed=(lambda address: True) if config.allow_private_media_hosts else is_public,
        )
        self._fetches = asyncio.Semaphore(MAX_FETCHES)

    async def read(self, source: MediaSource, budget: MediaBudget) -> bytes:
        """Raises RequestError, also that of the budget."""
        if source.base64 is not None:
            return await self._embedded(source.base64, 0, budget)
        assert source.url is not None, f"{source.field} brings no bytes"
        scheme = source.url[:8].partition(":")[0].lower()
        if scheme in ("http", "https"):
            async with self._fetches:
                return await self._fetcher.get(source.url, budget.take, f"{source.modality}/*")
        if scheme == "data":
            return await self._embedded(source.url, _start_of_data(source.url), budget)
        if scheme == "file":
            path, size = await in_thread(self._allowed_file, source.url)
            budget.take(size)
            return await in_thread(_read_file, path, size)
        raise RequestError("expected a data:, http: or https: URL", code="media_forbidden")

    async def close(self) -> None:
        await self._fetcher.close()

    async def _embedded(self, text: str, start: int, budget: MediaBudget) -> bytes:
        """What the text behind `start` spells in base64."""
        if (len(text) - start) // 4 * 3 > self._max_bytes + 2:
            raise self._too_large()
        try:
            if not text.isascii():  # one other character makes a long text four times as large: it must not wait
                raise ValueError("characters outside of ASCII")
            is_long = len(text) > LARGE
            data = await in_thread(_decode_base64, text, start) if is_long else _decode_base64(text, start)
        except ValueError as error:
            raise RequestError(f"not valid base64: {error}", code="invalid_base64") from error
        budget.count(len(data))
        return data

    def _allowed_file(self, url: str) -> tuple[Path, int]:
        """Its place and size. Only inside the allowed folder, wherever symbolic links lead."""
        if self._folder is None:
            raise RequestError("file: URLs are not allowed on this server", code="media_forbidden")
        parts = urlsplit(url)
        try:
            path = Path(url2pathname(parts.path)).resolve(strict=True)
            inside = parts.netloc in ("", "localhost") and path.is_relative_to(self._folder) and path.is_file()
            size = path.stat().st_size if inside else 0
        except (OSError, ValueError) as error:
            raise _no_file() from error
        if not inside:
            raise _no_file()
        if size > self._max_bytes:
            raise self._too_large()
        return path, size

    def _too_large(self) -> RequestError:
        return RequestError(f"larger than the limit of {self._max_bytes} bytes", code="media_too_large")


def _start_of_data(url: str) -> int:
    """Of a data: URL."""
    comma = url.find(",", 0, _MAX_DATA_HEAD)
    if comma < 0 or not url[:comma].endswith(";base64"):
        raise RequestError("a data: URL must look like data:image/png;base64,...", code="invalid_base64")
    return comma + 1


def _decode_base64(text: str, start: int) -> bytes:
    """Of what is behind `start`. Raises ValueError (binascii.Error is one) for what is none."""
    data = io.BytesIO()  # hands out what it holds without a copy
    for first in range(start, len(text), _PIECE):
        if data.tell() < (first - start) // 4 * 3:
            raise ValueError("data after the padding")
        data.write(binascii.a2b_base64(text[first : first + _PIECE], strict_mode=True))
    return data.getvalue()


def _read_file(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise _no_file() from error


def _no_file() -> RequestError:
    return RequestError("no such file in the allowed folder", code="media_forbidden")
