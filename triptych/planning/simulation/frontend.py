"""The frontend on simulated time: the server's own router, with a record in place of a client."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from triptych.config import KV_BLOCK_TOKENS, AdmissionConfig
from triptych.core import (
    HASH_BYTES,
    BlockHash,
    BlockHashes,
    EncodeUnit,
    Media,
    RequestId,
    SamplingParams,
    Span,
    UnitHash,
)
from triptych.errors import RequestError
from triptych.messages import AnyMessage, Tokens, TokenUpdate
from triptych.planning.costs.cost_model import Costs
from triptych.planning.simulation.clock import Clock
from triptych.planning.simulation.process import Process
from triptych.planning.workloads.demand import Demand, Item
from triptych.router.attempts import Task
from triptych.router.dispatch import Wire
from triptych.router.generation import Generation, PreparedPrompt
from triptych.router.ledger import Ledger, Reservation
from triptych.router.output import Output
from triptych.router.router import Router
from triptych.router.waiting import Kind

MODEL = b"the model"  # whose KV it is
PLACEHOLDER = 0  # every token of a prompt and of an answer: nobody reads them
NAMED = 1 << 127  # set in hashes of items that have a name, so that these never equal counted ones


@dataclass(slots=True, eq=False)
class Record:
    """What a client saw of one request. Times are those of the simulation, in seconds."""

    demand: Demand
    first_token_s: float | None = None
    finished_s: float | None = None
    num_tokens: int = 0
    num_attempts: int = 0
    error: str | None = None  # the code of what it was refused with, or failed with
    failed_s: float | None = None  # when

    @property
    def latency_s(self) -> float:
        assert self.finished_s is not None, f"not answered: {self.error}"
        return self.finished_s - self.demand.at_s

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None, f"not answered: {self.error}"
        return self.first_token_s - self.demand.at_s

    @property
    def tpot_s(self) -> float | None:
        if self.num_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_tokens - 1)


class _NoText:
    """Tokens are counted, never read."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


_NO_TEXT = _NoText()


@dataclass(slots=True)
class Heard:
    """What the instances said until now."""

    steps: int = 0  # messages with tokens
    tokens: int = 0
    reports: int = 0  # all other messages


class _Count(Output):
    """An answer of which only the number of tokens is known. An update stands for all that are missing before it:
    instances make several steps at once."""

    def __init__(self, request_id: RequestId, num_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=num_tokens, seed=0, ignore_eos=True)
        super().__init__(0, request_id, sampling, (), _NO_TEXT)

    def in_order(self, update: TokenUpdate) -> Sequence[TokenUpdate]:
        return (update,) if update.index >= len(self.token_ids) else ()

    def push(self, update: TokenUpdate) -> int:
        num_tokens = update.index + 1 - len(self.token_ids)
        if num_tokens == 1:
            self.token_ids.append(PLACEHOLDER)
        else:
            self.token_ids += [PLACEHOLDER] * num_tokens
        self.finish = update.finish
        return num_tokens


class SimulatedFrontend:
    """Requests in, tokens out. `num_open`: those that are neither answered nor refused."""

    def __init__(
        self,
        clock: Clock,
        costs: Costs,
        wire: Wire,
        server: Process,
        client: Process,
        *,
        admission: AdmissionConfig,
        parallel_encode: bool,
        prefix_caching: bool,
        max_num_seqs: int,
    ) -> None:
        self.num_open = 0
        self.heard = Heard()
        self.items: dict[bytes, Item] = {}  # by the hash of their media, while anybody may encode them
        self._clock = clock
        self._costs = costs
        self._server = server
        self._client = client
        self._prefix_caching = prefix_caching
        self.router = Router(
            admission,
            wire,
            clock,
            MODEL,
            parallel_encode=parallel_encode,
            prefix_caching=prefix_caching,
            max_num_seqs=max_num_seqs,
            audience=self,
        )
        self._ledger = Ledger(admission.max_media_held_bytes, clock)
        self._held: dict[Record, Reservation] = {}  # of the media of those that are open
        self._records: dict[Generation, Record] = {}
        self._numbers = itertools.count(1)

    # ---- clients

    def expect(self, records: Iterable[Record]) -> None:
        """The request of each record comes when its time has come: one after the other, so that few events wait."""
        in_order = sorted(records, key=lambda record: record.demand.at_s)
        self.num_open += len(in_order)
        self._expect_next(iter(in_order))

    def _expect_next(self, records: Iterator[Record]) -> None:
        record = next(records, None)
        if record is not None:
            self._clock.at(record.demand.at_s, self._come, record, records)

    def _come(self, record: Record, others: Iterator[Record]) -> None:
        self._expect_next(others)  # first: whoever comes at the same moment comes before what follows from this one
        self._client.run(self._costs.client_request, self._sent, record)

    def _sent(self, record: Record) -> None:
        self._clock.after(self._costs.arrival, self._arrived, record)

    def _arrived(self, record: Record) -> None:
        nbytes = sum(item.nbytes for item in record.demand.media)
        try:
            self.router.admission.check_any(self._clock.now)  # before a byte of it is read
            if nbytes:
                self._held[record] = self._ledger.reserve()
                self._held[record].take(nbytes)
        except RequestError as error:
            self._end(record, error)
            return
        seconds = self._costs.server_request_s(record.demand, len(self.router.table.peers))
        self._server.run(seconds, self._take, record)

    def _take(self, record: Record) -> None:
        demand, now = record.demand, self._clock.now
        kind = Kind.of(item.modality for item in demand.media)
        deadline = None if demand.timeout_s is None else demand.at_s + demand.timeout_s
        try:
            self.router.admission.check(kind, deadline, now)
        except RequestError as error:
            self._end(record, error)
            return
        prompt = self._prompt(demand)
        generation = Generation(self, [prompt], demand.at_s, deadline)
        output = _Count(RequestId(f"r{next(self._numbers)}"), demand.output_tokens)
        generation.outputs.append(output)
        self._records[generation] = record
        self.router.requests.begin(generation, [[Task(output, generation, prompt, self._hashes(demand), kind)]])

    def abort(self, generation: Generation) -> None:
        """Simulated clients wait for their answers."""
        raise AssertionError("nobody leaves")

    def _prompt(self, demand: Demand) -> PreparedPrompt:
        """The leading text, the rows of all media, the rest of the text."""
        units: list[EncodeUnit] = []
        spans: list[Span] = []
        media: dict[UnitHash, Media] = {}
        lead_tokens = max(demand.lead_tokens, len(demand.prefix) * KV_BLOCK_TOKENS)
        position = min(lead_tokens, demand.text_tokens)
        for asked in demand.media:
            number = next(self._numbers) if asked.name is None else asked.name | NAMED
            item = Media((number << 16).to_bytes(HASH_BYTES + 2, "big"), asked.modality, b"")
            self.items[item.hash] = asked
            for index, num_rows in enumerate(asked.rows):
                hash_ = UnitHash(((number << 16) + index + 1).to_bytes(HASH_BYTES + 2, "big"))
                spans.append(Span(position, num_rows, len(units), 0))
                units.append(EncodeUnit(hash_, asked.modality, num_rows, index))
                media[hash_] = item
                position += num_rows
        return PreparedPrompt([PLACEHOLDER] * demand.prompt_tokens, tuple(units), tuple(spans), media)

    def _hashes(self, demand: Demand) -> BlockHashes:
        """Leading blocks have names where others share them; all behind these are like no others."""
        if not self._prefix_caching:
            return BlockHashes()
        num_own = demand.prompt_tokens // KV_BLOCK_TOKENS - len(demand.prefix)
        names = [name | NAMED for name in demand.prefix] + [next(self._numbers) for _ in range(num_own)]
        return BlockHashes(MODEL, tuple(BlockHash(name.to_bytes(HASH_BYTES, "big")) for name in names))

    # ---- instances

    def handle(self, message: AnyMessage) -> None:
        """Takes it as soon as the server process has time."""
        if isinstance(message, Tokens):
            self.heard.steps += 1
            self.heard.tokens += len(message.updates)
            seconds = self._costs.server_step + len(message.updates) * self._costs.server_token
        else:
            self.heard.reports += 1
            seconds = self._costs.server_report
        if self._server.takes_time:
            self._server.run(seconds, self._handle, message)
        else:
            self._handle(message)

    def _handle(self, message: AnyMessage) -> None:
        if isinstance(message, Tokens):
            for update in message.updates:
                self.router.requests.take(update, message.instance)
        else:
            taken = self.router.take(message)
            assert taken, f"the frontend cannot take a {type(message).__name__}"

    # ---- what becomes of requests

    def said(self, task: Task, num_tokens: int, after_s: float) -> None:
        """More than one where an instance made several steps at once; see `Audience`."""
        record = self._records[task.generation]
        record.num_attempts = task.num_attempts
        is_last = task.output.finish is not None
        if self._client.takes_time:
            self._client.run(num_tokens * self._costs.client_token, self._see, record, num_tokens, is_last)
        else:
            self._see(record, num_tokens, is_last)

    def answered(self, task: Task) -> None:
        """The client sees it in its own time; see `Audience`."""
        self._forget(task)

    def failed(self, generation: Generation, tasks: list[Task], error: RequestError) -> None:
        """See `Audience`."""
        self._end(self._records[generation], error)
        self._forget(tasks[0])

    def _see(self, record: Record, num_tokens: int, is_last: bool) -> None:
        record.num_tokens += num_tokens
        if record.first_token_s is None:
            record.first_token_s = self._clock.now
        if is_last:
            self._end(record, None)

    def _end(self, record: Record, error: RequestError | None) -> None:
        self.num_open -= 1
        held = self._held.pop(record, None)
        if held is not None:
            held.close()
        if error is None:
            record.finished_s = self._clock.now
        else:
            record.error, record.failed_s = error.code or "error", self._clock.now

    def _forget(self, task: Task) -> None:
        del self._records[task.generation]
        for item in {media.hash for media in task.prompt.media.values()}:
            if self.items[item].name is None:
                del self.items[item]
