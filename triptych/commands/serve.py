"""`triptych serve`: flags, or a file of them, into the options of a server."""

import json
import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych import config_file
from triptych.commands.arguments import find_checkpoint, served_names
from triptych.config import (
    GIB,
    AdmissionConfig,
    ControlConfig,
    MemoryConfig,
    ModelConfig,
    SchedulingConfig,
    ServerConfig,
    checked,
    require,
)
from triptych.core import Placement
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from triptych.serve import ServeOptions

LOG_LEVELS = ("debug", "info", "warning", "error")


@config_file.naming_flags
def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or Hugging Face id; the built-in model if left out.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=config_file.load,
            help="YAML file with flags of this command as keys; what stands on the command line wins.",
        ),
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
        str,
        typer.Option(
            metavar=config_file.JSON, help="Media items of each kind in one request, for example '{\"image\": 8}'."
        ),
    ] = '{"image": 32, "video": 4, "audio": 4}',
    media_io_kwargs: Annotated[
        str,
        typer.Option(
            metavar=config_file.JSON, help='How media are read, for example \'{"video": {"num_frames": 16}}\'.'
        ),
    ] = "{}",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda (all devices in turn) or cuda:N.")] = "cpu",
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights (benchmarks).")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of dummy weights.")] = 0,
    transfer: Annotated[str, typer.Option(help="Between instances: auto, shm or nixl.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads per instance; the cores shared out if left out.")
    ] = None,
    kv_cache_gib: Annotated[float | None, typer.Option(help="KV cache of one instance in GiB.")] = None,
    embedding_cache_gib: Annotated[float, typer.Option(help="Embedding cache of one instance in GiB.")] = 0.25,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Part of a GPU's memory that an instance may fill.")
    ] = 0.9,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that decode together on one instance.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one language step.")] = 2048,
    max_encode_tokens: Annotated[int, typer.Option(help="Embedding rows of one encode step, at most.")] = 1024,
    irp: Annotated[
        bool, typer.Option("--irp/--no-irp", help="Spread the media of one request over all encode instances.")
    ] = True,
    streamed_prefill: Annotated[
        bool, typer.Option(help="Start prefill on the part of a prompt whose media are encoded.")
    ] = True,
    chunked_kv_transfer: Annotated[
        bool, typer.Option(help="Send KV to decode while the rest of the prompt is computed.")
    ] = True,
    decode_interval_ms: Annotated[
        float | None,
        typer.Option(
            help="Time per token to which answers slow down while a request waits for encoders; 30 if left out where "
            "instances share CPU cores, else 0: not at all."
        ),
    ] = None,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Compute the KV of equal beginnings once.")] = True,
    schedule: Annotated[
        str,
        typer.Option(
            help="Order of waiting requests of one kind: fcfs (first come, first served), sjf (least work first) or "
            "slo (least time left to --slo-ttft-ms or to their deadline first)."
        ),
    ] = "fcfs",
    max_queue_s: Annotated[
        float, typer.Option(help="A request that would have to wait longer than that gets 503 with Retry-After.")
    ] = 300.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Time to first token that is to be kept.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Time per output token that is to be kept.")] = None,
    recovery_timeout_s: Annotated[
        float, typer.Option(help="How long requests wait for a stage that lost its last instance.")
    ] = 30.0,
    max_media_held_mib: Annotated[
        int, typer.Option(help="Bodies and media of all requests together; beyond that they get 503 with Retry-After.")
    ] = 2048,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--no-adaptive", help="Let the roles of the instances follow the load.")
    ] = False,
    switch_timeout_s: Annotated[
        float, typer.Option(help="What runs on an instance may take that long to finish before it changes its role.")
    ] = 60.0,
    drain_timeout_s: Annotated[
        float, typer.Option(help="What runs may take that long to finish when the server is told to stop.")
    ] = 30.0,
    max_image_pixels: Annotated[int, typer.Option(help="Largest picture, decided from its header.")] = 64_000_000,
    max_body_mib: Annotated[int, typer.Option(help="Largest request body.")] = 64,
    media_fetch_timeout_s: Annotated[float, typer.Option(help="For one http(s) media URL.")] = 10.0,
    allow_private_media_hosts: Annotated[
        bool, typer.Option("--allow-private-media-hosts", help="Fetch media from private and loopback addresses too.")
    ] = False,
    allowed_local_media_path: Annotated[
        str | None, typer.Option(help="Folder that file: URLs may read from; file: is refused if left out.")
    ] = None,
    timeline: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write when every instance computed and what became of every request, for ui.perfetto.dev.",
        ),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Start an OpenAI-compatible server on any placement of encode, prefill and decode instances."""
    import asyncio

    import uvloop

    from triptych.serve import ServeOptions
    from triptych.telemetry import set_up_logging

    require(log_level in LOG_LEVELS, "log_level", f"{log_level!r} is none of {', '.join(LOG_LEVELS)}")
    set_up_logging(log_level)

    path = find_checkpoint(model, revision)
    names = tuple(served_model_name or served_names(model))
    options = checked(
        ServeOptions,
        placement=Placement.parse(placement),
        model=checked(
            ModelConfig,
            path=str(path),
            name=names[0],
            revision=revision,
            dtype=dtype,
            device=device,
            load_format=load_format,
            max_model_len=max_model_len,
            seed=seed,
        ),
        memory=checked(
            MemoryConfig,
            kv_cache_bytes=_bytes("kv_cache_gib", kv_cache_gib),
            embedding_cache_bytes=_bytes("embedding_cache_gib", embedding_cache_gib),
            gpu_memory_utilization=gpu_memory_utilization,
            prefix_caching=enable_prefix_caching,
        ),
        scheduling=checked(
            SchedulingConfig,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_encode_tokens=max_encode_tokens,
            parallel_encode=irp,
            streamed_prefill=streamed_prefill,
            chunked_kv_transfer=chunked_kv_transfer,
            decode_interval_ms=decode_interval_ms,
        ),
        server=checked(
            ServerConfig,
            host=host,
            port=port,
            api_key=api_key,
            served_model_names=names,
            limit_mm_per_prompt=_json("limit_mm_per_prompt", limit_mm_per_prompt),
            media_io_kwargs=_json("media_io_kwargs", media_io_kwargs),
            max_body_bytes=_mebibytes("max_body_mib", max_body_mib),
            max_image_pixels=max_image_pixels,
            media_fetch_timeout_s=media_fetch_timeout_s,
            allow_private_media_hosts=allow_private_media_hosts,
            allowed_local_media_path=allowed_local_media_path,
        ),
        transfer=transfer,
        threads=threads,
        log_level=log_level,
        timeline=timeline,
        admission=checked(
            AdmissionConfig,
            schedule=schedule,
            max_queue_s=_finite("max_queue_s", max_queue_s),
            slo_ttft_ms=_finite_if_given("slo_ttft_ms", slo_ttft_ms),
            slo_tpot_ms=_finite_if_given("slo_tpot_ms", slo_tpot_ms),
            recovery_timeout_s=_finite("recovery_timeout_s", recovery_timeout_s),
            max_media_held_bytes=_mebibytes("max_media_held_mib", max_media_held_mib),
        ),
        control=checked(
            ControlConfig,
            adaptive=adaptive,
            drain_timeout_s=_finite("drain_timeout_s", drain_timeout_s),
            switch_timeout_s=_finite("switch_timeout_s", switch_timeout_s),
        ),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options))


async def _serve(options: "ServeOptions") -> None:
    """Serves until SIGINT or SIGTERM, the first of which lets running requests finish; announces the address in the one
    line of standard output."""
    import asyncio

    from triptych.serve import Stop, serve

    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.ask)
    await serve(options, stop, lambda address: typer.echo(f"Triptych ready on {address}"))


# ---- values of parameters, which are called `name` here and in files


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not JSON") from None


def _finite(name: str, number: float) -> float:
    require(math.isfinite(number) and number > 0, name, f"{number:g} is not a finite number above 0")
    return number


def _finite_if_given(name: str, number: float | None) -> float | None:
    return None if number is None else _finite(name, number)


def _bytes(name: str, gib: float | None) -> int | None:
    return None if gib is None else max(1, int(_finite(name, gib) * GIB))


def _mebibytes(name: str, number: int) -> int:
    require(number > 0, name, f"{number} is not a whole number above 0")
    return number << 20
