"""`triptych plan`: which placement to buy for a load, or that none is needed."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from triptych.commands.arguments import check_folders, check_range, quantity
from triptych.config import require
from triptych.errors import EXIT_FAILED, ConfigError

if TYPE_CHECKING:
    from triptych.planning.costs.profile import Profile
    from triptych.planning.model.shape import ModelShape
    from triptych.planning.quantities import Quantity
    from triptych.planning.search.export import Engine
    from triptych.planning.search.goals import Goal
    from triptych.planning.search.plan import Curve, Question, Row
    from triptych.planning.search.search import Outcome
    from triptych.planning.workloads.workload import Slo, Workload

MOST_GPUS = 64
CHECKPOINTS = {  # of models that are known by name, on the Hugging Face hub
    "minicpm-v-2.6": "openbmb/MiniCPM-V-2_6",
    "internvl2-8b": "OpenGVLab/InternVL2-8B",
    "internvl2-26b": "OpenGVLab/InternVL2-26B",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
}
CHOICES: dict[str, Any] = {  # what is tried of each option, the usual first
    "max_num_seqs": (64, 16, 256),
    "max_num_batched_tokens": (2048, 8192),
    "max_encode_tokens": (1024, 4096),
    "parallel_encode": (True, False),
    "streamed_prefill": (True, False),
    "schedule": ("fcfs", "sjf", "slo"),
}

Unit = TypeVar("Unit", bound="Quantity")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, config.json, or one of minicpm-v-2.6, internvl2-8b, internvl2-26b, "
            "qwen2.5-vl-7b, qwen3-vl-8b."
        ),
    ],
    gpu: Annotated[str, typer.Option(help="As of `triptych capacity`; unused where --profile is given.")] = "A100-80G",
    gpus: Annotated[int | None, typer.Option(help="How many there may be, at most.")] = None,
    budget: Annotated[str | None, typer.Option(help="Instead: what they may cost, such as '20 USD/h'.")] = None,
    workload: Annotated[
        str, typer.Option(help="Workload file, or a preset: text, pictures, mixed, paper-synthetic-6, ...")
    ] = "pictures",
    slo_ttft: Annotated[str | None, typer.Option(help="Time to first token to keep, such as '2 s'.")] = None,
    slo_tpot: Annotated[str | None, typer.Option(help="Time per output token to keep, such as '50 ms'.")] = None,
    attainment: Annotated[float | None, typer.Option(help="Share of the requests that must keep them.")] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(help="File of `triptych profile`; one for each degree of tensor parallelism."),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="goodput (less beta times the cost per hour), or cost (the least for --goodput).")
    ] = "goodput",
    beta: Annotated[float, typer.Option(help="Requests per second that a USD per hour must bring.")] = 0.0,
    goodput: Annotated[
        float | None, typer.Option(help="Requests per second to serve; the rate of the workload if left out.")
    ] = None,
    tensor_parallel: Annotated[
        str, typer.Option(help="Degrees to try, such as 1,2,4. `triptych serve` runs instances of one GPU.")
    ] = "1",
    requests: Annotated[int, typer.Option(help="Requests of the workload that are simulated, at most.")] = 500,
    trials: Annotated[int, typer.Option(help="Candidates to look at.")] = 160,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    processes: Annotated[int | None, typer.Option(help="That simulate; as many as cores if left out.")] = None,
    export: Annotated[str | None, typer.Option(help="Launch commands for another engine too: vllm or sglang.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for `triptych serve --config` (YAML).")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Picture of goodput and cost over the request rate.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say which placement serves a load best within its SLO, what it costs, and whether splitting the stages pays.

    Exit code 1 if no placement serves enough. The scripts for other engines stand beside the output file, or are
    printed.
    """
    _check_numbers(gpus, beta, goodput, attainment, requests, trials, seed, processes)
    require(objective in ("goodput", "cost"), "--objective", f"{objective!r} is none of goodput, cost")
    require(export in (None, "vllm", "sglang"), "--export", f"{export!r} is none of vllm, sglang")
    check_folders({"--output": output, "--png": png})

    from triptych.planning.costs import shapes
    from triptych.planning.search.goals import LeastCost, MostGoodput
    from triptych.planning.search.plan import Question
    from triptych.planning.workloads import presets

    shape = shapes.find_shape(model)
    asked = presets.load(workload)
    profiles = _profiles(shape, gpu, profile or [], tensor_parallel)
    question = Question.of(
        where=workload,
        demands=asked.demands(shape)[:requests],
        slo=_slo(asked, workload, slo_ttft, slo_tpot, attainment),
        profiles=profiles,
        num_gpus=_num_gpus(gpus, budget, profiles),
        choices=CHOICES,
    )
    goal = LeastCost(goodput or asked.rate or question.load.rate) if objective == "cost" else MostGoodput(beta)
    title = f"{shape.name} on at most {question.space.num_gpus} x {profiles[min(profiles)].hardware}, {asked.name}"
    outcome, best, curves = _answer(question, goal, trials, seed, processes, draws=png is not None)
    written = _written(question, best, CHECKPOINTS.get(model, model), cast("Engine | None", export), title)
    if output is not None:
        _write(output, written, export)
    if png is not None and curves:
        from triptych.planning.search.charts import plan_chart

        plan_chart(png, curves, title)
    _tell_json(outcome, goal, best, written) if json else _tell(outcome, goal, best, written, title, output)
    raise typer.Exit(0 if best and outcome.best[0].goodput >= _wanted(goal) else EXIT_FAILED)


# ---- what was asked


def _check_numbers(
    gpus: int | None,
    beta: float,
    goodput: float | None,
    attainment: float | None,
    requests: int,
    trials: int,
    seed: int,
    processes: int | None,
) -> None:
    for flag, number, low, high in (
        ("--gpus", gpus, 1, MOST_GPUS),
        ("--requests", requests, 1, 10_000_000),
        ("--trials", trials, 1, 100_000),
        ("--seed", seed, 0, 2**32 - 1),
        ("--processes", processes, 1, 1024),
    ):
        check_range(flag, number, low, high)
    require(math.isfinite(beta) and beta >= 0, "--beta", f"{beta} is not a finite number of at least 0")
    served = goodput is None or (math.isfinite(goodput) and goodput > 0)
    require(served, "--goodput", f"{goodput} is not a finite number above 0")
    require(attainment is None or 0 < attainment <= 1, "--attainment", f"{attainment} is not above 0 and at most 1")


def _slo(workload: "Workload", where: str, ttft: str | None, tpot: str | None, attainment: float | None) -> "Slo":
    """Of the workload, but for what flags say."""
    from msgspec.structs import asdict

    from triptych.planning.quantities import Seconds
    from triptych.planning.workloads.workload import Slo

    fields = {} if workload.slo is None else asdict(workload.slo)
    given = {"ttft": ("--slo-ttft", ttft), "tpot": ("--slo-tpot", tpot)}
    fields |= {name: quantity(flag, Seconds, text) for name, (flag, text) in given.items() if text is not None}
    fields |= {} if attainment is None else {"attainment": attainment}
    require(fields.get("ttft") is not None, "--slo-ttft", f"{where} has no slo.ttft, so it is needed, such as '2 s'")
    try:
        return Slo(**fields)
    except ValueError as error:
        raise ConfigError(f"--slo-ttft, --slo-tpot: {error}") from None


def _profiles(shape: "ModelShape", gpu: str, paths: Sequence[Path], degrees: str) -> "dict[int, Profile]":
    """By the degree of tensor parallelism: measured, or computed from the config and the data sheet."""
    from triptych.planning.costs.analytic import analytic_profile
    from triptych.planning.costs.hardware import find_device
    from triptych.planning.costs.profile import Profile

    if paths:
        measured = [Profile.load(path) for path in paths]
        profiles = {one.tensor_parallel: one for one in measured}
        require(len(profiles) == len(measured), "--profile", "two files are of the same degree of tensor parallelism")
        return profiles
    numbers = [text.strip() for text in degrees.split(",")]
    valid = all(text.isdecimal() and 1 <= int(text) <= MOST_GPUS for text in numbers) and len(set(numbers)) == len(
        numbers
    )
    require(valid, "--tensor-parallel", f"{degrees!r} is not a list of different numbers such as 1,2,4")
    device = find_device(gpu)
    return {int(text): analytic_profile(shape, device, tensor_parallel=int(text)) for text in numbers}


def _num_gpus(gpus: int | None, budget: str | None, profiles: "dict[int, Profile]") -> int:
    from triptych.planning.quantities import DollarsPerHour

    require((gpus is None) != (budget is None), "--gpus, --budget", "one of them is needed, and not both")
    if gpus is not None:
        return gpus
    assert budget is not None
    dollars = quantity("--budget", DollarsPerHour, budget)
    degree, profile = min(profiles.items())
    price = profile.price
    require(price is not None and price > 0, "--budget", f"{profile.hardware} has no price; give --gpus")
    assert price is not None
    number = int(dollars / (price / degree) + 1e-9)
    require(number >= 1, "--budget", f"{dollars} buys nothing: one {profile.hardware} costs {price}")
    require(number <= MOST_GPUS, "--budget", f"{dollars} buys {number} GPUs, at most {MOST_GPUS} can be planned")
    return number


# ---- the answer


def _answer(
    question: "Question", goal: "Goal", trials: int, seed: int, processes: int | None, *, draws: bool
) -> "tuple[Outcome, list[Row], list[Curve]]":
    from triptych.planning.search import search
    from triptych.planning.search.plan import chosen, curves, require_possible, rows

    space, evaluator = question.space, question.evaluator
    number = processes or len(os.sched_getaffinity(0))
    with search.processes(evaluator, number) as ask, _bar() as bar:
        with bar("looking for the fastest", 1):
            require_possible(question, ask)
        with bar("candidates", trials) as advance:
            outcome = search.search(space, evaluator, goal, ask, trials=trials, seed=seed, advance=advance)
        with bar("figures", 1):
            best = rows(chosen(outcome, goal), goal, ask)
        with bar("picture", 1):
            return outcome, best, curves(best, ask) if draws and best else []


@contextmanager
def _bar() -> Iterator[Callable[..., Any]]:
    """On stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        @contextmanager
        def part(text: str, total: int) -> Iterator[Callable[[], None]]:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
            progress.remove_task(task)

        yield part


def _wanted(goal: "Goal") -> float:
    """The goodput that is enough."""
    return goal.most if math.isfinite(goal.most) else 1e-9


# ---- what is written and told


def _written(
    question: "Question", best: "Sequence[Row]", model: str, engine: "Engine | None", title: str
) -> dict[str, str]:
    """Texts of files: `serve`, and `export` where it is asked for."""
    from triptych.planning.search.export import can_export, export
    from triptych.planning.search.plan import config_text, serve_config

    texts = {}
    servable = next((row for row in best if set(row.candidate.degrees) == {1}), None)
    if servable is not None:
        comments = [
            f"{title}: {servable.goodput:.3g} req/s within the SLO, as simulated.",
            "Made by `triptych plan` for `triptych serve --config`.",
        ]
        texts["serve"] = config_text(serve_config(servable, question, model), comments)
    routed = next((row for row in best if can_export(row.candidate)), None)
    if engine is not None and routed is not None:
        texts["export"] = export(engine, routed.candidate, model)
    return texts


def _write(output: Path, texts: dict[str, str], engine: str | None) -> None:
    from triptych.planning import files

    if "serve" in texts:
        files.write_bytes(output, texts["serve"].encode())
    if "export" in texts:
        files.write_bytes(_script(output, engine), texts["export"].encode())


def _script(output: Path, engine: str | None) -> Path:
    return output.with_suffix(f".{engine}.sh")


def _tell(
    outcome: "Outcome",
    goal: "Goal",
    best: "Sequence[Row]",
    texts: dict[str, str],
    title: str,
    output: Path | None,
) -> None:
    from rich.console import Console

    from triptych.planning.search.tables import plan_table, settings
    from triptych.planning.search.verdict import verdict

    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(title)
    for reason, number in outcome.rejected.items():
        say(f"{number} x does not fit: {reason}")
    if not best:
        say("No placement serves enough requests within the SLO at any rate.")
        return
    console.print(plan_table(best))
    say(verdict(outcome, goal))
    say(f"triptych serve {settings(best[0])}")
    if output is not None and "serve" in texts:
        say(f"written to {output}: triptych serve --config {output}")
    if output is None and "export" in texts:
        say(f"\n{texts['export']}")


def _tell_json(outcome: "Outcome", goal: "Goal", best: "Sequence[Row]", texts: dict[str, str]) -> None:
    from triptych.planning.search.plan import as_json
    from triptych.planning.search.verdict import verdict

    said = verdict(outcome, goal) if best else "No placement serves enough requests within the SLO at any rate."
    typer.echo(as_json(outcome, best, said, texts))
