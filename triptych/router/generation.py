"""What one client asked for, and the way on which it gets its answer. Knows no instance and no HTTP."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from triptych.core import EncodeUnit, Media, PositionArguments, Span, UnitHash
from triptych.errors import RequestError
from triptych.router.clock import Timer
from triptych.router.ledger import Reservation
from triptych.router.output import Output


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt that is ready to be sent: tokens, and the units that its placeholders stand for.

    `units` has one entry per occurrence; `media` and `fields` have one per distinct unit: the media item that it is a
    part of, and the path of the content part that brought it.
    """

    token_ids: list[int]
    units: tuple[EncodeUnit, ...] = ()
    spans: tuple[Span, ...] = ()
    media: dict[UnitHash, Media] = field(default_factory=dict)
    fields: dict[UnitHash, str] = field(default_factory=dict)
    position_arguments: PositionArguments = field(default_factory=dict)

    @property
    def media_bytes(self) -> int:
        """Of all items, each counted once."""
        return sum(len(media.data) for media in {media.hash: media for media in self.media.values()}.values())


class Owner(Protocol):
    """Who works on it; the frontend."""

    def abort(self, generation: "Generation", /) -> None: ...


class Generation:
    """The sequences that answer one client request. Leaving the `async with` block aborts what is unfinished."""

    def __init__(
        self, owner: Owner, prompts: Sequence[PreparedPrompt], arrived_at: float, deadline: float | None = None
    ) -> None:
        """Times are those of the router's clock."""
        self.prompts = prompts
        self.outputs: list[Output] = []
        self.arrived_at = arrived_at
        self.deadline = deadline
        self.timer: Timer | None = None  # of the deadline
        self.reservation: Reservation | None = None  # of its media, where nobody else has one
        self._owner = owner
        self._changed: dict[Output, None] = {}  # an ordered set
        self._waiter: asyncio.Future[None] | None = None
        self._error: RequestError | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(output.num_tokens for output in self.outputs)

    @property
    def media_bytes(self) -> int:
        return sum(prompt.media_bytes for prompt in self.prompts)

    @property
    def finished(self) -> bool:
        return all(output.finish is not None for output in self.outputs)

    @property
    def failed(self) -> bool:
        return self._error is not None

    def prompt_index(self, output: Output) -> int:
        """Every prompt has the same number of choices, one prompt after the other."""
        return output.index * len(self.prompts) // len(self.outputs)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Output]:
        """The outputs that have something new, as soon as there is one; ends when all is finished and handed out.

        Raises RequestError on failure.
        """
        while not self._changed and self._error is None:
            if self.finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        changed = list(self._changed)
        self._changed.clear()
        return changed

    async def wait(self) -> None:
        """Until every sequence is finished. Raises RequestError on failure."""
        async for _ in self:
            pass

    def notify(self, output: Output) -> None:
        self._changed[output] = None
        self._wake()

    def fail(self, error: RequestError) -> None:
        self._error = self._error or error
        self._wake()

    def close(self) -> None:
        """Nobody works on any of its sequences any more: what was kept for it is let go."""
        if self.timer is not None:
            self.timer.cancel()
        if self.reservation is not None:
            self.reservation.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._owner.abort(self)
