"""The bytes of media items, from wherever a request says that they come. Knows nothing of what is in them."""

import asyncio
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from triptych.config import ServerConfig
from triptych.errors import RequestError
from triptych.server.fetch import Fetcher, is_public
from triptych.server.media_store import MediaName

MAX_FETCHES = 32  # at the same time, of all requests together: bounds what is held of bodies that are half here
LARGE = 1 << 20  # characters or bytes; decoding and hashing more would hold up every stream for milliseconds
_PIECE = 1 << 18  # characters, a multiple of 4: decoding never lets other threads run, so it goes by pieces


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

    async def read(self, source: MediaSource, count: Callable[[int], None]) -> bytes:
        """Raises RequestError. `count` is told of all bytes, and may raise one too."""
        if source.base64 is not None:
            data = await _in_thread_if_long(self._from_base64, source.base64)
            count(len(data))
            return data
        assert source.url is not None, f"{source.field} brings no bytes"
        scheme = source.url[:8].partition(":")[0].lower()
        if scheme in ("http", "https"):
            async with self._fetches:
                return await self._fetcher.get(source.url, count, f"{source.modality}/*")
        if scheme == "data":
            data = await _in_thread_if_long(self._from_data_url, source.url)
        elif scheme == "file":
            data = await asyncio.to_thread(self._from_file_url, source.url)
        else:
            raise RequestError("expected a data:, http: or https: URL", code="media_forbidden")
        count(len(data))
        return data

    async def close(self) -> None:
        await self._fetcher.close()

    def _from_data_url(self, url: str) -> bytes:
        head, comma, encoded = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError("a data: URL must look like data:image/png;base64,...", code="invalid_base64")
        return self._from_base64(encoded)

    def _from_base64(self, encoded: str) -> bytes:
        if len(encoded) // 4 * 3 > self._max_bytes + 2:
            raise self._too_large()
        try:
            return _decode_base64(encoded)
        except ValueError as error:  # binascii.Error, or text that is not ASCII
            raise RequestError(f"not valid base64: {error}", code="invalid_base64") from error

    def _from_file_url(self, url: str) -> bytes:
        """Only inside the allowed folder, wherever symbolic links lead."""
        if self._folder is None:
            raise RequestError("file: URLs are not allowed on this server", code="media_forbidden")
        parts = urlsplit(url)
        try:
            path = Path(url2pathname(parts.path)).resolve(strict=True)
            inside = parts.netloc in ("", "localhost") and path.is_relative_to(self._folder) and path.is_file()
            if inside and path.stat().st_size > self._max_bytes:
                raise self._too_large()
            if inside:
                return path.read_bytes()
        except (OSError, ValueError) as error:
            raise RequestError("no such file in the allowed folder", code="media_forbidden") from error
        raise RequestError("no such file in the allowed folder", code="media_forbidden")

    def _too_large(self) -> RequestError:
        return RequestError(f"larger than the limit of {self._max_bytes} bytes", code="media_too_large")


async def _in_thread_if_long(decode: Callable[[str], bytes], text: str) -> bytes:
    return await asyncio.to_thread(decode, text) if len(text) > LARGE else decode(text)


def _decode_base64(encoded: str) -> bytes:
    """Raises ValueError for what is none."""
    pieces: list[bytes] = []
    for start in range(0, len(encoded), _PIECE):
        if pieces and len(pieces[-1]) < _PIECE // 4 * 3:
            raise ValueError("data after the padding")
        pieces.append(binascii.a2b_base64(encoded[start : start + _PIECE], strict_mode=True))
    return b"".join(pieces)
