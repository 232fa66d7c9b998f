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

    async def load(self, sources: list[tuple[str, str]]) -> list[MediaItem]:
        """The items of (field, url) pairs, in order; what has to be fetched is fetched together.

        Raises RequestError naming the field of one that cannot be used.
        """
        limit = self._config.limit_mm_per_prompt.get("image")
        if limit is not None and len(sources) > limit:
            raise RequestError(f"at most {limit} image(s) per prompt, got {len(sources)}", param=sources[limit][0])
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._load_one(field, url)) for field, url in sources]
        except* RequestError as errors:
            raise _first(errors) from None
        return [task.result() for task in tasks]

    async def close(self) -> None:
        await self._fetcher.close()

    async def _load_one(self, field: str, url: str) -> MediaItem:
        try:
            data = await self._bytes_of(url)
            _, width, height = read_header(data)
        except RequestError as error:
            raise RequestError(f"{field}: {error}", status=error.status, param=field, code=error.code) from error
        if width * height > self._config.max_image_pixels:
            raise RequestError(
                f"{field}: {width} x {height} pixels are more than the limit of {self._config.max_image_pixels}",
                param=field,
                code="image_too_large",
            )
        return MediaItem(data, width, height, hashlib.blake2b(data, digest_size=16).digest(), field)

    async def _bytes_of(self, url: str) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return self._from_data_url(url)
        if scheme in ("http", "https"):
            return await self._fetcher.get(url)
        if scheme == "file":
            return await asyncio.to_thread(self._from_file_url, url)
        raise RequestError("expected a data:, http: or https: URL", code="media_forbidden")

    def _from_data_url(self, url: str) -> bytes:
        head, comma, encoded = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError("a data: URL must look like data:image/png;base64,...", code="invalid_base64")
        if len(encoded) // 4 * 3 > self._config.max_media_bytes + 2:
            raise self._too_large()
        try:
            return binascii.a2b_base64(encoded, strict_mode=True)
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


def _first(errors: BaseExceptionGroup[RequestError]) -> RequestError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
