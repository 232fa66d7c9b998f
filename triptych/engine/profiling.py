"""Measures what the engine costs on this machine: steps of a real engine, transfers, messages, role switches, memory.

Where one thread computes, the clock of steps is that of the CPU: it does not see what other processes do to this one.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import select
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import zmq
from msgspec.structs import replace

from triptych.config import (
    EMBEDDING_BLOCK_TOKENS,
    KV_BLOCK_TOKENS,
    InstanceConfig,
    MemoryConfig,
    ModelConfig,
    SchedulingConfig,
    TransferMode,
)
from triptych.core import InstanceId, LeaseId, Role
from triptych.engine.fitting import Fitter, Weights
from triptych.engine.heap import keep_large_blocks
from triptych.engine.neighbour import crowding
from triptych.engine.pools import Layouts, fitting_model_len
from triptych.engine.rig import Rig, Turn
from triptych.engine.sockets import Inbox, Post
from triptych.errors import InstanceError
from triptych.messages import Peer, Release, Ticket
from triptych.model.loading import load_config, weight_bytes
from triptych.planning.costs.cost_model import DECODE, ENCODE, FEW, PREFILL, STAGES
from triptych.planning.costs.fit import Sample
from triptych.planning.costs.profile import Memory
from triptych.planning.quantities import Bytes
from triptych.transfer.select import Transfers
from triptych.transfer.slab import Slab, available_bytes

FITTED = STAGES | {"transfer": ("transfer", "byte")}  # what the samples of each kind pay
WIDEST_CHUNK = SchedulingConfig().max_num_batched_tokens  # longer prompts come in parts that look back at earlier ones
MOST_PULLED_BYTES = 16 << 20
WARM_UP_PICTURES = 30
ECHO_LIMIT_MS = 60_000  # of one message and its answer: the other process has to start before the first


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    repeats: int
    passes: int  # over all batches that decode: what disturbs one, such as a slow minute of the machine, is no other's
    sides: tuple[int, ...]  # of square pictures
    picture_batches: tuple[int, ...]
    batches: tuple[int, ...]  # of sequences that decode together
    output_tokens: int
    most_context: int  # tokens of all sequences that decode together
    switches: int
    pings: int
    comparisons: int  # of steps alone with steps beside another engine


FULL = Effort(6, 3, (224, 448, 896, 1344, 2016), (2, 3, 5), (1, 2, 4, 8, 16, 32, 64), 12, 24_000, 3, 400, 30)
QUICK = Effort(3, 1, (224, 672, 1344), (2, 4), (1, 4, 16, 48), 6, 8_000, 1, 150, 8)


@dataclass(slots=True)
class Measured:
    """Samples of each stage, figures that are no step, and memory."""

    stages: dict[str, list[Sample]] = field(default_factory=dict)  # encode, prefill, decode, mixed, transfer
    seconds: dict[str, float] = field(default_factory=dict)  # turn, message, switch_weights, switch_books
    # How much longer steps take for each core that works beside them, as a share of their time: encode_crowding,
    # prefill_crowding, decode_crowding; empty on a GPU, and where there is no room for a second engine.
    crowding: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what could not be measured
    memory: Memory | None = None
    rows: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of square pictures, by their side in pixels
    lead_tokens: int = 0  # of a prompt, before its first picture


class Profiler:
    """Everything that is measured without a server. `steps` says how often `done` is called on the way."""

    steps = 7

    def __init__(
        self,
        model: ModelConfig,
        *,
        threads: int,
        transfer: TransferMode,
        effort: Effort,
        sides: Sequence[int],
        done: Callable[[], None],
    ) -> None:
        """`sides`: of the pictures of which the rows are asked."""
        self._model = replace(model, max_model_len=fitting_model_len(model, MemoryConfig()))
        self._threads = threads
        self._transfer = transfer
        self._effort = effort
        self._sides = sides
        self._done = done
        self._measured = Measured()
        self._clock = time.process_time if threads == 1 and model.device == "cpu" else time.perf_counter

    def run(self) -> Measured:
        """Raises ConfigError where the checkpoint, the device or the memory cannot serve the model.

        Nothing of the device is held afterwards, so that a server can be measured next.
        """
        self._engine()
        gc.collect()
        if self._model.device != "cpu":
            torch.cuda.empty_cache()
        self._transfers()
        return self._measured

    def _engine(self) -> None:
        runtime = _used_bytes(self._model.device)
        keep_large_blocks()
        torch.set_num_threads(self._threads)
        with tempfile.TemporaryDirectory(prefix="triptych-") as folder, torch.inference_mode():
            config = self._config(Path(folder), Role.E)
            fitter = Fitter(config)
            self._switches(fitter, config)
            rig = Rig(replace(config, role=Role.EPD), fitter, self._clock)
            try:
                peaks = self._steps(rig)
                self._measured.memory = self._memory(fitter.weights, runtime, *peaks)
                self._crowding(rig, config)
            finally:
                rig.close()
            self._messages(Path(folder))

    def _config(self, folder: Path, role: Role) -> InstanceConfig:
        return InstanceConfig(
            id=InstanceId("profiled"),
            role=role,
            epoch="1",
            server_pid=os.getpid(),
            inbox=f"ipc://{folder}/inbox",
            frontend=f"ipc://{folder}/frontend",
            threads=self._threads,
            transfer=self._transfer,
            model=self._model,
            memory=MemoryConfig(),
            scheduling=SchedulingConfig(max_num_batched_tokens=WIDEST_CHUNK, max_num_seqs=max(self._effort.batches)),
        )

    # ---- role switches

    def _switches(self, fitter: Fitter, config: InstanceConfig) -> None:
        """Between roles that share no half of the model, and between two that share it."""
        weights, books = [], []
        fitter.fit(config)
        for _ in range(self._effort.switches):
            weights.append(_seconds(lambda: fitter.fit(replace(config, role=Role.P))))
            books.append(_seconds(lambda: fitter.fit(replace(config, role=Role.D))))
            weights.append(_seconds(lambda: fitter.fit(config)))
        self._measured.seconds |= {
            "switch_weights": statistics.median(weights),
            "switch_books": statistics.median(books),
        }
        self._done()

    # ---- steps of the engine

    def _steps(self, rig: Rig) -> tuple[float, float]:
        """Returns the bytes that encode steps and language steps take beside weights and pools, at most."""
        encode_bytes = 0.0
        if rig.takes_pictures:
            of_sides = {side: rig.rows(side) for side in self._sides}
            self._measured.rows = {side: rows for side, (rows, _) in of_sides.items()}
            self._measured.lead_tokens = max(lead for _, lead in of_sides.values())
            self._warm_up(rig)
            with _peak_bytes(self._model.device) as encode_peak:
                self._measured.stages["encode"] = self._encode(rig)
            encode_bytes = encode_peak()
        self._done()
        rig.play([rig.text(32, 2)])
        with _peak_bytes(self._model.device) as language_peak:
            self._prefill(rig)
            self._done()
            self._decode(rig)
            self._measured.seconds["turn"] = statistics.median(rig.idle_turn_s() for _ in range(self._effort.pings))
            self._done()
        return encode_bytes, language_peak()

    def _encode(self, rig: Rig) -> list[Sample]:
        """Small pictures first: how many share a step hangs on how long the last ones took."""
        effort, samples = self._effort, []
        smallest, *larger = effort.sides
        for _ in range(effort.repeats):
            for batch in (1, *effort.picture_batches):
                samples += self._pictures(rig, smallest, batch)
        for side in larger:
            for _ in range(effort.repeats):
                samples += self._pictures(rig, side, 1)
        return samples

    def _warm_up(self, rig: Rig) -> None:
        """The largest picture takes all the memory that it ever will; small ones then bring the pace down."""
        self._pictures(rig, self._effort.sides[-1], 1)
        for _ in range(WARM_UP_PICTURES):
            self._pictures(rig, self._effort.sides[0], 1)

    def _pictures(self, rig: Rig, side: int, batch: int) -> list[Sample]:
        turns = rig.play([rig.pictures(side, side, 1) for _ in range(batch)])
        return encode_samples(turns, side * side)

    def _prefill(self, rig: Rig) -> None:
        longest = self._longest - 1
        lengths = [length for length in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072) if length < longest]
        turns: list[Turn] = []
        for _ in range(self._effort.repeats):
            for length in lengths:
                turns += rig.play([rig.text(length, 1)])
            turns += rig.play([rig.text(48, 1) for _ in range(8)])
        self._measured.stages["prefill"] = [prefill_sample(turn) for turn in turns]

    def _decode(self, rig: Rig) -> None:
        effort, pure, mixed = self._effort, list[Sample](), list[Sample]()
        contexts = [context for context in (16, 128, 512, 1500) if 2 * context < self._longest]
        for _, batch, context in product(range(effort.passes), effort.batches, contexts):
            if batch * context <= effort.most_context:  # all are prefilled before the first one ends
                output_tokens = effort.output_tokens + batch * context // WIDEST_CHUNK
                turns = rig.play([rig.text(context, output_tokens) for _ in range(batch)])
                kinds = [{decodes for _, _, decodes in turn.chunks} for turn in turns]
                pure += _middle([turn for turn, of in zip(turns, kinds, strict=True) if of == {True}], batch)
                mixed += [mixed_sample(turn) for turn, of in zip(turns, kinds, strict=True) if len(of) == 2]
        self._measured.stages["decode"], self._measured.stages["mixed"] = pure, mixed

    def _crowding(self, rig: Rig, config: InstanceConfig) -> None:
        """What cannot be measured is noted, not missed."""
        if config.model.device == "cpu" and len(os.sched_getaffinity(0)) > self._threads:
            beside = {name: f"{getattr(config, name)}-beside" for name in ("inbox", "frontend")}
            try:
                self._check_room()
                other = replace(config, id=InstanceId("beside"), role=Role.EPD, **beside)
                self._measured.crowding = crowding(rig, other, self._effort.comparisons)
            except InstanceError as error:
                self._measured.notes.append(f"not measured how much slower instances are beside each other: {error}")
        self._done()

    def _check_room(self) -> None:
        """Raises InstanceError where a second engine has no cores, or no memory, of its own."""
        cores, memory = len(os.sched_getaffinity(0)), self._measured.memory
        if cores < 2 * self._threads:
            raise InstanceError(f"two of {self._threads} threads do not fit on {cores} cores")
        assert memory is not None
        needed, available = memory.used(Role.EPD), available_bytes()
        if needed > available:
            raise InstanceError(f"a second one needs {Bytes(needed).short()}, {Bytes(available).short()} are free")

    @property
    def _longest(self) -> int:
        assert self._model.max_model_len is not None
        return self._model.max_model_len

    # ---- between instances

    def _messages(self, folder: Path) -> None:
        """One way, from asking to send it until it is read, between two processes that have nothing else to do."""
        there, back = f"ipc://{folder}/there", f"ipc://{folder}/back"
        process = multiprocessing.get_context("spawn").Process(target=echo, args=(there, back), daemon=True)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        inbox, post = Inbox(context, back), Post(context)
        process.start()
        try:
            trips = [_round_trip(inbox, post, there) for _ in range(self._effort.pings)]
        finally:
            process.terminate()
            process.join()
            post.close(0)
            inbox.close()
            context.term()
        self._measured.seconds["message"] = statistics.median(trips[len(trips) // 4 :]) / 2
        self._done()

    def _transfers(self) -> None:
        """Pulls between two slabs of this device, of KV blocks, into blocks that were never written: those of a prompt
        that no cache knows are new to an instance until its pool has been filled once."""
        layouts = Layouts.of(self._model, load_config(self._model.path))
        block_bytes = layouts.kv.block_bytes
        most = max(2, MOST_PULLED_BYTES // block_bytes)
        counts = [max(1, most >> share) for share in (0, 2, 4, 6, 8)] * (self._effort.repeats + 1)
        sizes = {"kv": (block_bytes, sum(counts), layouts.kv.layout)}
        slabs = [Slab(f"triptych-profiled-{name}", block_bytes * sum(counts), self._model.device) for name in "ab"]
        for slab in slabs:
            slab.carve(sizes)
        reader, holder = (
            Transfers(slab, InstanceId(name), "1", self._transfer) for slab, name in zip(slabs, "ab", strict=True)
        )
        holder_peer = Peer(InstanceId("b"), Role.P, "1", "", holder.describe())
        reader.connect(holder_peer)
        slabs[1].tensor.fill_(1)  # whoever holds KV has written it
        samples, first = [], 0
        for number, count in enumerate(counts):
            blocks = list(range(first, first + count))
            ticket = Ticket(holder_peer.id, "1", LeaseId(0), "kv", blocks, count)
            seconds = _seconds(lambda ticket=ticket: _pull(reader, ticket))  # type: ignore[misc]
            if number >= len(counts) // (self._effort.repeats + 1):  # the first ones set up the connection
                samples.append(Sample({"transfer": 1.0, "byte": float(count * block_bytes)}, seconds))
            first += count
        for transfers in (reader, holder):
            transfers.close()
        for slab in slabs:
            slab.close()
        self._measured.stages["transfer"] = samples
        self._done()

    # ---- memory

    def _memory(self, weights: Weights, runtime: float, encode_bytes: float, language_bytes: float) -> Memory:
        layouts = Layouts.of(self._model, load_config(self._model.path))
        assert weights.encode is not None and weights.language is not None
        kv, embedding = layouts.kv, layouts.embedding
        return Memory(
            device=Bytes(_total_bytes(self._model.device)),
            encoder_weights=Bytes(weight_bytes(weights.encode)),
            language_weights=Bytes(weight_bytes(weights.language)),
            encode_activations=Bytes(encode_bytes),
            language_activations=Bytes(language_bytes),
            runtime=Bytes(runtime),
            kv_token=Bytes(kv.block_bytes / KV_BLOCK_TOKENS),
            kv_sequence=Bytes(kv.state_blocks * kv.block_bytes),
            embedding_row=Bytes(embedding.block_bytes / EMBEDDING_BLOCK_TOKENS),
            context_len=self._longest,
        )


def encode_samples(turns: Sequence[Turn], pixels: int) -> list[Sample]:
    """Of those that encode. `pixels`: of each item, which the first step with a unit of it reads, and no other."""
    samples: list[Sample] = []
    read: set[bytes] = set()
    for turn in turns:
        if turn.works:
            items = {work.media.hash for work in turn.works} - read
            read |= items
            rows = sum(work.unit.num_tokens for work in turn.works)
            pairs = sum(work.unit.num_tokens**2 for work in turn.works)
            amounts = (1, len(items), len(items) * pixels, len(turn.works), rows, pairs)
            samples.append(Sample(dict(zip(ENCODE, map(float, amounts), strict=True)), turn.encode_s))
    return samples


def prefill_sample(turn: Turn) -> Sample:
    tokens = sum(length for _, length, _ in turn.chunks)
    pairs = sum(length * (start + 0.5 * length) for start, length, _ in turn.chunks)
    amounts = (1.0, float(len(turn.chunks)), float(tokens), pairs)
    return Sample(dict(zip(PREFILL, amounts, strict=True)), turn.language_s)


def decode_sample(turn: Turn) -> Sample:
    context = sum(start for start, _, _ in turn.chunks)
    return Sample(_decode_amounts(len(turn.chunks), context), turn.language_s)


def _decode_amounts(num_sequences: int, context: float) -> dict[str, float]:
    amounts = (1.0, float(num_sequences), float(min(num_sequences, FEW)), float(context))
    return dict(zip(DECODE, amounts, strict=True))


def _middle(turns: list[Turn], batch: int) -> list[Sample]:
    """One sample for all steps of so many sequences: they differ by a token of context, and some were disturbed. Steps
    in which a batch has begun to end are few, of sizes that nothing was computed in for long, and take longer."""
    group = [decode_sample(turn) for turn in turns if len(turn.chunks) == batch]
    if not group:
        return []
    context = statistics.fmean(sample.amounts["decode_context"] for sample in group)
    return [Sample(_decode_amounts(batch, context), statistics.median(sample.seconds for sample in group))]


def mixed_sample(turn: Turn) -> Sample:
    """Of both kinds: the costs of each. Among the rows of prompts no sequence is one of few."""
    parts = [
        Turn(0.0, turn.language_s, [], [chunk for chunk in turn.chunks if chunk[2] is decodes])
        for decodes in (True, False)
    ]
    decodes, prefills = decode_sample(parts[0]).amounts, prefill_sample(parts[1]).amounts
    return Sample({**decodes, "decode_few": 0.0, **prefills}, turn.language_s)


def echo(there: str, back: str) -> None:
    """Sends every message back, until this process is ended."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox, post = Inbox(context, there), Post(context)
    poller = zmq.Poller()
    poller.register(inbox.socket, zmq.POLLIN)
    while True:
        poller.poll()
        for message in inbox.receive():
            post.send(back, message)


def _round_trip(inbox: Inbox, post: Post, there: str) -> float:
    time.sleep(0.001)  # as long as a step: the other end sleeps when the message comes
    began = time.perf_counter()
    post.send(there, Release(LeaseId(0)))
    while not inbox.receive():
        if not inbox.socket.poll(ECHO_LIMIT_MS):
            raise InstanceError(f"the process that sends messages back was silent for {ECHO_LIMIT_MS / 1e3:g} s")
    return time.perf_counter() - began


def _pull(reader: Transfers, ticket: Ticket) -> None:
    reader.pull(0, ticket, list(ticket.blocks))
    while not (results := reader.completed()):
        select.select([reader.wake_fd], [], [])
    for result in results:
        if result.error is not None:
            raise result.error


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _used_bytes(device: str) -> float:
    """By this process. On a GPU: what its driver takes for itself."""
    if device != "cpu":
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
    return _status_bytes("VmRSS")


def _total_bytes(device: str) -> float:
    return available_bytes() if device == "cpu" else torch.cuda.mem_get_info(device)[1]


@contextlib.contextmanager
def _peak_bytes(device: str) -> Iterator[Callable[[], float]]:
    """What is taken inside beyond what was taken before, at most. To be asked afterwards."""
    peak: Callable[[], float]
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, peak = _status_bytes("VmRSS"), partial(_status_bytes, "VmHWM")
    else:
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = float(torch.cuda.memory_allocated(device)), partial(torch.cuda.max_memory_allocated, device)
    shared, taken = _status_bytes("RssShmem"), math.nan

    def answer() -> float:
        return taken

    yield answer
    taken = max(0.0, peak() - before - (_status_bytes("RssShmem") - shared))  # pools are shared


def _status_bytes(name: Literal["VmRSS", "VmHWM", "RssShmem"]) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
