"""`triptych capacity`: what fits on an instance of each role, from a config and a data sheet alone."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.commands.arguments import BUILT_IN, KNOWN_GPUS, USUAL_GPU, DescribedModel, find_model, quantity
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from triptych.planning.costs.capacity import Ask, Most, RoleCapacity, Runtime
    from triptych.planning.costs.hardware import Device
    from triptych.planning.model.shape import ModelShape


def capacity(
    model: DescribedModel = None,
    gpu: Annotated[str, typer.Option(help=KNOWN_GPUS)] = USUAL_GPU,
    image: Annotated[str, typer.Option(help="Width and height of every picture.")] = "4032x3024",
    images_per_request: Annotated[int, typer.Option(help="Pictures of one request, for the largest batch.")] = 1,
    kv_fraction: Annotated[float, typer.Option(help="Share of the free memory for the KV cache.")] = 0.8,
    text_tokens: Annotated[int, typer.Option(help="Tokens of text in a prompt.")] = 22,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 10,
    utilization: Annotated[
        float | None, typer.Option(help="Share of the device's memory that may be used.", show_default="0.9")
    ] = None,
    embedding_cache: Annotated[
        str | None, typer.Option(help="Its size, such as '2 GB'; room for one longest prompt if left out.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a prefill step; all prompts of a batch at once if left out.")
    ] = None,
    max_encode_tokens: Annotated[
        int | None, typer.Option(help="Embedding rows of an encode step; all pictures of a batch at once if left out.")
    ] = None,
    as_paper: Annotated[
        bool,
        typer.Option("--as-paper", help="Count as arXiv 2501.05460 did on its own system, whose numbers are fixed."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what fits: weights, KV tokens, pictures of a request and requests of a batch, for every role of an instance.

    Nothing is loaded. A batch is one step, as the paper counts, unless the bounds of steps are given: all its pictures
    at once, then all its prompts.
    """
    from triptych.planning.costs.capacity import Ask, capacities
    from triptych.planning.costs.hardware import find_device

    width, height = _size(image)
    ask = Ask(
        width=width, height=height, images=images_per_request, text_tokens=text_tokens, output_tokens=output_tokens
    )
    shape, device = find_model(model), find_device(gpu)
    runtime = _runtime(
        as_paper,
        utilization=utilization,
        embedding_bytes=_bytes(embedding_cache),
        max_num_batched_tokens=max_num_batched_tokens,
        max_encode_tokens=max_encode_tokens,
    )
    found = capacities(shape, device, ask, kv_fraction=kv_fraction, runtime=runtime)
    if json:
        typer.echo(_json(shape, device, ask, kv_fraction, found))
    else:
        _show(shape, device, ask, kv_fraction, runtime, found)
        if shape.name == BUILT_IN:
            typer.echo(
                f"{shape.name} is tiny, {_many(shape.parameters)} parameters: name a checkpoint or a preset, such as "
                "qwen2.5-vl-7b, for numbers of a usual model."
            )


def _size(text: str) -> tuple[int, int]:
    from triptych.planning.quantities import parse_pixels

    try:
        return parse_pixels(text)
    except ValueError as error:
        raise ConfigError(f"--image: {error}") from None


def _runtime(as_paper: bool, **chosen: Any) -> "Runtime":
    """With what was said and the defaults of the rest."""
    from triptych.planning.costs.capacity import PAPER, Runtime

    said = {name: value for name, value in chosen.items() if value is not None}
    if not as_paper:
        return Runtime(**said)
    for name in said:
        flag = "embedding-cache" if name == "embedding_bytes" else name.replace("_", "-")
        raise ConfigError(f"--{flag}: is that of the paper with --as-paper; leave one of them out")
    return PAPER


def _bytes(text: str | None) -> float | None:
    from triptych.planning.quantities import Bytes

    return None if text is None else quantity("--embedding-cache", Bytes, text)


# ---- for people


def _show(
    shape: "ModelShape",
    device: "Device",
    ask: "Ask",
    kv_fraction: float,
    runtime: "Runtime",
    found: list["RoleCapacity"],
) -> None:
    from rich.console import Console

    console = Console()
    units = shape.image_units(ask.width, ask.height, ask.images)
    console.print(
        f"{shape.name}: {_many(shape.parameters)} parameters, {_many(shape.encoder_parameters)} of them in the "
        f"encoder; {_size_of(shape.kv_token_bytes * 1000)} of KV for 1,000 tokens; context {shape.context:,}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{device.name}: {_size_of(device.memory)}, {runtime.utilization:.0%} of it used, {kv_fraction:.0%} of what is "
        f"then free for KV; a picture of {ask.width}x{ask.height} is {len(units)} unit{'s' * (len(units) > 1)}, "
        f"{shape.prompt_tokens(units):,} tokens",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(ask, found))
    console.print(_compared(found), highlight=False, soft_wrap=True)


def _table(ask: "Ask", found: list["RoleCapacity"]) -> "Table":
    from rich.table import Table

    table = Table()
    table.add_column("role")
    for title in ("weights", "saved", "free", "KV tokens"):
        table.add_column(title, justify="right")
    table.add_column("pictures of one request")
    table.add_column(f"batch with {ask.images} each")
    for row in found:
        table.add_row(
            row.role.value,
            _size_of(row.weights),
            f"{row.weights_saved:.1%}",
            _size_of(row.free) if row.free >= 0 else f"{_size_of(-row.free)} short",
            f"{row.kv_tokens:,}" if row.role.has_language_model else "-",
            _cell(row.images_per_request),
            _cell(row.batch),
        )
    return table


def _cell(most: "Most") -> str:
    """The number, and what stops one more."""
    from triptych.planning.costs.capacity import Limit

    if most.limit in (Limit.WEIGHTS, Limit.NONE):
        return most.limit.value
    return f"{most.number:,} ({most.limit.value})"


def _compared(found: list["RoleCapacity"]) -> str:
    from triptych.core import Role
    from triptych.planning.costs.capacity import Limit, together

    apart = together(found, (Role.E, Role.P, Role.D))
    joined = together(found, (Role.EPD,))
    text = f"One request may have {apart.number:,} pictures on e, p and d"
    text += f" (then {apart.limit.value})" if apart.number else f" ({apart.limit.value})"
    text += f", and {joined.number:,} on epd ({joined.limit.value})"
    if not joined.number and not apart.number:
        hint = "; a larger --gpu is needed" if Limit.WEIGHTS in (apart.limit, joined.limit) else ""
        return f"{text}: neither fits{hint}."
    if not joined.number:
        return f"{text}: only disaggregated does it fit."
    if apart.number <= joined.number:
        return f"{text}: for memory alone, disaggregation gains nothing here."
    return f"{text}: {apart.number / joined.number:.1f} times as many."


def _size_of(num_bytes: float) -> str:
    from triptych.planning.quantities import Bytes

    return Bytes(num_bytes).short()


def _many(number: float) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


# ---- for machines


def _json(shape: "ModelShape", device: "Device", ask: "Ask", kv_fraction: float, found: list["RoleCapacity"]) -> str:
    from triptych.core import Role
    from triptych.planning.costs.capacity import together
    from triptych.planning.files import dumped

    units = shape.image_units(ask.width, ask.height, ask.images)
    return dumped(
        {
            "model": {
                "name": shape.name,
                "parameters": shape.parameters,
                "encoder_parameters": shape.encoder_parameters,
                "language_parameters": shape.language_parameters,
                "kv_token_bytes": shape.kv_token_bytes,
                "embedding_row_bytes": shape.row_bytes,
                "context": shape.context,
            },
            "gpu": {"name": device.name, "memory_bytes": int(device.memory)},
            "request": {
                "image": f"{ask.width}x{ask.height}",
                "images": ask.images,
                "units_of_an_image": len(units),
                "rows_of_an_image": sum(unit.rows for unit in units),
                "tokens_of_an_image": shape.prompt_tokens(units),
                "text_tokens": ask.text_tokens,
                "output_tokens": ask.output_tokens,
            },
            "kv_fraction": kv_fraction,
            "roles": {row.role.value: _role(row) for row in found},
            "images_per_request": {
                "disaggregated": _most(together(found, (Role.E, Role.P, Role.D))),
                "aggregated": _most(together(found, (Role.EPD,))),
            },
        }
    ).rstrip("\n")


def _role(row: "RoleCapacity") -> dict[str, object]:
    return {
        "weight_bytes": row.weights,
        "weights_saved": round(row.weights_saved, 4),
        "embedding_cache_bytes": row.embedding_cache,
        "free_bytes": row.free,
        "kv_tokens": row.kv_tokens if row.role.has_language_model else None,
        "images_per_request": _most(row.images_per_request),
        "batch": _most(row.batch),
    }


def _most(most: "Most") -> dict[str, object]:
    return {"number": most.number, "limit": most.limit.value}
