"""Media items of a request: fetched, decoded to bytes or remembered, bounded, their headers read, hashed.

Nothing is decoded further here: a picture that turns out to be broken behind its header is the encoder's finding.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from triptych.config import ServerConfig
from triptych.errors import RequestError
from triptych.model.families import Modality
from triptych.model.headers import Header
from triptych.router.ledger import Reservation
from triptych.server.media_headers import HeaderReader
from triptych.server.media_source import LARGE, MediaBudget, MediaSource, SourceReader
from triptych.server.media_store import Content, MediaName, MediaStore
from triptych.server.parsing import blamed
from triptych.server.schema import MediaIoKwargs, VideoIo
from triptych.server.threads import in_thread

T = TypeVar("T")

# Bytes of a picture whose header is read without a thread: of a larger one a hostile header can take half a second.
_SMALL = 32 << 10

DEFAULT_LIMIT = 999  # items of a modality that the configuration does not name, as with vLLM


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One picture, video or sound as it came. `hash`: 128 bits over its bytes and nothing else."""

    modality: str
    header: Header
    data: bytes
    hash: bytes
    field: str


class MediaLoader:
    """Turns the sources of a request into media items. `close` when the server stops."""

    def __init__(self, config: ServerConfig, modalities: Mapping[str, Modality]) -> None:
        """`modalities` are those that the model takes. Raises ConfigError for options that mean nothing."""
        self._config = config
        self._modalities = tuple(modalities)
        self._headers = HeaderReader(config, modalities)
        self._store = MediaStore(config.media_store_bytes)
        self._reader = SourceReader(config)

    async def load(
        self, sources: Sequence[MediaSource], reservation: Reservation, options: MediaIoKwargs | None = None
    ) -> list[MediaItem]:
        """The items, in order; what has to be fetched is fetched together. `options` go before the server's own.

        `reservation` grows by what did not come in the body. Raises RequestError naming the field of one that cannot be
        used, or RequestError(503) where there is no room for it.
        """
        self._check(sources)
        video_options = self._headers.video_options(options)
        arrival = self._store.arrival()
        contents = await self._contents(sources, MediaBudget(self._config.max_body_bytes, reservation))
        pairs = list(zip(sources, contents, strict=True))
        headers = await _together(self._header(source, content.data, video_options) for source, content in pairs)
        for source, content in pairs:
            if source.name is not None and source.brings_bytes:
                self._store.put(source.name, content, arrival)
        return [
            MediaItem(source.modality, header, content.data, content.hash, source.field)
            for (source, content), header in zip(pairs, headers, strict=True)
        ]

    async def close(self) -> None:
        await self._reader.close()

    def _check(self, sources: Sequence[MediaSource]) -> None:
        """That the model takes items of these kinds, and the server so many of them in one prompt."""
        counts: Counter[str] = Counter()
        for source in sources:
            modality = source.modality
            if modality not in self._modalities:
                taken = ", ".join(["text", *self._modalities])
                text = f"{source.field}: {modality} is not supported by this model, which takes: {taken}"
                raise RequestError(text, param=source.field, code="unsupported_content")
            counts[modality] += 1
            limit = self._config.limit_mm_per_prompt.get(modality, DEFAULT_LIMIT)
            if counts[modality] > limit:
                total = sum(other.modality == modality for other in sources)
                text = f"at most {limit} {modality}(s) per prompt, got {total}"
                raise RequestError(text, param=source.field, code="too_many_media")

    async def _contents(self, sources: Sequence[MediaSource], budget: MediaBudget) -> list[Content]:
        origins = self._origins(sources, budget)
        bringing = [source for source in sources if source.brings_bytes]
        brought = await _together(self._content(source, budget) for source in bringing)
        by_field = {source.field: content for source, content in zip(bringing, brought, strict=True)}
        return [origin if isinstance(origin, Content) else by_field[origin.field] for origin in origins]

    def _origins(self, sources: Sequence[MediaSource], budget: MediaBudget) -> list[MediaSource | Content]:
        """What brings the bytes of each source: itself, the last one before it of the same name, or the store.

        All at once, before anything is awaited: what other requests bring meanwhile is not for this one.
        """
        named: dict[MediaName, MediaSource] = {}
        origins: list[MediaSource | Content] = []
        for source in sources:
            if source.brings_bytes:
                origins.append(source)
                if source.name is not None:
                    named[source.name] = source
            elif source.name in named:
                origins.append(named[source.name])
            else:
                with blamed(source.field):
                    content = self._remembered(source)
                    budget.take(len(content.data))
                origins.append(content)
        return origins

    def _remembered(self, source: MediaSource) -> Content:
        if source.name is None:
            raise RequestError("this field is required", code="missing_field")
        content = self._store.get(source.name)
        if content is None:
            text = f"no {source.modality} with this uuid is known, or not any more; please send it again"
            raise RequestError(text, code="unknown_uuid")
        return content

    async def _content(self, source: MediaSource, budget: MediaBudget) -> Content:
        with blamed(source.field):
            data = await self._reader.read(source, budget)
        return await in_thread(Content.of, data) if len(data) > LARGE else Content.of(data)

    async def _header(self, source: MediaSource, data: bytes, options: VideoIo) -> Header:
        with blamed(source.field):
            if source.modality == "image" and len(data) <= _SMALL:
                return self._headers.read(source.modality, data, options)
            return await in_thread(self._headers.read, source.modality, data, options)


async def _together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, in order. The first failure is raised as it is, when the others have ended too.

    No task group: its error and the first failure in it name each other, so that whatever the frames on their way hold
    would only be let go by the garbage collector.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await _cancel(tasks)
        tasks.clear()  # for the same reason
        raise


async def _cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
