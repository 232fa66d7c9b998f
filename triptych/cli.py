"""The command line: turns flags into validated options. Heavy imports happen inside the commands."""

import json
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych import __version__
from triptych.config import GIB, MemoryConfig, ModelConfig, SchedulingConfig, ServerConfig, require
from triptych.core import Placement
from triptych.errors import ConfigError, TriptychError

if TYPE_CHECKING:
    from triptych.serve import ServeOptions

app = typer.Typer(
    help="Serve large multimodal models in three stages: encode, prefill, decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 asked for something that cannot be."""
    try:
        app()
    except ConfigError as error:
        sys.exit(_say(error, 2))
    except TriptychError as error:
        sys.exit(_say(error, 1))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or Hugging Face id; the built-in model if left out.")
    ] = None,
    placement: Annotated[
        str, typer.Option(help="Counts and roles: 1e1p1d, 2e1pd, 1ep1d, 1ed1p, 1epd, 2e2p2d, ...")
    ] = "1e1p1d",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 lets the system choose.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="TRIPTYCH_API_KEY", help="Clients must send it as a bearer token.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; may be given several times.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Revision of the checkpoint on the hub.")] = "",
    max_model_len: Annotated[int | None, typer.Option(help="Prompt + output tokens of one request.")] = None,
    limit_mm_per_prompt: Annotated[
        str, typer.Option(help="Media items of each kind in one request, as JSON, for example '{\"image\": 8}'.")
    ] = '{"image": 32}',
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda (all devices in turn) or cuda:N.")] = "cpu",
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights (benchmarks).")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of dummy weights.")] = 0,
    transfer: Annotated[str, typer.Option(help="Between instances: auto, shm or nixl.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads per instance; the cores shared out if left out.")
    ] = None,
    kv_cache_gib: Annotated[float | None, typer.Option(help="KV cache of one instance in GiB.")] = None,
    embedding_cache_gib: Annotated[float | None, typer.Option(help="Embedding cache of one instance in GiB.")] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Part of a GPU's memory that an instance may fill.")
    ] = 0.9,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that decode together on one instance.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one language step.")] = 2048,
    max_image_pixels: Annotated[int, typer.Option(help="Largest picture, decided from its header.")] = 64_000_000,
    max_body_mib: Annotated[int, typer.Option(help="Largest request body.")] = 64,
    media_fetch_timeout_s: Annotated[float, typer.Option(help="For one http(s) media URL.")] = 10.0,
    allow_private_media_hosts: Annotated[
        bool, typer.Option("--allow-private-media-hosts", help="Fetch media from private and loopback addresses too.")
    ] = False,
    allowed_local_media_path: Annotated[
        str | None, typer.Option(help="Folder that file: URLs may read from; file: is refused if left out.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Start an OpenAI-compatible server on any placement of encode, prefill and decode instances."""
    import asyncio

    import uvloop

    from triptych.serve import ServeOptions
    from triptych.telemetry import set_up_logging

    for field, value, valid in (
        ("dtype", dtype, ("auto", "float32", "bfloat16", "float16")),
        ("load_format", load_format, ("auto", "dummy")),
        ("transfer", transfer, ("auto", "shm", "nixl")),
        ("log_level", log_level, ("debug", "info", "warning", "error")),
    ):
        require(value in valid, f"--{field.replace('_', '-')}", f"{value!r} is none of {', '.join(valid)}")
    for name, number, low in (
        ("--port", port, 0),
        ("--max-num-seqs", max_num_seqs, 1),
        ("--max-num-batched-tokens", max_num_batched_tokens, 1),
        ("--max-image-pixels", max_image_pixels, 1),
        ("--max-body-mib", max_body_mib, 1),
    ):
        require(number >= low, name, f"{number} is below {low}")
    require(
        max_num_batched_tokens > max_num_seqs,
        "--max-num-batched-tokens",
        f"{max_num_batched_tokens} leaves no room for prefill beside --max-num-seqs {max_num_seqs} decodes",
    )
    require(port <= 65535, "--port", f"{port} is above 65535")
    require(threads is None or threads >= 1, "--threads", f"{threads} is below 1")
    require(0 < gpu_memory_utilization <= 1, "--gpu-memory-utilization", f"{gpu_memory_utilization} is not in (0, 1]")
    require(media_fetch_timeout_s > 0, "--media-fetch-timeout-s", f"{media_fetch_timeout_s} is not above 0")
    parsed_placement = Placement.parse(placement)
    limits = _limits(limit_mm_per_prompt)
    set_up_logging(log_level.upper())

    from triptych.demo import checkpoint_path
    from triptych.model.loading import resolve_checkpoint

    path = checkpoint_path() if model is None else resolve_checkpoint(model, revision)
    names = tuple(served_model_name or (["triptych-demo"] if model is None else [model]))
    options = ServeOptions(
        placement=parsed_placement,
        model=ModelConfig(
            path=str(path),
            name=names[0],
            revision=revision,
            dtype=dtype,  # type: ignore[arg-type]
            device=device,
            load_format=load_format,  # type: ignore[arg-type]
            max_model_len=max_model_len,
            seed=seed,
        ),
        memory=MemoryConfig(
            kv_cache_bytes=_bytes("--kv-cache-gib", kv_cache_gib),
            embedding_cache_bytes=_bytes("--embedding-cache-gib", embedding_cache_gib),
            gpu_memory_utilization=gpu_memory_utilization,
        ),
        scheduling=SchedulingConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
        server=ServerConfig(
            host=host,
            port=port,
            api_key=api_key,
            served_model_names=names,
            limit_mm_per_prompt=limits,
            max_body_bytes=max_body_mib << 20,
            max_image_pixels=max_image_pixels,
            media_fetch_timeout_s=media_fetch_timeout_s,
            allow_private_media_hosts=allow_private_media_hosts,
            allowed_local_media_path=allowed_local_media_path,
        ),
        transfer=transfer,
        threads=threads,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options))


@app.command()
def bench(
    url: Annotated[str, typer.Option(help="Base URL of any OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model name; the first that the server lists if left out.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
    requests: Annotated[int, typer.Option(help="How many requests are measured.")] = 64,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, Poisson arrivals; inf sends all at once.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Clients of a closed loop, used without --rate.")] = 8,
    images: Annotated[int, typer.Option(help="Pictures per request, no two alike.")] = 0,
    image_size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT, may be given several times; 448x448 if left out.")
    ] = None,
    image_format: Annotated[str, typer.Option(help="jpeg or png.")] = "jpeg",
    text_words: Annotated[int, typer.Option(help="Words of text per request.")] = 32,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of text per request, instead of words.")] = None,
    output_tokens: Annotated[int, typer.Option(help="max_tokens of every request.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for exactly that many tokens (an extra of vLLM's).")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of texts, pictures and arrivals.")] = 0,
    warmup: Annotated[int, typer.Option(help="Requests before the clock starts.")] = 1,
    timeout_s: Annotated[float, typer.Option(help="For one request.")] = 600.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Limit of the time to first token.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Limit of the time per output token.")] = None,
    server_pid: Annotated[
        int | None,
        typer.Option(help="Process of a server on this machine: its CPU time and everybody else's are told."),
    ] = None,
    json_path: Annotated[str | None, typer.Option("--json", help="File for raw records and figures.")] = None,
) -> None:
    """Load an OpenAI-compatible server and print TTFT, TPOT, ITL, throughput, SLO attainment and goodput."""
    from triptych.bench.options import BenchOptions
    from triptych.bench.run import run

    options = BenchOptions(
        url=url,
        model=model,
        api_key=api_key,
        requests=requests,
        rate=rate,
        concurrency=concurrency,
        images=images,
        image_sizes=tuple(image_size or ("448x448",)),
        image_format=image_format,
        text_words=text_words,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        warmup=warmup,
        timeout_s=timeout_s,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        server_pid=server_pid,
        json_path=json_path,
    )
    raise typer.Exit(run(options))


async def _serve(options: "ServeOptions") -> None:
    """Serves until SIGINT or SIGTERM; announces the address in the one line of standard output."""
    import asyncio

    from triptych.serve import serve

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(options, stop, lambda address: typer.echo(f"Triptych ready on {address}"))


def _limits(text: str) -> dict[str, int]:
    try:
        limits: Any = json.loads(text)
    except ValueError:
        limits = None
    valid = isinstance(limits, dict) and all(type(n) is int and n >= 0 for n in limits.values())
    require(valid, "--limit-mm-per-prompt", f'{text!r} is no JSON object of counts such as {{"image": 8}}')
    return dict(limits)


def _bytes(field: str, gib: float | None) -> int | None:
    require(gib is None or 0 < gib < 1 << 20, field, f"{gib} is not a size above 0")
    return None if gib is None else int(gib * GIB)


def _say(error: TriptychError, code: int) -> int:
    typer.echo(f"triptych: {error}", err=True)
    return code


if __name__ == "__main__":
    main()
