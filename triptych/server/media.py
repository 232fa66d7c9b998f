"""Media items of a request: fetched or decoded to bytes, bounded, their size read from the header, hashed.

No pixel is made here: a picture that turns out to be broken behind its header is the encoder's finding.
"""

import asyncio
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from triptych.config import ServerConfig
from triptych.errors import RequestError
from triptych.model.images import read_header
from triptych.server.fetch import Fetcher, is_public

MAX_FETCHES = 32  # at the same time, of all requests together: bounds what is held of bodies that are half here
_LARGE = 1 << 20  # characters of base64; decoding and hashing more would hold up every stream for milliseconds
_PIECE = 1 << 18  # characters, a multiple of 4: decoding never lets other threads run, so it goes by pieces


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One picture as it came. `field` is the path of the part of the request that brought it."""

    data: bytes
    width: int
    height: int
    hash: bytes  # 128 bits over the bytes
    field: str


class MediaLoader:
    """Turns URLs into media items. `close` when the server stops."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        folder = config.allowed_local_media_path
        self._folder = None if folder is None else Path(folder).resolve()
        self._fetcher = Fetcher(
            max_bytes=config.max_media_bytes,
            timeout_s=config.media_fetch_timeout_s,
            is_allowed=(lambda address: True) if config.allow_private_media_hosts else is_public,
        )
        self._fetches = asyncio.Semaphore(MAX_FETCHES)

    async def load(self, sources: list[tuple[str, str]]) -> list[MediaItem]:
        """The items of (field, url) pairs, in order; what has to be fetched is fetched together.

        Raises RequestError naming the field of one that cannot be used.
        """
        limit = self._config.limit_mm_per_prompt.get("image")
        if limit is not None and len(sources) > limit:
            raise RequestError(
                f"at most {limit} image(s) per prompt, got {len(sources)}",
                param=sources[limit][0],
                code="too_many_media",
            )
        budget = _Budget(self._config.max_body_bytes)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._load_one(field, url, budget)) for field, url in sources]
        except BaseExceptionGroup as group:  # not `except*`: before Python 3.11.4 that wraps what is raised here
            raise _first(group) from None
        return [task.result() for task in tasks]

    async def close(self) -> None:
        await self._fetcher.close()

    async def _load_one(self, field: str, url: str, budget: "_Budget") -> MediaItem:
        try:
            data = await self._bytes_of(url, budget)
            large = len(data) > _LARGE
            width, height, digest = await asyncio.to_thread(_inspect, data) if large else _inspect(data)
        except RequestError as error:
            raise RequestError(f"{field}: {error}", status=error.status, param=field, code=error.code) from error
        if width * height > self._config.max_image_pixels:
            raise RequestError(
                f"{field}: {width} x {height} pixels are more than the limit of {self._config.max_image_pixels}",
                param=field,
                code="image_too_large",
            )
        return MediaItem(data, width, height, digest, field)

    async def _bytes_of(self, url: str, budget: "_Budget") -> bytes:
        scheme = url[:8].partition(":")[0].lower()
        if scheme in ("http", "https"):
            async with self._fetches:
                return await self._fetcher.get(url, budget.count)
        if scheme == "data":
            data = await asyncio.to_thread(self._from_data_url, url) if len(url) > _LARGE else self._from_data_url(url)
        elif scheme == "file":
            data = await asyncio.to_thread(self._from_file_url, url)
        else:
            raise RequestError("expected a data:, http: or https: URL", code="media_forbidden")
        budget.count(len(data))
        return data

    def _from_data_url(self, url: str) -> bytes:
        head, comma, encoded = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError("a data: URL must look like data:image/png;base64,...", code="invalid_base64")
        if len(encoded) // 4 * 3 > self._config.max_media_bytes + 2:
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
            if inside and path.stat().st_size > self._config.max_media_bytes:
                raise self._too_large()
            if inside:
                return path.read_bytes()
        except (OSError, ValueError) as error:
            raise RequestError("no such file in the allowed folder", code="media_forbidden") from error
        raise RequestError("no such file in the allowed folder", code="media_forbidden")

    def _too_large(self) -> RequestError:
        return RequestError(f"larger than the limit of {self._config.max_media_bytes} bytes", code="media_too_large")


class _Budget:
    """Bytes that all media of one request may have together, wherever they come from."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Raises RequestError(413) once there are too many."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._limit:
            text = f"all media of a request together are larger than the limit of {self._limit} bytes"
            raise RequestError(text, status=413, code="media_too_large")


def _decode_base64(encoded: str) -> bytes:
    """Raises ValueError for what is none."""
    pieces: list[bytes] = []
    for start in range(0, len(encoded), _PIECE):
        if pieces and len(pieces[-1]) < _PIECE // 4 * 3:
            raise ValueError("data after the padding")
        pieces.append(binascii.a2b_base64(encoded[start : start + _PIECE], strict_mode=True))
    return b"".join(pieces)


def _inspect(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and a hash of 128 bits over the bytes. Raises RequestError for what is no picture."""
    _, width, height = read_header(data)
    return width, height, hashlib.blake2b(data, digest_size=16).digest()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
