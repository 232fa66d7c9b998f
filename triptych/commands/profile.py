"""`triptych profile`: measures what the engine costs on this machine, and writes it to a file."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.commands.arguments import BUILT_IN, check_folders, find_checkpoint, is_built_in, quantity
from triptych.commands.progress import progress
from triptych.config import require
from triptych.config_file import naming_flags

if TYPE_CHECKING:
    from rich.console import Console

    from triptych.bench.live_costs import Live
    from triptych.config import ModelConfig
    from triptych.engine.profiling import Measured
    from triptych.planning.costs.profile import Made, Profile, Residual
    from triptych.planning.quantities import DollarsPerHour


WORDS = {  # what a cost is of, where its name does not say it
    "encode_step": "encode: a step, beside what is in it",
    "encode_item": "encode: a picture, video or clip",
    "encode_pixel": "encode: a pixel of it",
    "encode_unit": "encode: an encode unit",
    "encode_row": "encode: an embedding row",
    "encode_pair": "encode: a row, for each one of its unit",
    "prefill_step": "prefill: a step, beside what is in it",
    "prefill_sequence": "prefill: a sequence",
    "prefill_token": "prefill: a token",
    "prefill_pair": "prefill: a token, for each one before it",
    "decode_step": "decode: a step, beside what is in it",
    "decode_sequence": "decode: a sequence",
    "decode_few": "decode: a sequence, more for each of the first 8",
    "decode_context": "decode: a token of its context",
    "turn": "an instance that takes messages and computes nothing",
    "wake": "the first step after a rest, or after one of another stage",
    "encode_crowding": "encode: more time of a step, for each other core at work",
    "prefill_crowding": "prefill: the same",
    "decode_crowding": "decode: the same",
    "arrival": "a request, until it is dispatched",
    "message": "a message from process to process",
    "transfer": "a transfer, beside its bytes",
    "bytes_per_second": "bytes of transfers",
    "host_bytes_per_second": "bytes to host memory and back",
    "switch_weights": "a role switch that loads weights",
    "switch_books": "a role switch that loads none",
    "cores": "cores that all processes share",
    "server_request": "server: a request",
    "server_prompt_token": "server: a token of its prompt",
    "server_item": "server: a picture, video or clip",
    "server_media_byte": "server: a byte of it",
    "server_step": "server: what a step of an instance sampled",
    "server_token": "server: a token of an answer",
    "server_report": "server: anything else that an instance says",
    "client_request": "load generator: a request",
    "client_token": "load generator: a token of an answer",
    "device": "memory of the device",
    "runtime": "memory before any weight is loaded",
    "encoder_weights": "weights of the encoders",
    "language_weights": "weights of the language model",
    "encode_activations": "activations of an encode step, at most",
    "language_activations": "activations of a language step, at most",
    "kv_token": "KV of a token",
    "kv_sequence": "recurrent states of a sequence",
    "embedding_row": "an embedding row",
    "context_len": "tokens of prompt and answer, at most",
}
FAR_OFF = 0.2  # error of a fit that is worth a remark


@naming_flags
def profile(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or Hugging Face id; the built-in model if left out.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the profile (JSON).")] = Path("profile.json"),
    threads: Annotated[int, typer.Option(help="CPU threads of an instance.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, in a minute or two.")] = False,
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

    from triptych import __version__
    from triptych.config import ModelConfig, checked
    from triptych.model.loading import load_config, resolve_dtype
    from triptych.planning.costs.profile import Made

    config = checked(
        ModelConfig,
        path=str(find_checkpoint(model, revision)),
        name=BUILT_IN if model is None or is_built_in(model) else model,
        revision=revision,
        dtype=dtype,
        device=_device(device),
        load_format=load_format,
        max_model_len=max_model_len,
    )
    arguments = ["--threads", str(threads), "--device", config.device, "--dtype", dtype, "--load-format", load_format]
    arguments += ["--transfer", transfer]
    arguments += [] if model is None else [model]
    arguments += [] if max_model_len is None else ["--max-model-len", str(max_model_len)]
    arguments += [] if not revision else ["--revision", revision]
    made = Made(
        date=datetime.now(UTC).date().isoformat(),
        version=__version__,
        command=shlex.join(["triptych", *sys.argv[1:]]),
        device=config.device,
        dtype=str(resolve_dtype(config, load_config(config.path))).removeprefix("torch."),
        threads=threads,
    )
    result = _measured(config, hardware or _hardware(config.device), made, transfer, quick, arguments)
    result = replace(result, price=cost_per_hour)
    tell(result, quick=quick)
    result.save(output)  # after that: what took minutes is told, whatever becomes of the file
    typer.echo(f"written to {output}")
    typer.echo(f"next: {next_command(output, described(model, config.path))}")


def described(model: str | None, folder: str) -> str | None:
    """What `triptych simulate` calls the model: what is on the hub has a folder here."""
    return None if model is None else model if Path(model).expanduser().is_dir() else folder


def _check(output: Path, threads: int, transfer: str) -> None:
    """Before anything is measured."""
    import os

    cores = len(os.sched_getaffinity(0))
    require(1 <= threads <= cores, "--threads", f"{threads} is not between 1 and the {cores} cores of this machine")
    require(transfer in ("auto", "shm", "nixl"), "--transfer", f"{transfer!r} is none of auto, shm, nixl")
    check_folders({"--output": output})


def _price(text: str | None) -> "DollarsPerHour | None":
    from triptych.planning.quantities import DollarsPerHour

    return None if text is None else quantity("--price", DollarsPerHour, text)


def _device(device: str) -> str:
    import torch

    is_cuda = device == "cuda" or device.startswith("cuda:")
    require(device == "cpu" or is_cuda, "--device", f"{device!r} is none of cpu, cuda, cuda:N")
    number, most = device.removeprefix("cuda").removeprefix(":") or "0", torch.cuda.device_count()
    there = "no CUDA device" if not most else f"cuda:0 to cuda:{most - 1}"
    known = not is_cuda or (number.isdecimal() and int(number) < most)
    require(known, "--device", f"{device}: this host has {there}")
    return f"cuda:{int(number)}" if is_cuda else device


def _hardware(device: str) -> str:
    """As the machine names itself."""
    import torch

    from triptych.bench.environment import environment

    return str(environment()["cpu"]) if device == "cpu" else torch.cuda.get_device_name(device)


def _measured(
    model: "ModelConfig", hardware: str, made: "Made", transfer: str, quick: bool, arguments: list[str]
) -> "Profile":
    """The engine by itself, then real servers under load."""
    from triptych.bench import live_costs
    from triptych.engine.profiling import FULL, QUICK, Profiler

    effort = live_costs.QUICK if quick else live_costs.FULL
    num_loads = len(live_costs.PLACEMENTS) * (1 + len(effort.asks))
    with progress("profile") as part, part("measurements", Profiler.steps + num_loads) as advance:
        measured = Profiler(
            model,
            threads=made.threads,
            transfer=transfer,  # type: ignore[arg-type]
            effort=QUICK if quick else FULL,
            sides=live_costs.SIDES,
            done=advance,
        ).run()
        alone = _assembled(model, hardware, made, measured)
        pictures = live_costs.Pictures(measured.rows, measured.lead_tokens) if measured.rows else None
        return _calibrated(alone, live_costs.live_runs(arguments, alone, pictures, effort, advance))


def _calibrated(alone: "Profile", live: "Live") -> "Profile":
    """What the processes of a live server took of the cores says what steps cost among them, and what serving costs.
    Where an instance computes elsewhere, or with several threads, its CPU time says nothing of its steps."""
    from dataclasses import replace

    from msgspec.structs import replace as replaced

    from triptych.planning.simulation.calibration import calibrate

    costs, residuals = replace(alone.costs(), arrival=live.arrival_s), dict(alone.residuals)
    notes = [*alone.made.notes, *live.notes]
    if live.runs:
        of_steps = alone.made.device == "cpu" and alone.made.threads == 1
        found = calibrate(costs, live.runs, steps=of_steps)
        costs, residuals = found.costs, residuals | dict(found.residuals)
        if of_steps:
            times = ", ".join(f"{part} {scale:.2f}" for part, scale in found.scales.items())
            notes.append(f"in a live server steps take so many times what they take alone: {times}")
    made = replaced(alone.made, notes=tuple(notes))
    return replaced(alone.with_costs(costs), residuals=residuals, made=made)


def _assembled(model: "ModelConfig", hardware: str, made: "Made", measured: "Measured") -> "Profile":
    """Costs of the engine alone, each fitted to the samples of its stage."""
    import os

    from msgspec.structs import replace

    from triptych.engine.profiling import FITTED
    from triptych.planning.costs.fit import fit
    from triptych.planning.costs.profile import Profile, StageCosts
    from triptych.planning.quantities import BytesPerSecond, Seconds

    fits = {stage: fit(measured.stages[stage], names) for stage, names in FITTED.items() if stage in measured.stages}
    costs = {name: cost for of in fits.values() for name, cost in of.costs.items()}
    byte_s = costs.pop("byte")
    costs |= measured.seconds
    residuals = {stage: of.residual for stage, of in fits.items()}
    fields: dict[str, Any] = {name: Seconds(value) for name, value in costs.items()} | measured.crowding
    if measured.stages["mixed"]:
        residuals["mixed"] = _mixed_residual(measured, costs)
    assert measured.memory is not None
    return Profile(
        model=model.name,
        hardware=hardware,
        kind="measured",
        costs_of_steps=StageCosts(
            **fields,
            bytes_per_second=BytesPerSecond(1 / max(byte_s, 1e-15)),
            cores=len(os.sched_getaffinity(0)) if model.device == "cpu" else None,
        ),
        memory=measured.memory,
        residuals=residuals,
        made=replace(made, notes=tuple(measured.notes)),
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


def tell(profile: "Profile", *, quick: bool) -> None:
    """What was measured, and how it becomes better."""
    from rich.console import Console

    _show(Console(), profile)
    for note in profile.made.notes:
        typer.echo(note)
    far = [name for name, residual in profile.residuals.items() if residual.worst > FAR_OFF]
    if far:
        better = "measure without --quick, and " if quick else ""
        typer.echo(f"Far off at worst: {', '.join(far)}. To do better, {better}keep the machine free of other work.")


def next_command(output: Path, model: str | None) -> str:
    """What the file is for. `model`: as it was named, or its folder."""
    return shlex.join(["triptych", "simulate", *([] if model is None else [model]), "--profile", str(output)])


def _show(console: "Console", profile: "Profile") -> None:
    from msgspec.structs import asdict
    from rich.table import Table

    console.print(f"{profile.model} on {profile.hardware}", markup=False, highlight=False, soft_wrap=True)
    table = Table("cost", "measured")
    for name, value in (asdict(profile.costs_of_steps) | asdict(profile.memory)).items():
        table.add_row(WORDS.get(name, name.replace("_", " ")), _short(value))
    console.print(table)
    console.print("-: too little to be told from the rest, or not measured", highlight=False)
    table = Table("fit of", "samples", "median error", "worst error")
    for name, residual in profile.residuals.items():
        table.add_row(name, str(residual.samples), f"{residual.median:.1%}", f"{residual.worst:.1%}")
    console.print(table)


def _short(value: object) -> str:
    from triptych.planning.quantities import Quantity

    if not value:
        return "-"
    if isinstance(value, Quantity):
        return value.short()
    return f"{value:.1%}" if isinstance(value, float) else str(value)
