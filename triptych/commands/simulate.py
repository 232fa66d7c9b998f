"""`triptych simulate`: what a placement would do under a load, without a GPU."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triptych.commands.arguments import (
    USUAL_GPU,
    DescribedGPU,
    DescribedModel,
    check_alone,
    check_folders,
    check_range,
    find_model,
    load_profile,
    quantity,
    slo,
)
from triptych.config import require
from triptych.core import Placement

if TYPE_CHECKING:
    from rich.table import Table

    from triptych.latency import Objectives
    from triptych.planning.costs.profile import Profile
    from triptych.planning.model.shape import ModelShape
    from triptych.planning.search.scenario import Run
    from triptych.planning.simulation.failures import Failure
    from triptych.planning.workloads.workload import Workload

MOST_RATES = 100
MOST = 1 << 20  # tokens, rows or sequences of a step
SCHEDULES = ("fcfs", "sjf", "slo")
USUAL_TARGET = 0.9  # share of the requests within the SLO
FAILURE = re.compile(r"i([0-9]{1,4})@(.+)", re.DOTALL)


def simulate(
    model: DescribedModel = None,
    placement: Annotated[
        str, typer.Option(help="Counts and roles: 1e1p1d, 2e1pd, 1ep1d, 1ed1p, 1epd, 2e2p2d, ...")
    ] = "1e1p1d",
    workload: Annotated[
        str, typer.Option(help="Workload file, or a preset: text, pictures, mixed, paper-synthetic-6, ...")
    ] = "pictures",
    profile: Annotated[Path | None, typer.Option(help="File of `triptych profile`.")] = None,
    gpu: DescribedGPU = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second; as the workload says if left out.")] = None,
    rates: Annotated[str | None, typer.Option(help="Instead: several, such as 0.5,1,2, one run for each.")] = None,
    requests: Annotated[int | None, typer.Option(help="How many; as the workload says if left out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the workload, instead of its own.")] = None,
    slo_ttft: Annotated[str | None, typer.Option(help="Time to first token to keep, such as '2 s'.")] = None,
    slo_tpot: Annotated[str | None, typer.Option(help="Time per output token to keep, such as '50 ms'.")] = None,
    attainment: Annotated[float | None, typer.Option(help="Share of the requests that must keep them.")] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--no-adaptive", help="Let the roles of the instances follow the load.")
    ] = False,
    irp: Annotated[
        bool, typer.Option("--irp/--no-irp", help="Spread the media of one request over all encode instances.")
    ] = True,
    schedule: Annotated[
        str, typer.Option(help="Order of waiting requests of one kind: fcfs, sjf or slo, as `triptych serve`.")
    ] = "fcfs",
    max_queue_s: Annotated[
        float, typer.Option(help="A request that would have to wait longer than that is refused.")
    ] = 300.0,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that decode together on one instance.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one language step.")] = 2048,
    max_encode_tokens: Annotated[int, typer.Option(help="Embedding rows of one encode step, at most.")] = 1024,
    streamed_prefill: Annotated[
        bool, typer.Option(help="Start prefill on the part of a prompt whose media are encoded.")
    ] = True,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Compute the KV of equal beginnings once.")] = True,
    decode_interval_ms: Annotated[
        float | None,
        typer.Option(
            help="Time per token to which answers slow down while a request waits for encoders; 30 if left out where "
            "instances share CPU cores, else 0: not at all."
        ),
    ] = None,
    fail: Annotated[
        list[str] | None,
        typer.Option(help="An instance that ends, and when: 'i0@10s' is the first; may be given several times."),
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="File for every step, request and switch, for ui.perfetto.dev.")
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="File for metrics under the server's names, in Prometheus' text format.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Picture of SLO attainment over the request rate.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say how long requests of a load would take on a placement, how many would meet the SLO, and what would be idle.

    The queues, caches, batches and messages are those of the server; what a step takes is computed from the model's
    config and the GPU's data sheet, or was measured. The same arguments give the same figures.
    """
    _check_numbers(requests, seed, max_num_seqs, max_num_batched_tokens, max_encode_tokens)
    require(_is_positive(max_queue_s), "--max-queue-s", f"{max_queue_s} is not a finite number above 0")
    paced = not decode_interval_ms or _is_positive(decode_interval_ms)
    require(paced, "--decode-interval-ms", f"{decode_interval_ms} is not a finite number of at least 0")
    require(schedule in SCHEDULES, "--schedule", f"{schedule!r} is none of {', '.join(SCHEDULES)}")
    asked_rates = _rates(rate, rates)
    alone = len(asked_rates) == 1
    require(alone or timeline is None, "--timeline", "is of one run; give --rate instead of --rates")
    require(alone or metrics is None, "--metrics", "are of one run; give --rate instead of --rates")
    check_folders({"--timeline": timeline, "--metrics": metrics, "--png": png})
    placed = Placement.parse(placement)
    failures = _failures(fail or [], placed)

    from triptych.latency import Objectives
    from triptych.planning.search import outcome
    from triptych.planning.search.scenario import Scenario
    from triptych.planning.search.space import Candidate
    from triptych.planning.workloads import presets

    shape = find_model(model)
    asked = _with_numbers(presets.load(workload), requests, seed)
    bounds = slo(asked, slo_ttft, slo_tpot, attainment)
    objectives, target = (Objectives(), USUAL_TARGET) if bounds is None else (bounds.objectives, bounds.attainment)
    scenario = Scenario(
        where=workload,
        workload=asked,
        rows_of=shape,
        profile=_profile(shape, gpu, profile),
        candidate=Candidate(
            placement=placed,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_encode_tokens=max_encode_tokens,
            parallel_encode=irp,
            streamed_prefill=streamed_prefill,
            schedule=schedule,  # type: ignore[arg-type]
        ),
        objectives=objectives,
        max_queue_s=max_queue_s,
        failures=failures,
        adaptive=adaptive,
        prefix_caching=enable_prefix_caching,
        decode_interval_ms=decode_interval_ms,
    )
    runs = [scenario.run(one, keeps_stints=timeline is not None) for one in asked_rates]
    title = f"{placed} of {shape.name} on {scenario.profile.hardware}, {asked.name}"
    if json:
        typer.echo(outcome.as_json(scenario, runs, target))
    else:
        _tell([title, *_terms(asked, runs, objectives, target)], *outcome.tables(runs, target))
    if timeline is not None:
        outcome.write_timeline(timeline, runs[0].simulation)
    if metrics is not None:
        outcome.write_metrics(metrics, runs[0].simulation, scenario.profile.model)
    if png is not None:
        outcome.write_chart(png, scenario, runs, target, title)


# ---- what was asked


def _check_numbers(requests: int | None, seed: int | None, seqs: int, tokens: int, rows: int) -> None:
    check_range("--requests", requests, 1, 10_000_000)
    check_range("--seed", seed, 0, 2**32 - 1)
    check_range("--max-num-seqs", seqs, 1, MOST)
    check_range("--max-num-batched-tokens", tokens, 1, MOST)
    check_range("--max-encode-tokens", rows, 1, MOST)
    require(tokens > seqs, "--max-num-batched-tokens", f"{tokens} is not above --max-num-seqs, which is {seqs}")


def _rates(rate: float | None, rates: str | None) -> list[float | None]:
    require(rate is None or rates is None, "--rate, --rates", "only one of them can be given")
    if rates is None:
        require(rate is None or _is_positive(rate), "--rate", f"{rate} is not a finite number above 0")
        return [rate]
    try:
        found = [float(text) for text in rates.split(",")]
    except ValueError:
        found = []
    valid = found and len(found) <= MOST_RATES and all(map(_is_positive, found)) and len(set(found)) == len(found)
    require(bool(valid), "--rates", f"{rates!r} is not a list of 1 to {MOST_RATES} different numbers above 0: 0.5,1,2")
    return [*sorted(found)]


def _is_positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _failures(texts: Sequence[str], placement: Placement) -> "tuple[Failure, ...]":
    from triptych.planning.quantities import Seconds
    from triptych.planning.simulation.failures import Failure

    failures = []
    for text in texts:
        found = FAILURE.fullmatch(text)
        require(found is not None, "--fail", f"{text!r} is not an instance and a time, such as i0@10s")
        assert found is not None
        number, last = int(found[1]), len(placement.roles) - 1
        require(number <= last, "--fail", f"{text!r}: {placement} has the instances i0 to i{last}")
        failures.append(Failure(float(quantity("--fail", Seconds, found[2])), number))
    return tuple(failures)


def _with_numbers(workload: "Workload", requests: int | None, seed: int | None) -> "Workload":
    """With as many requests, and with that seed, where they were asked for."""
    from msgspec.structs import replace

    if seed is not None:
        workload = replace(workload, seed=seed)
    if requests is None:
        return workload
    require(not workload.phases, "--requests", f"{workload.name} has phases, which say how many requests come")
    return workload.with_requests(requests)


def _profile(shape: "ModelShape", gpu: str | None, path: Path | None) -> "Profile":
    """Measured, or computed from the config and the data sheet."""
    from triptych.planning.costs.analytic import analytic_profile
    from triptych.planning.costs.hardware import find_device

    if path is None:
        return analytic_profile(shape, find_device(gpu or USUAL_GPU))
    check_alone("--profile", {"--gpu": gpu})
    found = load_profile(path, shape)
    require(found.tensor_parallel == 1, "--profile", f"{path}: of {found.tensor_parallel} GPUs for one instance, not 1")
    return found


# ---- the answer


def _terms(workload: "Workload", runs: "Sequence[Run]", objectives: "Objectives", target: float) -> Iterator[str]:
    """How fast requests are sent, and what they are held against."""
    from triptych.planning.quantities import Seconds, percent

    if len(runs) == 1:
        yield f"Sent: {_pace(workload, runs[0].rate)}{_came(workload, runs[0])}"
    limits = {"TTFT": objectives.ttft_ms, "TPOT": objectives.tpot_ms, "E2E": objectives.e2e_ms}
    kept = [f"{name} at most {Seconds(limit / 1e3).short()}" for name, limit in limits.items() if limit is not None]
    yield f"SLO: {', '.join(kept)}, for {percent(target)} of the requests" if kept else "SLO: none"


def _pace(workload: "Workload", rate: float | None) -> str:
    rate = workload.rate if rate is None else rate
    if rate is None:
        return "all at once" if workload.trace is None else "as recorded"
    return f"{rate:.4g} req/s" + (", times the factor of each phase" if workload.phases else "")


def _came(workload: "Workload", run: "Run") -> str:
    """As many requests as there are never come at exactly the rate that they are drawn with."""
    came, rate = run.figures.sent_per_s, workload.rate if run.rate is None else run.rate
    if came is None or (rate is not None and f"{came:.3g}" == f"{rate:.3g}"):
        return ""
    return f"; these {run.figures.num_requests:,} requests came at {came:.3g} req/s"


def _tell(head: Sequence[str], tables: "Sequence[Table]", lines: Sequence[str]) -> None:
    from rich.console import Console

    console = Console()

    def say(texts: Sequence[str]) -> None:
        for text in texts:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(head)
    for table in tables:
        say([str(table.title)] if table.title else [])
        table.title = None  # it would be cut to the width of the table
        console.print(table)
    say(lines)
