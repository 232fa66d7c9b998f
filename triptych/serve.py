"""From options to a running server: the only place where cluster, controller, frontend and HTTP meet."""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import zmq
import zmq.asyncio

from triptych.cluster.local import LocalCluster
from triptych.config import InstanceConfig, MemoryConfig, ModelConfig, SchedulingConfig, ServerConfig
from triptych.control.controller import Controller
from triptych.core import InstanceId, Placement
from triptych.engine.sockets import Post
from triptych.errors import ConfigError
from triptych.messages import Ready, decode
from triptych.model.processor import Processor
from triptych.server.app import create_app
from triptych.server.frontend import Frontend
from triptych.server.operations import InstanceStatus
from triptych.telemetry import Telemetry

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
SHUTDOWN_S = 2  # for responses that are being sent


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `triptych serve` was told."""

    placement: Placement
    model: ModelConfig
    memory: MemoryConfig
    scheduling: SchedulingConfig
    server: ServerConfig
    transfer: str
    threads: int | None  # per instance; None: the cores are shared out


def instance_configs(options: ServeOptions, run_dir: Path) -> list[InstanceConfig]:
    """One configuration per instance of the placement, with the cores and the devices shared out."""
    roles = options.placement.roles
    threads = options.threads or max(1, (os.cpu_count() or 1) // len(roles))
    return [
        InstanceConfig(
            id=InstanceId(f"i{index}"),
            role=role,
            epoch=secrets.token_hex(6),
            inbox=f"ipc://{run_dir}/i{index}",
            frontend=f"ipc://{run_dir}/frontend",
            threads=threads,
            transfer=options.transfer,  # type: ignore[arg-type]
            model=msgspec.structs.replace(options.model, device=_device(options.model.device, index)),
            memory=options.memory,
            scheduling=options.scheduling,
        )
        for index, role in enumerate(roles)
    ]


async def serve(options: ServeOptions) -> None:
    """Runs until SIGINT or SIGTERM. Raises ConfigError or InstanceError if an instance cannot start."""
    listener = _listen(options.server.host, options.server.port)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with _run_dir() as run_dir, listener:
        context = zmq.asyncio.Context()
        inbox = context.socket(zmq.PULL)
        inbox.set(zmq.RCVHWM, 0)
        inbox.bind(f"ipc://{run_dir}/frontend")
        post = Post(zmq.Context(context))
        try:
            await _serve(options, run_dir, inbox, post, listener, stop)
        finally:
            post.close()
            inbox.close(linger=0)
            context.term()


async def _serve(
    options: ServeOptions,
    run_dir: Path,
    inbox: zmq.asyncio.Socket,
    post: Post,
    listener: socket.socket,
    stop: asyncio.Event,
) -> None:
    """Starts the workers first, because they take longest, then everything that lives in this process."""
    telemetry = Telemetry(options.model.name)
    controller = Controller(LocalCluster(), post)
    starting = asyncio.create_task(controller.start(instance_configs(options, run_dir), START_TIMEOUT_S))
    tasks: list[asyncio.Task[Any]] = [starting]
    try:
        processor = await asyncio.to_thread(Processor.load, options.model.path, revision=options.model.revision)
        frontend = Frontend(processor, controller, telemetry)
        controller.on_table, controller.on_lost = frontend.handle, frontend.instance_lost
        tasks.append(asyncio.create_task(_read(inbox, controller, frontend)))
        directory = partial(_statuses, controller)
        app = create_app(
            frontend, processor, options.server, telemetry, model_root=options.model.path, directory=directory
        )
        server = _Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=SHUTDOWN_S))
        serving = asyncio.create_task(server.serve([listener]))
        stopping = asyncio.create_task(stop.wait())
        tasks += [serving, stopping]
        await asyncio.wait([starting, serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _announce(options, listener)
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        frontend.close()
        server.should_exit = True
        await serving
    finally:
        await controller.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: one place decides when the whole server stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _announce(options: ServeOptions, listener: socket.socket) -> None:
    """The one line on standard output that scripts wait for."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("serving %s as %s", options.model.path, options.placement)
    sys.stdout.write(f"Triptych ready on http://{shown}:{port}\n")
    sys.stdout.flush()


def _statuses(controller: Controller) -> dict[InstanceId, InstanceStatus]:
    return {
        id: InstanceStatus(instance.config.role, instance.worker.pid, instance.state.value)
        for id, instance in controller.instances.items()
    }


async def _read(inbox: zmq.asyncio.Socket, controller: Controller, frontend: Frontend) -> None:
    """Hands every message of an instance to whom it concerns."""
    while True:
        message = decode(await inbox.recv())
        if isinstance(message, Ready):
            controller.ready(message)
        else:
            frontend.handle(message)


def _device(device: str, index: int) -> str:
    """`cuda` means all devices in turn; anything else is taken as it is."""
    if device != "cuda":
        return device
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("device: cuda asked for, but this host has no CUDA device that torch can use")
    return f"cuda:{index % count}"


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is loaded, so that a port in use is told at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(f"host, port: cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


@contextlib.contextmanager
def _run_dir() -> Iterator[Path]:
    """Holds the sockets between the processes."""
    path = Path(tempfile.mkdtemp(prefix="triptych-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
