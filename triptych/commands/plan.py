"""`triptych plan`: which placement to buy for a load, or that none is needed."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from triptych.commands.arguments import (
    USUAL_GPU,
    DescribedGPU,
    DescribedModel,
    check_alone,
    check_folders,
    check_range,
    find_model,
    is_built_in,
    load_profile,
    quantity,
    slo,
)
from triptych.commands.progress import progress
from triptych.config import require
from triptych.demo import checkpoint_path
from triptych.errors import EXIT_FAILED

if TYPE_CHECKING:
    from rich.console import Console

    from triptych.planning.costs.profile import Profile
    from triptych.planning.model.shape import ModelShape
    from triptych.planning.quantities import Quantity
    from triptych.planning.search.answer import Answer, Text
    from triptych.planning.search.export import Engine
    from triptych.planning.search.goals import Goal
    from triptych.planning.search.plan import Question
    from triptych.planning.workloads.workload import Slo, Workload

MOST_GPUS = 64
USUAL_REQUESTS = 500
MOST_COLUMNS = 1000  # that a table may need
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
    model: DescribedModel = None,
    gpu: DescribedGPU = None,
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
        str,
        typer.Option(
            help="rate (the highest that keeps the SLO, less beta times the cost per hour; goodput, as papers call it, "
            "is the same), or cost (the least for --rate)."
        ),
    ] = "rate",
    beta: Annotated[
        float | None, typer.Option(help="Requests per second that a USD per hour must bring; 0 if left out.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", "--goodput", help="Requests per second to serve; that of the workload if left out."),
    ] = None,
    tensor_parallel: Annotated[
        str | None,
        typer.Option(
            help="Degrees to try, such as 1,2,4; not beside --profile. `triptych serve` runs instances of one GPU.",
            show_default="1",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(help="Requests with which each candidate is simulated; 500, or what phases say, if left out."),
    ] = None,
    confirm: Annotated[
        int | None,
        typer.Option(
            help="Requests of each of the longer runs that the best must keep the SLO in; as many as their rate needs "
            "if left out, 0: no such runs."
        ),
    ] = None,
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
    """Say which placement keeps the SLO of a load at the highest rate, what it costs, and whether splitting pays.

    Exit code 1 if no placement serves enough. The script for another engine stands beside the output file; without
    one it is all that stdout gets, and the rest goes to stderr.
    """
    _check_numbers(gpus, rate, requests, confirm, trials, seed, processes)
    _check_objective(objective, beta, rate)
    require(export in (None, "vllm", "sglang"), "--export", f"{export!r} is none of vllm, sglang")
    engine = cast("Engine | None", export)
    check_folders({"--output": output, "--png": png, "--export": _script(output, engine)})
    _check_suffix("--output", output, ".yaml", ".yml")
    _check_suffix("--png", png, ".png")

    from triptych.planning.search.goals import HighestRate, LeastCost
    from triptych.planning.search.plan import Question
    from triptych.planning.workloads import presets

    shape = find_model(model)
    _check_checkpoint(model, {"--output": output, "--export": export})
    asked = presets.load(workload)
    said = f"{asked.name} has phases, which say how many requests come"
    require(requests is None or not asked.phases, "--requests", said)
    require(not confirm or not asked.phases, "--confirm", said)
    profiles = _profiles(shape, gpu, profile or [], tensor_parallel)
    question = Question.of(
        where=workload,
        workload=asked,
        rows_of=shape,
        slo=_slo(asked, workload, slo_ttft, slo_tpot, attainment),
        profiles=profiles,
        num_gpus=_num_gpus(gpus, budget, profiles),
        choices=CHOICES,
        num_requests=requests or USUAL_REQUESTS,
        num_confirming=confirm,
    )
    goal = LeastCost(rate or asked.rate or question.load.rate) if objective == "cost" else HighestRate(beta or 0.0)
    answer = _answer(question, goal, trials, seed, processes, engine, draws=png is not None)
    title = _title(shape, question, profiles, asked)
    words: dict[str, object] = {
        "--workload": workload,
        "--slo-ttft": slo_ttft,
        "--slo-tpot": slo_tpot,
        "--attainment": attainment,
    }
    words |= {"--profile": _single(profile, profiles)} if profile else {"--gpu": gpu or USUAL_GPU}
    lines = answer.simulate_lines(_words(model, words))
    texts = answer.texts(_served(model), engine, _exported(model), title)
    if json:
        stdout: str | None = answer.as_json(lines, texts)
    else:
        stdout = texts["export"].content if output is None and "export" in texts else None
    console = _console(to_stderr=stdout is not None)
    if not json:
        _tell(answer, title, lines, _served(model), console)
    _say(console, _notes(texts, output, engine))
    if stdout is not None:
        typer.echo(stdout.rstrip("\n"))
    # Last: what took minutes is told, whatever becomes of the files.
    _say(console, _written(answer, texts, {"serve": output, "export": _script(output, engine), "png": png}, title))
    raise typer.Exit(0 if answer.suffices else EXIT_FAILED)


# ---- what was asked


def _check_numbers(
    gpus: int | None,
    rate: float | None,
    requests: int | None,
    confirm: int | None,
    trials: int,
    seed: int,
    processes: int | None,
) -> None:
    for flag, number, low, high in (
        ("--gpus", gpus, 1, MOST_GPUS),
        ("--requests", requests, 2, 10_000_000),
        ("--confirm", confirm, 0, 10_000_000),
        ("--trials", trials, 1, 100_000),
        ("--seed", seed, 0, 2**32 - 1),
        ("--processes", processes, 1, 1024),
    ):
        check_range(flag, number, low, high)
    served = rate is None or (math.isfinite(rate) and rate > 0)
    require(served, "--rate", f"{rate} is not a finite number above 0")


def _check_objective(objective: str, beta: float | None, rate: float | None) -> None:
    """Beta belongs to one objective, a rate to the other."""
    require(objective in ("rate", "goodput", "cost"), "--objective", f"{objective!r} is none of rate, goodput, cost")
    valid = beta is None or (math.isfinite(beta) and beta >= 0)
    require(valid, "--beta", f"{beta} is not a finite number of at least 0")
    by_cost = objective == "cost"
    require(beta is None or not by_cost, "--beta, --objective", "the least cost is not weighed; leave --beta out")
    only = "the highest rate is looked for; leave --rate out, or give --objective cost"
    require(rate is None or by_cost, "--rate, --objective", only)


def _check_checkpoint(model: str | None, files: Mapping[str, object]) -> None:
    """What is written for an engine names a checkpoint."""
    path = Path(model or "").expanduser()
    for flag, value in files.items():
        valid = value is None or not path.is_file() or path.name == "config.json"
        require(valid, flag, f"{path} is a config without a checkpoint; give the folder of one, or its config.json")


def _check_suffix(flag: str, path: Path | None, *suffixes: str) -> None:
    valid = path is None or path.suffix.lower() in suffixes
    require(valid, flag, f"{path} does not end in {' or '.join(suffixes)}")


def _slo(workload: "Workload", where: str, ttft: str | None, tpot: str | None, attainment: float | None) -> "Slo":
    """One that bounds the time to the first token."""
    given = None if workload.slo is None else workload.slo.ttft
    needed = f"{where} has no slo.ttft, so it is needed, such as '2 s'"
    require(ttft is not None or given is not None, "--slo-ttft", needed)
    found = slo(workload, ttft, tpot, attainment)
    assert found is not None
    return found


def _profiles(shape: "ModelShape", gpu: str | None, paths: Sequence[Path], degrees: str | None) -> "dict[int, Profile]":
    """By the degree of tensor parallelism: measured, or computed from the config and the data sheet."""
    from triptych.planning.costs.analytic import analytic_profile
    from triptych.planning.costs.hardware import find_device

    if paths:
        check_alone("--profile", {"--gpu": gpu, "--tensor-parallel": degrees})
        measured = [load_profile(path, shape) for path in paths]
        profiles = {one.tensor_parallel: one for one in measured}
        require(len(profiles) == len(measured), "--profile", "two files are of the same degree of tensor parallelism")
        return profiles
    numbers = [text.strip() for text in (degrees or "1").split(",")]
    valid = all(text.isdecimal() and 1 <= int(text) <= MOST_GPUS for text in numbers) and len(set(numbers)) == len(
        numbers
    )
    require(valid, "--tensor-parallel", f"{degrees!r} is not a list of different numbers such as 1,2,4")
    device = find_device(gpu or USUAL_GPU)
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
    number = dollars / (price / degree) + 1e-9
    require(number >= 1, "--budget", f"{dollars} buys nothing: one {profile.hardware} costs {price}")
    said = f"{dollars} buys more than {MOST_GPUS} GPUs, which is the most that can be planned"
    require(number < MOST_GPUS + 1, "--budget", said)
    return int(number)


# ---- the answer


def _answer(
    question: "Question",
    goal: "Goal",
    trials: int,
    seed: int,
    processes: int | None,
    engine: "Engine | None",
    *,
    draws: bool,
) -> "Answer":
    from triptych.planning.search import search
    from triptych.planning.search.answer import Answer
    from triptych.planning.search.export import can_export
    from triptych.planning.search.plan import chosen, curves, rows, searched
    from triptych.planning.search.possible import limit_note, require_possible
    from triptych.planning.search.rivals import lucky_rival
    from triptych.planning.search.written import is_servable

    space, evaluator = question.space, question.evaluator
    number = processes or len(os.sched_getaffinity(0))
    also = [is_servable] if engine is None else [is_servable, can_export]
    with progress("plan") as part:
        with search.processes(evaluator, number) as ask:
            with part("looking for the fastest", 1):
                require_possible(question, ask)
            with part("candidates", trials) as advance:
                outcome = search.search(
                    space, evaluator, searched(goal), ask, trials=trials, seed=seed, advance=advance
                )
        found = chosen(outcome, goal, *also)
        with search.processes(question.runs, number) as ask_runs:
            with part(f"longer runs of the best {len(found)}", 1):
                best = rows(found, goal, ask_runs)
                note = limit_note(question, found, best, ask_runs)
                rival = lucky_rival(best, goal, question.runs.seeds, ask_runs)
            drawn = []
            if draws and best:
                with part("picture", 1):
                    drawn = curves(best, ask_runs)
    return Answer(question, goal, outcome, best, drawn, note, rival)


# ---- what is written and told


def _title(shape: "ModelShape", question: "Question", profiles: "dict[int, Profile]", workload: "Workload") -> str:
    hardware = profiles[min(profiles)].hardware
    if question.machines.shares_cores:
        return f"{shape.name}, at most {question.size} on the cores of one {hardware}, {workload.name}"
    return f"{shape.name} on at most {question.space.num_gpus} x {hardware}, {workload.name}"


def _served(model: str | None) -> dict[str, Any]:
    """What `triptych serve` is told of the model: a folder by a path that is valid everywhere, and a name."""
    from triptych.planning.model.shapes import CHECKPOINTS

    if model in {*CHECKPOINTS, *CHECKPOINTS.values()} and not Path(model).exists():
        return {"model": CHECKPOINTS.get(model, model)}
    path = Path(checkpoint_path() if model is None else model).expanduser().resolve()
    folder = path.parent if path.is_file() else path
    return {} if is_built_in(str(folder)) else {"model": str(folder), "served_model_name": [folder.name]}


def _exported(model: str | None) -> str:
    """What other engines are told."""
    served: dict[str, Any] = _served(model)
    return str(served.get("model", checkpoint_path()))


def _words(model: str | None, given: Mapping[str, object]) -> list[str]:
    """Arguments of `triptych simulate` that are those of this command."""
    words = [] if model is None else [model]
    return words + [str(word) for flag, value in given.items() if value is not None for word in (flag, value)]


def _single(paths: Sequence[Path], profiles: "dict[int, Profile]") -> Path:
    """The file of one GPU, in whose order the profiles are, where there is one."""
    return paths[list(profiles).index(1)] if 1 in profiles else paths[0]


def _script(output: Path | None, engine: str | None) -> Path | None:
    return None if output is None or engine is None else output.with_suffix(f".{engine}.sh")


def _written(answer: "Answer", texts: "dict[str, Text]", paths: "dict[str, Path | None]", title: str) -> list[str]:
    """Writes them, and says so, or why not."""
    from triptych.planning import files
    from triptych.planning.search.charts import plan_chart

    said = []
    for name, path in paths.items():
        if path is None:
            continue
        if name in texts:
            files.write_bytes(path, texts[name].content.encode())
            start = f"triptych serve --config {path}" if name == "serve" else f"bash {path}"
            said.append(f"{path} is written, {texts[name].candidate}: {start}")
        elif name == "png" and answer.curves:
            plan_chart(path, answer.curves, answer.question.evaluator.target, title)
            said.append(f"{path} is written: {', '.join(str(curve.candidate) for curve in answer.curves)}")
        else:
            said.append(f"{path} is not written: no placement for it keeps the SLO")
    return said


def _notes(texts: "dict[str, Text]", output: Path | None, engine: str | None) -> list[str]:
    """What files are not of the first row, and why."""
    made = [text for name, text in texts.items() if name == "export" or output is not None]
    missing = ["--export: no placement that can be exported keeps the SLO"] if engine and "export" not in texts else []
    return [*(text.note for text in made if text.note is not None), *missing]


def _console(*, to_stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=to_stderr)


def _tell(
    answer: "Answer", title: str, lines: "Sequence[str | None]", served: Mapping[str, Any], console: "Console"
) -> None:
    from triptych.planning.search.tables import plan_lines, plan_table

    fits = [f"{number} x does not fit: {reason}" for reason, number in answer.outcome.rejected.items()]
    _say(console, [title, *fits])
    unit = answer.question.unit
    table = plan_table(answer.rows, unit)
    if not answer.rows:
        pass
    elif console.measure(table, options=console.options.update_width(MOST_COLUMNS)).maximum <= console.width:
        console.print(table)
    else:
        for line in plan_lines(answer.rows, unit):
            console.print(line, markup=False, highlight=False)
    _say(console, answer.said(lines[0] if lines else None, served))


def _say(console: "Console", lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
