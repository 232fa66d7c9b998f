"""CPU time of the one server process: of requests and tokens when it is busy, of reports, of many instances.

The real code: a server with the built-in model under `triptych bench`, the same server under a flood of reports, and
the dispatcher of the router with tables of many instances.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx
import msgspec
import psutil
import zmq

from triptych import messages
from triptych.bench import BenchOptions, measure
from triptych.bench.serving import cpu_s, server
from triptych.bench.workload import picture
from triptych.core import (
    BlockHashes,
    EncodeUnit,
    InstanceId,
    Media,
    Placement,
    RequestId,
    SamplingParams,
    Span,
    Stage,
    UnitHash,
)
from triptych.engine.sockets import Inbox, Post
from triptych.messages import AnyMessage, Load, Peer, PoolUsage, SlabDescription, Table
from triptych.planning.costs.fit import Fit, Sample, fit
from triptych.router.attempts import Task
from triptych.router.dispatch import Dispatcher
from triptych.router.generation import Generation, PreparedPrompt
from triptych.router.output import Output
from triptych.router.waiting import Kind


@dataclass(frozen=True)
class Requests:
    """One run of the load generator, with so many clients."""

    requests: int
    output_tokens: int
    images: int = 0
    side: int = 224  # pixels
    concurrency: int = 2


SERVE = ("--placement", "1e1p1d", "--threads", "1")
NAMES = ("request", "step", "token", "media_byte")
# Also many at a time: one message has the tokens of a whole step, one turn of the event loop takes many messages.
BUSY = (
    Requests(192, 1, concurrency=32),
    Requests(24, 64, concurrency=1),
    Requests(48, 64, concurrency=4),
    Requests(96, 64, concurrency=32),
    Requests(128, 128, concurrency=64),
    Requests(96, 1, 1, concurrency=16),
    Requests(32, 1, 1, 1344, concurrency=16),
    Requests(24, 1, 4, 896, concurrency=8),
)
QUICK = (
    Requests(64, 1, concurrency=32),
    Requests(16, 64, concurrency=1),
    Requests(32, 64, concurrency=32),
    Requests(16, 1, 1, 896, concurrency=8),
)
REPORT_RATES = (256, 4096)  # a second
FLOOD_S = 6.0
NUM_SENDERS = 64
TABLE_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
PROMPT_TOKENS, ROWS = 400, 1200


@dataclass(frozen=True)
class ServerCosts:
    """Seconds of one core; the names are those of `Costs`, `peer` is of one request for each instance."""

    request: float
    step: float  # of an instance: of the message with all that it sampled
    token: float
    media_byte: float
    peer: float
    report: float
    send: float  # of a message, by an instance
    receive: float
    table: dict[int, float]  # of encoding the routing table for one reader, by the number of instances
    table_bytes: dict[int, int]
    residual: dict[str, Any]  # of the fit of the first four

    def of_simulation(self) -> dict[str, float]:
        names = ("request", "step", "token", "media_byte", "peer", "report")
        return {f"server_{name}": getattr(self, name) for name in names}


def measured(*, quick: bool) -> ServerCosts:
    found = _served(QUICK if quick else BUSY)
    send_s, receive_s = _mail()
    tables = {number: messages.encode(_table(number)) for number in TABLE_SIZES}
    return ServerCosts(
        **found.costs,
        peer=_peer_s(),
        report=_report_s(FLOOD_S / 3 if quick else FLOOD_S),
        send=send_s,
        receive=receive_s,
        table={number: _time_s(messages.encode, _table(number)) for number in TABLE_SIZES},
        table_bytes={number: len(frame) for number, frame in tables.items()},
        residual=msgspec.structs.asdict(found.residual),
    )


# ---- requests and tokens


def _served(loads: Sequence[Requests]) -> Fit:
    """CPU seconds of the server process, by least squares over runs that differ in requests, steps, tokens, bytes."""
    with server(SERVE) as (url, pid):
        return fit([_sample(url, pid, load) for load in loads], NAMES)


def _sample(url: str, pid: int, load: Requests) -> Sample:
    options = BenchOptions(
        url=url,
        requests=load.requests,
        concurrency=load.concurrency,
        images=load.images,
        image_sizes=(f"{load.side}x{load.side}",),
        output_tokens=load.output_tokens,
        ignore_eos=True,
        seed=secrets.randbits(30),
        warmup=0,
    )
    began_s, steps_before = cpu_s(pid), _num_steps(url)
    summary = measure(options).summary
    seconds, num_steps = cpu_s(pid) - began_s, _num_steps(url) - steps_before
    if summary.num_failed:
        raise RuntimeError(f"requests failed: {summary.errors}")
    media_bytes = load.images * len(picture((0, 0, 0), load.side, load.side, "jpeg"))
    amounts = (load.requests, num_steps, load.requests * load.output_tokens, load.requests * media_bytes)
    return Sample(dict(zip(NAMES, map(float, amounts), strict=True)), seconds)


def _num_steps(url: str) -> float:
    """Of all instances, each of which sends one message with what it sampled."""
    lines = httpx.get(f"{url}/metrics").raise_for_status().text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("triptych:steps_total"))


# ---- reports


def _report_s(seconds: float) -> float:
    """What one more report costs a server that gets thousands a second."""
    with server(SERVE) as (url, pid):
        connections = psutil.Process(pid).net_connections(kind="unix")
        address = next(f"ipc://{one.laddr}" for one in connections if str(one.laddr).endswith("/frontend"))
        instances = httpx.get(f"{url}/cluster").raise_for_status().json()["instances"]
        decoder = next(one["id"] for one in instances if one["role"] == "d")
        few, many = (_flooded(pid, address, InstanceId(decoder), rate, seconds) for rate in REPORT_RATES)
    return (many - few) / (REPORT_RATES[1] - REPORT_RATES[0])


def _flooded(pid: int, address: str, instance: InstanceId, rate: int, seconds: float) -> float:
    """CPU seconds per second of a server that gets so many reports a second, one by one, from many senders."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    posts = [Post(context) for _ in range(NUM_SENDERS)]
    report, began, began_cpu = _report(instance), time.perf_counter(), cpu_s(pid)
    for number in range(int(rate * seconds)):
        posts[number % NUM_SENDERS].send(address, report)
        time.sleep(max(0.0, began + (number + 1) / rate - time.perf_counter()))
    used = (cpu_s(pid) - began_cpu) / (time.perf_counter() - began)
    for post in posts:
        post.close()
    context.term()
    return used


def _report(instance: InstanceId, stage: Stage = Stage.DECODE) -> Load:
    queues = {"decode_waiting": 3, "decode_running": 57, "leases": 2}
    usage = PoolUsage(64_656, 3_000, 61_656, 0)
    return Load(instance, queues, {"kv": usage}, {stage.value: 1.25}, {"steps": 1e5}, {stage.value: 1.2e-4})


# ---- messages between instances


def _mail() -> tuple[float, float]:
    """Seconds of the sender and of the reader for one report, where many send to one."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox = Inbox(context, "ipc://@triptych-scale")
    posts = [Post(context) for _ in range(NUM_SENDERS)]
    report, sent_s, received_s, received = _report(InstanceId("d")), 0.0, 0.0, 0
    while received < 200 * NUM_SENDERS:
        began = time.thread_time()
        for post in posts:
            post.send(inbox.address, report)
        sent_s += time.thread_time() - began
        time.sleep(0.005)
        began = time.thread_time()
        received += len(inbox.receive())
        received_s += time.thread_time() - began
    for post in posts:
        post.close()
    inbox.close()
    context.term()
    return sent_s / received, received_s / received


# ---- many instances


def _peer_s() -> float:
    """Of one request, for each instance more, on average of one with a picture and one without."""
    least, most = TABLE_SIZES[0], TABLE_SIZES[-1]
    slopes = [(_dispatch_s(most, rows) - _dispatch_s(least, rows)) / (most - least) for rows in (0, ROWS)]
    return sum(slopes) / len(slopes)


def _dispatch_s(num_instances: int, num_rows: int) -> float:
    dispatcher = Dispatcher(_Nowhere(), b"", parallel_encode=True, prefix_caching=True)
    table = _table(num_instances)
    dispatcher.take_table(table)
    for peer in table.peers:
        dispatcher.take_load(_report(peer.id, peer.role.stages[0]))
    times = []
    for number in range(200):
        task = _task(number, num_rows)
        began = time.process_time_ns()
        dispatcher.send([task], dispatcher.route(task))
        times.append(time.process_time_ns() - began)
    return median(times) / 1e9


def _task(number: int, num_rows: int) -> Task:
    units: tuple[EncodeUnit, ...] = ()
    spans: tuple[Span, ...] = ()
    media: dict[UnitHash, Media] = {}
    if num_rows:
        hash_ = UnitHash(number.to_bytes(16, "big"))
        units, spans = (EncodeUnit(hash_, "image", num_rows, 0),), (Span(0, num_rows, 0, 0),)
        media = {hash_: Media(hash_, "image", b"")}
    prompt = PreparedPrompt([0] * (PROMPT_TOKENS + num_rows), units, spans, media)
    generation = Generation(None, [prompt], 0.0, None)  # type: ignore[arg-type]
    output = Output(0, RequestId(f"r{number}"), SamplingParams(max_tokens=200, seed=0), (), _NoText())
    return Task(output, generation, prompt, BlockHashes(), Kind.IMAGE if num_rows else Kind.TEXT)


def _table(num_instances: int) -> Table:
    roles = Placement.parse(f"{num_instances * 3 // 8}e{num_instances * 3 // 8}p{num_instances // 4}d").roles
    slab = SlabDescription(transports={}, host="", device="", base=0, regions={})
    return Table(1, [Peer(InstanceId(f"i{n}"), role, f"ipc://i{n}", "e", slab) for n, role in enumerate(roles)])


class _Nowhere:
    def send(self, instance: InstanceId, message: AnyMessage) -> None:
        messages.encode(message)


class _NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _time_s(action: Callable[..., object], *arguments: object) -> float:
    times = []
    for _ in range(20):
        began = time.process_time_ns()
        action(*arguments)
        times.append(time.process_time_ns() - began)
    return median(times) / 1e9
