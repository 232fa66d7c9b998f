"""One run: find the model, prepare every request, warm up, send, report."""

import asyncio
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from triptych.bench.client import Answer, Client
from triptych.bench.cpu import CpuMeter
from triptych.bench.environment import environment
from triptych.bench.options import BenchOptions
from triptych.bench.report import CpuSeconds, Record, Summary, show
from triptych.bench.workload import Workload
from triptych.errors import InstanceError

CHAT = "/v1/chat/completions"
WARMUP_INDEX = 1 << 30  # requests that are not measured have numbers from here on
PROBE_WORDS = (32, 128)


class Measurement(msgspec.Struct, frozen=True):
    """One run: what was asked (without the key), the figures, and every request."""

    options: dict[str, object]
    summary: Summary
    requests: list[Record]


def run(options: BenchOptions) -> int:
    """Runs to the end and shows the result. Returns the exit code: 1 if any request failed.

    Raises InstanceError if there is no server to measure, or if it refuses the first request.
    """
    where = environment()
    measurement = measure(options)
    show(Console(), measurement.summary)
    if options.json_path is not None:
        result = {"environment": where, **msgspec.structs.asdict(measurement)}
        Path(options.json_path).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return 1 if measurement.summary.num_failed else 0


def measure(options: BenchOptions, begins: Callable[[], None] = lambda: None) -> Measurement:
    """Like `run`, but hands the result out. `begins` is called when all is prepared, before the first request."""
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        records, summary = runner.run(_run(options, Console(file=sys.stderr), begins))
    return Measurement(_shown(options), summary, records)


async def _run(options: BenchOptions, console: Console, begins: Callable[[], None]) -> tuple[list[Record], Summary]:
    client = Client(options.url, options.api_key, options.timeout_s)
    try:
        model = options.model or await _first_model(client)
        num_words = await _num_words(client, options, model)
        workload = Workload(options, model, num_words)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        quiet = not console.is_terminal
        with Progress(*columns, console=console, refresh_per_second=4, transient=True, disable=quiet) as progress:
            preparing = progress.add_task("preparing", total=options.requests)
            requests = []
            for index, body in enumerate(workload.bodies(0, options.requests)):
                requests.append((workload.kind(index).name, client.request("POST", CHAT, body)))
                progress.advance(preparing)
            await _warm_up(client, workload, options)
            progress.remove_task(preparing)
            measuring = progress.add_task("measuring", total=options.requests)
            begins()
            meter, started_at = CpuMeter(options.server_pid), time.perf_counter()
            send = _open_loop if options.rate is not None else _closed_loop
            records = await send(client, requests, options, lambda: progress.advance(measuring))
            duration_s = time.perf_counter() - started_at
            cpu = CpuSeconds(*meter.read())
        return records, Summary.of_run(options, records, duration_s, cpu)
    finally:
        client.close()


async def _closed_loop(
    client: Client, requests: list[tuple[str, bytes]], options: BenchOptions, advance: Callable[[], None]
) -> list[Record]:
    """`concurrency` clients, each of which sends its next request when it has its answer."""
    records: list[Record] = []
    waiting = iter(enumerate(requests))
    started_at = time.perf_counter()

    async def ask_on() -> None:
        for index, (kind, request) in waiting:
            due_s = time.perf_counter() - started_at
            records.append(Record.of(index, due_s, started_at, await client.send(request), kind))
            advance()

    await asyncio.gather(*(ask_on() for _ in range(min(options.concurrency, len(requests)))))
    return sorted(records, key=lambda record: record.index)


async def _open_loop(
    client: Client, requests: list[tuple[str, bytes]], options: BenchOptions, advance: Callable[[], None]
) -> list[Record]:
    """Poisson arrivals that do not wait for answers."""
    assert options.rate is not None
    source = random.Random(options.seed)
    started_at = time.perf_counter()

    async def ask(index: int, due_s: float, kind: str, request: bytes) -> Record:
        record = Record.of(index, due_s, started_at, await client.send(request), kind)
        advance()
        return record

    asking = []
    due_s = 0.0
    for index, (kind, request) in enumerate(requests):
        await asyncio.sleep(max(0.0, started_at + due_s - time.perf_counter()))
        asking.append(asyncio.create_task(ask(index, due_s, kind, request)))
        due_s += source.expovariate(options.rate) if options.rate != float("inf") else 0.0
    return list(await asyncio.gather(*asking))


async def _warm_up(client: Client, workload: Workload, options: BenchOptions) -> None:
    """Each kind, at most 8 tokens each: it is about code paths, not about length."""
    for index in range(options.warmup * len(options.mix)):
        body = workload.body(WARMUP_INDEX + index, most_output_tokens=8)
        _require_answer(await client.send(client.request("POST", CHAT, body)))


async def _first_model(client: Client) -> str:
    answer = await client.send(client.request("GET", "/v1/models"))
    if answer.status != 200:
        raise InstanceError(f"cannot list models: {answer.error}")
    try:
        return str(msgspec.json.decode(bytes(answer.body))["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError) as error:
        raise InstanceError("the server's list of models is not in OpenAI's form") from error


async def _num_words(client: Client, options: BenchOptions, model: str) -> dict[str, int]:
    """Of each kind: as asked, or so many that text alone makes about `prompt_tokens` tokens, chat template included."""
    if all(kind.prompt_tokens is None for kind in options.mix):
        return {kind.name: kind.text_words for kind in options.mix}
    text_only = msgspec.structs.replace(options, kinds=(), images=0, prompt_tokens=None, output_tokens=1)
    counts = []
    for num_words in PROBE_WORDS:
        body = Workload(text_only, model, {"all": num_words}).body(WARMUP_INDEX - num_words)
        answer = _require_answer(await client.send(client.request("POST", CHAT, body)))
        if answer.prompt_tokens is None:
            raise InstanceError("--prompt-tokens needs a server that reports usage; use --text-words")
        counts.append(answer.prompt_tokens)
    per_word = (counts[1] - counts[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    fixed = counts[0] - per_word * PROBE_WORDS[0]
    return {
        kind.name: kind.text_words
        if kind.prompt_tokens is None
        else max(1, round((kind.prompt_tokens - fixed) / max(per_word, 0.1)))
        for kind in options.mix
    }


def _require_answer(answer: Answer) -> Answer:
    if answer.error is not None:
        raise InstanceError(f"the server does not answer as expected: {answer.error}")
    return answer


def _shown(options: BenchOptions) -> dict[str, object]:
    """Everything but the key."""
    fields = msgspec.structs.asdict(options)
    del fields["api_key"]
    return {name: "inf" if value == float("inf") else value for name, value in fields.items()}
