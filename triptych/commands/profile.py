"""`triptych profile`: measures what the engine costs on this machine, and writes it to a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.config import require
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from triptych.bench.serving import ServingCosts
    from triptych.config import ModelConfig
    from triptych.engine.profiling import Measured
    from triptych.planning.costs.profile import Made, Profile, Residual
    from triptych.planning.quantities import DollarsPerHour


def profile(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or Hugging Face id; the built-in model if left out.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the profile (JSON).")] = Path("profile.json"),
    threads: Annotated[int, typer.Option(help="CPU threads of an instance.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, in about half a minute.")] = False,
    revision: Annotated[str, typer.Option(help="Revision of the checkpoint on the hub.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Prompt + output tokens of one request.")] = None,
    transfer: Annotated[str, typer.Option(help="Between instances: auto, shm or nixl.")] = "auto",
    hardware: Annotated[str | None, typer.Option(help="What to call this machine in the profile.")] = None,
    price: Annotated[str | None, typer.Option(help="What an instance costs, such as '1.29 USD/h'.")] = None,
) -> None:
    """Measure what encode, prefill, decode, transfers and the server cost on this machine, for simulate and plan."""
    _check(output, threads, transfer)
    cost_per_hour = _price(price)

    import sys
    from datetime import UTC, datetime

    from msgspec.structs import replace
    from rich.console import Console

    from triptych import __version__
    from triptych.config import ModelConfig, checked
    from triptych.demo import checkpoint_path
    from triptych.model.loading import load_config, resolve_checkpoint, resolve_dtype
    from triptych.planning.costs.profile import Made

    path = checkpoint_path() if model is None else resolve_checkpoint(model, revision)
    config = checked(
        ModelConfig,
        path=str(path),
        name="triptych-demo" if model is None else model,
        revision=revision,
        dtype=dtype,
        device=_device(device),
        load_format=load_format,
        max_model_len=max_model_len,
    )
    arguments = ["--threads", str(threads), "--device", config.device, "--dtype", dtype, "--load-format", load_format]
    arguments += [] if model is None else [model]
    arguments += [] if max_model_len is None else ["--max-model-len", str(max_model_len)]
    arguments += [] if not revision else ["--revision", revision]
    measured, serving = _measure(config, threads, transfer, quick, arguments)
    made = Made(
        date=datetime.now(UTC).date().isoformat(),
        version=__version__,
        command=" ".join(["triptych", *sys.argv[1:]]),
        device=config.device,
        dtype=str(resolve_dtype(config, load_config(config.path))).removeprefix("torch."),
        threads=threads,
    )
    result = _assembled(config, hardware or _hardware(config.device), made, measured, serving)
    result = replace(result, price=cost_per_hour)
    result.save(output)
    _show(Console(), result)
    typer.echo(f"written to {output}")


def _check(output: Path, threads: int, transfer: str) -> None:
    """Before anything is measured."""
    import os

    cores = len(os.sched_getaffinity(0))
    require(1 <= threads <= cores, "--threads", f"{threads} is not between 1 and the {cores} cores of this machine")
    require(transfer in ("auto", "shm", "nixl"), "--transfer", f"{transfer!r} is none of auto, shm, nixl")
    require(output.parent.is_dir(), "--output", f"there is no folder {output.parent}")
    require(not output.is_dir(), "--output", f"{output} is a folder")


def _price(text: str | None) -> "DollarsPerHour | None":
    from triptych.planning.quantities import DollarsPerHour

    try:
        return None if text is None else DollarsPerHour.parse(text)
    except ValueError as error:
        raise ConfigError(f"--price: {error}") from None


def _device(device: str) -> str:
    import torch

    is_cuda = device == "cuda" or device.startswith("cuda:")
    require(device == "cpu" or is_cuda, "--device", f"{device!r} is none of cpu, cuda, cuda:N")
    require(not is_cuda or torch.cuda.is_available(), "--device", f"{device}: this host has no CUDA device")
    return "cuda:0" if device == "cuda" else device


def _hardware(device: str) -> str:
    """As the machine names itself."""
    import torch

    from triptych.bench.environment import environment

    return str(environment()["cpu"]) if device == "cpu" else torch.cuda.get_device_name(device)


def _measure(
    model: "ModelConfig", threads: int, transfer: str, quick: bool, arguments: list[str]
) -> "tuple[Measured, ServingCosts]":
    """With a bar of what is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from triptych.bench import serving
    from triptych.engine.profiling import FULL, QUICK, Profiler

    loads = serving.QUICK if quick else serving.FULL
    columns = (TextColumn("measuring: {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("role switches", total=Profiler.steps + 1 + len(loads))

        def done(what: str) -> None:
            progress.update(task, advance=1, description=f"{what} done")

        effort = QUICK if quick else FULL
        measured = Profiler(model, threads=threads, transfer=transfer, effort=effort, done=done).run()  # type: ignore[arg-type]
        return measured, serving.serving_costs(["--placement", "1epd", *arguments], loads, done)


def _assembled(
    model: "ModelConfig", hardware: str, made: "Made", measured: "Measured", serving: "ServingCosts"
) -> "Profile":
    """Costs of everything, each fitted to the samples of its stage."""
    import os

    from triptych.engine.profiling import STAGES
    from triptych.planning.costs.fit import fit
    from triptych.planning.costs.profile import Profile, StageCosts
    from triptych.planning.quantities import BytesPerSecond, Seconds

    fits = {stage: fit(measured.stages[stage], names) for stage, names in STAGES.items() if stage in measured.stages}
    costs = {name: cost for of in fits.values() for name, cost in of.costs.items()}
    byte_s = costs.pop("byte")
    costs |= measured.seconds | {
        "arrival": serving.arrival_s,
        **{f"server_{name}": cost for name, cost in serving.server.costs.items()},
        "client_request": serving.client.costs["request"],
        "client_token": serving.client.costs["token"],
    }
    residuals = {stage: of.residual for stage, of in fits.items()}
    seconds: dict[str, Any] = {name: Seconds(value) for name, value in costs.items()}
    residuals |= {"server": serving.server.residual, "client": serving.client.residual}
    if measured.stages["mixed"]:
        residuals["mixed"] = _mixed_residual(measured, costs)
    assert measured.memory is not None
    return Profile(
        model=model.name,
        hardware=hardware,
        kind="measured",
        costs_of_steps=StageCosts(
            **seconds,
            bytes_per_second=BytesPerSecond(1 / max(byte_s, 1e-15)),
            cores=len(os.sched_getaffinity(0)) if model.device == "cpu" else None,
        ),
        memory=measured.memory,
        residuals=residuals,
        made=made,
    )


def _mixed_residual(measured: "Measured", costs: dict[str, float]) -> "Residual":
    """How well steps of both kinds follow from the costs of each, to which they were not fitted."""
    from statistics import median

    from triptych.planning.costs.profile import Residual

    errors = []
    for sample in measured.stages["mixed"]:
        parts_s = sum(costs[name] * amount for name, amount in sample.amounts.items() if not name.endswith("_step"))
        predicted_s = max(costs["prefill_step"], costs["decode_step"]) + parts_s
        errors.append(abs(predicted_s / sample.seconds - 1.0))
    return Residual(samples=len(errors), median=median(errors), worst=max(errors))


def _show(console: "Console", profile: "Profile") -> None:
    from msgspec.structs import asdict
    from rich.table import Table

    costs = asdict(profile.costs_of_steps)
    table = Table("cost", "measured", title=f"{profile.model} on {profile.hardware}")
    for name, value in costs.items():
        table.add_row(name, _short(value))
    for name, value in asdict(profile.memory).items():
        table.add_row(f"memory: {name}", _short(value))
    console.print(table)
    table = Table("fit of", "samples", "median error", "worst error")
    for name, residual in profile.residuals.items():
        table.add_row(name, str(residual.samples), f"{residual.median:.1%}", f"{residual.worst:.1%}")
    console.print(table)


def _short(value: object) -> str:
    from triptych.planning.quantities import Quantity

    if isinstance(value, Quantity) and value:
        value = type(value)(float(f"{float(value):.3g}"))
    return str(value)
