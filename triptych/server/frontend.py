"""The frontend owns the truth about every request: what was asked, what was answered, who holds parts of it.

It sends work orders to instances and turns their messages into text. Knows no HTTP, no sockets and no pixels.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import msgspec

from triptych.config import KV_BLOCK_TOKENS
from triptych.core import (
    BlockHashes,
    EncodeUnit,
    InstanceId,
    Media,
    PositionArguments,
    RequestId,
    SamplingParams,
    Span,
    Stage,
    UnitHash,
    distinct,
    units_behind,
)
from triptych.errors import RequestError
from triptych.memory.prefix import prompt_hashes
from triptych.messages import (
    Abort,
    AnyMessage,
    Encode,
    Evicted,
    Failed,
    Load,
    Located,
    Submit,
    Table,
    Tokens,
    TokenUpdate,
    Wanted,
)
from triptych.model.processor import Processor
from triptych.routing import RoutingTable, assign_units, pick
from triptych.server.directory import Directory
from triptych.server.output import Output
from triptych.telemetry import Telemetry

logger = logging.getLogger(__name__)

UNKNOWN_PACE_S = 1e-4  # per token or row, of an instance that has not reported its own yet


class Wire(Protocol):
    """How messages leave. `send` never blocks and never raises for an instance that is gone."""

    def send(self, instance: InstanceId, message: AnyMessage, /) -> None: ...


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


class Generation:
    """The sequences that answer one client request. Leaving the `async with` block aborts what is unfinished."""

    def __init__(self, frontend: "Frontend", prompts: Sequence[PreparedPrompt], started_at: float) -> None:
        self.prompts = prompts
        self.outputs: list[Output] = []
        self.started_at = started_at
        self._frontend = frontend
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
    def finished(self) -> bool:
        return all(output.finish is not None for output in self.outputs)

    def prompt_of(self, output: Output) -> PreparedPrompt:
        return self.prompts[self.prompt_index(output)]

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

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._frontend.abort(self)


class Frontend:
    """Sends requests on their way and hands out what comes back.

    Single-threaded: everything runs on the event loop. `handle` takes messages in any order, any number of times,
    also about requests that nobody knows any more.
    """

    def __init__(
        self,
        processor: Processor,
        wire: Wire,
        telemetry: Telemetry,
        *,
        parallel_encode: bool = True,
        prefix_caching: bool = True,
    ) -> None:
        """`parallel_encode`: the units of a request are spread over all encode instances; else one encodes them all."""
        self.table = RoutingTable()
        self.loads: dict[InstanceId, Load] = {}
        self._processor = processor
        self._wire = wire
        self._telemetry = telemetry
        self._parallel_encode = parallel_encode
        self._prefix_caching = prefix_caching
        self._directory = Directory()
        self._live: dict[RequestId, tuple[Output, Generation]] = {}
        self._unreported_s: dict[InstanceId, float] = {}
        self._id_prefix = secrets.token_hex(4)
        self._id_count = itertools.count()

    @property
    def ready(self) -> bool:
        """Whether every stage has an active instance."""
        return self.table.complete

    # ---- what clients ask for

    def generate(
        self,
        prompts: Sequence[PreparedPrompt],
        samplings: Sequence[SamplingParams],
        n: int = 1,
        stop: tuple[str, ...] = (),
    ) -> Generation:
        """Starts `n` sequences for each prompt. Raises RequestError(503) if a stage that they need has no instance."""
        self._require_stages(encode=any(prompt.units for prompt in prompts))
        generation = Generation(self, prompts, time.monotonic())
        for prompt, sampling in zip(prompts, samplings, strict=True):
            hashes = self._hashes(prompt)
            prefill = self._pick_prefill(prompt, hashes)
            encoders, held = self._assign(prompt, prefill, hashes)
            for choice in range(n):
                output = Output(
                    len(generation.outputs),
                    self._new_id(),
                    msgspec.structs.replace(sampling, choice=choice),
                    stop,
                    self._processor.token_stream(),
                    prefill,
                    {prefill, *encoders.values()},
                )
                generation.outputs.append(output)
                self._live[output.request_id] = (output, generation)
                # The other choices use what the first one ordered; if it is gone by then, they ask for it.
                ordered = tuple(encoders) if choice == 0 else ()
                self._submit(output, prompt, hashes, ordered, held if choice == 0 else {})
            self._order_units(generation.outputs[-n].request_id, prompt, prefill, encoders)
        return generation

    def abort(self, generation: Generation) -> None:
        """Takes every unfinished sequence back from all instances. Idempotent."""
        for output in generation.outputs:
            if self._live.pop(output.request_id, None) is not None:
                self._abort_everywhere(output)
                self._telemetry.aborted()

    # ---- what instances report

    def handle(self, message: AnyMessage) -> None:
        try:
            self._handle(message)
        except Exception:  # the boundary of a message: those that came with it are handled
            logger.exception("cannot take %s", type(message).__name__)
            live = self._live.get(getattr(message, "request_id", RequestId("")))
            if live is not None:
                self._fail(live[1], RequestError("internal server error", status=500, code="internal_error"))

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Tokens():
                self._tokens(message)
            case Located():
                self._located(message)
            case Wanted():
                self._wanted(message)
            case Evicted():
                self._directory.evicted(message)
            case Failed():
                self._failed(message)
            case Load():
                if message.instance in self.table.peers:  # else its last words; a new one says it again soon
                    self.loads[message.instance] = message
                    self._unreported_s.pop(message.instance, None)
            case Table():
                self._table(message)
            case _:
                logger.warning("frontend got %s, which is not for it", type(message).__name__)

    def instance_lost(self, instance: InstanceId) -> None:
        """Ends every request that the instance held a part of with 503."""
        held = {id(generation): generation for output, generation in self._live.values() if instance in output.holders}
        for generation in held.values():
            self._fail(generation, _lost(instance))

    def close(self) -> None:
        """Ends everything with 503: the server stops."""
        error = RequestError("the server is shutting down", status=503, code="shutting_down")
        for generation in {id(generation): generation for _, generation in self._live.values()}.values():
            self._fail(generation, error)

    def _tokens(self, message: Tokens) -> None:
        now = time.monotonic()
        for update in message.updates:
            live = self._live.get(update.request_id)
            if live is None:
                if update.finish is None:  # aborted, but that instance did not know yet that it held it
                    self._wire.send(message.instance, Abort(update.request_id))
                continue
            try:
                self._update(*live, update, message.instance, now)
            except Exception:  # the boundary of a request: the others of this step go on
                logger.exception("%s: cannot take token %d", update.request_id, update.index)
                self._fail(live[1], RequestError("internal server error", status=500, code="internal_error"))

    def _update(
        self, output: Output, generation: Generation, update: TokenUpdate, instance: InstanceId, now: float
    ) -> None:
        output.holders.add(instance)
        if update.index == 0:
            output.num_cached_tokens = update.num_cached
        for due in output.in_order(update):
            output.push(due)
            self._observe(output, generation, now)
            generation.notify(output)
            if output.finish is not None:
                self._finish(output, generation, by_instance=due.finish is not None, now=now)
                return
        # A token behind the first one comes from the instance that decodes: it has pulled everything. Only once the
        # first one is here too, or its loss on the way would never be noticed.
        if update.index >= 1 and output.num_tokens > update.index and len(output.holders) > 1:
            output.holders = {instance}

    def _table(self, message: Table) -> None:
        if message.version <= self.table.version:
            return
        before, self.table = self.table, RoutingTable.of(message)
        here = {(peer.id, peer.epoch) for peer in message.peers}
        for peer in before.peers.values():
            if (peer.id, peer.epoch) not in here:  # gone, or started anew with empty caches
                self._directory.forget(peer.id)
                self.loads.pop(peer.id, None)
                self._unreported_s.pop(peer.id, None)

    def _located(self, message: Located) -> None:
        live = self._live.get(message.request_id)
        if live is None:  # aborted while it was on its way there; if it is finished, this changes nothing
            self._wire.send(message.decode, Abort(message.request_id))
            return
        output, generation = live
        output.holders.add(message.decode)
        # Lost before this was known: `instance_lost` could not count the request among those that it held.
        if self.table.version and message.decode not in self.table.peers:
            self._fail(generation, _lost(message.decode))

    def _failed(self, message: Failed) -> None:
        live = self._live.get(message.request_id)
        if live is None:
            return
        output, generation = live
        prompt = generation.prompt_of(output)
        if message.unit is not None:
            for instance in list(self._directory.holders(message.unit)):
                self._directory.drop_unit(message.unit, instance)
        if message.unit is not None and output.num_tokens:  # it went on without that unit
            return
        param = None if message.unit is None else prompt.fields.get(message.unit)
        self._fail(generation, RequestError(message.message, status=message.status, param=param, code=message.code))

    def _wanted(self, message: Wanted) -> None:
        """Units that were thought to be somewhere have to be encoded after all."""
        live = self._live.get(message.request_id)
        if live is None or live[0].num_tokens:  # an answer that began needs no unit any more
            return
        output, generation = live
        prompt = generation.prompt_of(output)
        try:
            encoders = self._assign_units([unit for unit in distinct(prompt.units) if unit.hash in message.units])
        except RequestError as error:
            self._fail(generation, error)
            return
        output.holders.update(encoders.values())
        self._order_units(output.request_id, prompt, output.prefill, encoders)

    # ---- inside

    def _hashes(self, prompt: PreparedPrompt) -> BlockHashes:
        if not self._prefix_caching:
            return BlockHashes()
        root = self._processor.identity
        return prompt_hashes(root, prompt.token_ids, prompt.units, prompt.spans, KV_BLOCK_TOKENS)

    def _pick_prefill(self, prompt: PreparedPrompt, hashes: BlockHashes) -> InstanceId:
        """Who would have this prompt's KV first: busy with other work, less what its prefix cache saves."""
        busy = self._busy_s()
        for peer in self.table.serving(Stage.PREFILL):
            num_cached = self._directory.num_cached_blocks(peer.id, hashes) * KV_BLOCK_TOKENS
            busy[peer.id] += (len(prompt.token_ids) - num_cached) * self._pace_s(peer.id, Stage.PREFILL)
        return pick(self.table, Stage.PREFILL, busy).id

    def _assign(
        self, prompt: PreparedPrompt, prefill: InstanceId, hashes: BlockHashes
    ) -> tuple[dict[UnitHash, InstanceId], dict[UnitHash, InstanceId]]:
        """Who encodes which unit, and who that does not encode holds one; what the prefix or the cache of `prefill`
        seems to have is in neither. Notes what everybody has to do now."""
        num_cached = self._directory.num_cached_blocks(prefill, hashes) * KV_BLOCK_TOKENS
        self._add_work(prefill, Stage.PREFILL, len(prompt.token_ids) - num_cached)
        self._directory.add_blocks(prefill, hashes.blocks)
        needed = units_behind(prompt.units, prompt.spans, num_cached)
        missing: list[EncodeUnit] = []
        held: dict[UnitHash, InstanceId] = {}
        for hash_, unit in needed.items():
            holders = self._directory.holders(hash_) & self.table.peers.keys()
            if prefill in holders:
                continue
            if holders and not any(self.table.peers[holder].role.encodes for holder in holders):
                held[hash_] = min(holders)
            else:
                missing.append(unit)
        encoders = self._assign_units(missing)
        for hash_ in needed:
            self._directory.add_unit(hash_, prefill)
        return encoders, held

    def _assign_units(self, units: Sequence[EncodeUnit]) -> dict[UnitHash, InstanceId]:
        if not units:
            return {}
        paces = [self._pace_s(peer.id, Stage.ENCODE) for peer in self.table.serving(Stage.ENCODE)]
        encoders = assign_units(
            self.table,
            units,
            self._busy_s(),
            max(paces, default=UNKNOWN_PACE_S),
            holders={unit.hash: self._directory.holders(unit.hash) for unit in units},
            spread=self._parallel_encode,
        )
        for unit in units:
            if encoders[unit.hash] not in self._directory.holders(unit.hash):
                self._add_work(encoders[unit.hash], Stage.ENCODE, unit.num_tokens)
            self._directory.add_unit(unit.hash, encoders[unit.hash])
        return encoders

    def _submit(
        self,
        output: Output,
        prompt: PreparedPrompt,
        hashes: BlockHashes,
        ordered: tuple[UnitHash, ...],
        held: dict[UnitHash, InstanceId],
    ) -> None:
        order = Submit(
            output.request_id,
            prompt.token_ids,
            len(prompt.token_ids),
            prompt.units,
            prompt.spans,
            output.sampling,
            prompt.position_arguments,
            hashes,
            ordered,
            held,
        )
        self._wire.send(output.prefill, order)

    def _order_units(
        self, request_id: RequestId, prompt: PreparedPrompt, prefill: InstanceId, encoders: dict[UnitHash, InstanceId]
    ) -> None:
        """One order for the units of one item that one instance encodes, in the order of the prompt."""
        orders: dict[tuple[InstanceId, bytes], list[EncodeUnit]] = {}
        for unit in distinct(prompt.units):
            if unit.hash in encoders:
                orders.setdefault((encoders[unit.hash], prompt.media[unit.hash].hash), []).append(unit)
        for (encoder, _), units in orders.items():
            media = prompt.media[units[0].hash]
            self._wire.send(encoder, Encode(request_id, media, tuple(units), prefill))

    def _require_stages(self, *, encode: bool) -> None:
        """Before anything is sent. Text alone needs no encode instance."""
        for stage in Stage:
            if not self.table.serving(stage) and (encode or stage is not Stage.ENCODE):
                text = f"no instance serves {stage.name.lower()} at the moment"
                raise RequestError(text, status=503, code="unavailable")

    def _observe(self, output: Output, generation: Generation, now: float) -> None:
        if output.num_tokens == 1:
            self._telemetry.first_token(now - generation.started_at, len(generation.prompt_of(output).token_ids))
        else:
            self._telemetry.next_token(now - output.last_token_at)
        output.last_token_at = now

    def _finish(self, output: Output, generation: Generation, *, by_instance: bool, now: float) -> None:
        del self._live[output.request_id]
        if not by_instance:  # a stop string: the instances would go on
            self._abort_everywhere(output)
        assert output.finish is not None
        self._telemetry.finished(
            output.finish,
            now - generation.started_at,
            len(generation.prompt_of(output).token_ids),
            output.num_tokens,
        )

    def _fail(self, generation: Generation, error: RequestError) -> None:
        for output in generation.outputs:
            if self._live.pop(output.request_id, None) is not None:
                self._abort_everywhere(output)
                self._telemetry.failed()
        generation.fail(error)

    def _abort_everywhere(self, output: Output) -> None:
        for instance in output.holders:
            self._wire.send(instance, Abort(output.request_id))

    def _busy_s(self) -> dict[InstanceId, float]:
        """Predicted work of each instance, all stages together (one loop does them all), with what it has not
        reported yet."""
        reported = {id: sum(load.work_s.values()) for id, load in self.loads.items()}
        return {id: reported.get(id, 0.0) + self._unreported_s.get(id, 0.0) for id in self.table.peers}

    def _pace_s(self, instance: InstanceId, stage: Stage) -> float:
        """Never 0, which is what an instance reports before its first step: work that costs nothing is not spread."""
        load = self.loads.get(instance)
        return (load.pace_s.get(stage) if load is not None else None) or UNKNOWN_PACE_S

    def _add_work(self, instance: InstanceId, stage: Stage, num_tokens: int) -> None:
        seconds = num_tokens * self._pace_s(instance, stage)
        self._unreported_s[instance] = self._unreported_s.get(instance, 0.0) + seconds

    def _new_id(self) -> RequestId:
        return RequestId(f"{self._id_prefix}-{next(self._id_count)}")


def _lost(instance: InstanceId) -> RequestError:
    return RequestError(f"instance {instance} was lost", status=503, code="instance_lost")
