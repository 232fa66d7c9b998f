"""From options to a running server: the only place where cluster, controller, frontend and HTTP meet."""

import asyncio
import contextlib
import gc
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq
from starlette.applications import Starlette

from triptych.cluster.local import LocalCluster
from triptych.config import (
    Count,
    InstanceConfig,
    MemoryConfig,
    ModelConfig,
    SchedulingConfig,
    ServerConfig,
    TransferMode,
)
from triptych.control.controller import Controller
from triptych.core import InstanceId, Placement, Role, Stage
from triptych.engine.pools import fitting_model_len
from triptych.engine.sockets import Inbox, Post
from triptych.errors import ConfigError, InstanceError
from triptych.messages import Ready
from triptych.model.processor import Processor
from triptych.server.app import create_app
from triptych.server.frontend import Frontend
from triptych.server.operations import InstanceStatus
from triptych.server.running import bind, make_http_server
from triptych.telemetry import Telemetry

START_TIMEOUT_S = 600.0

# Time per token wants encoding to yield, time to first token of pictures wants it not to. Measured with 2e1pd on two
# cores, 8 pictures, 4 clients: at 0 decode steps take 5 times as long beside encoders, at 3 twice, at 5 and more once
# and a half, but then pictures wait for answers: so these slow down to a pace of 30 ms a token meanwhile.
ENCODE_NICENESS = 5
SHARED_DECODE_INTERVAL_MS = 30.0


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `triptych serve` was told."""

    placement: Placement
    model: ModelConfig
    memory: MemoryConfig
    scheduling: SchedulingConfig
    server: ServerConfig
    transfer: TransferMode
    threads: Count | None  # per instance; None: the cores are shared out


def instance_configs(options: ServeOptions, run_dir: Path) -> list[InstanceConfig]:
    """One configuration per instance of the placement, with the cores and the devices shared out.

    On CPU an instance that only encodes yields a little to those that answer, and where there are more threads than
    cores, those make decode steps at intervals while it has work for them.
    """
    roles, cores = options.placement.roles, len(os.sched_getaffinity(0))
    on_cpu = options.model.device == "cpu"
    fair = options.threads or max(1, cores // len(roles))
    # Who prefills knows when encoders work for it: at other times it may use the cores that they leave idle.
    alone = options.threads or max(fair, cores // sum(role is not Role.E for role in roles))
    scheduling = options.scheduling
    if scheduling.decode_interval_ms is None and on_cpu and fair * len(roles) > cores:
        scheduling = msgspec.structs.replace(scheduling, decode_interval_ms=SHARED_DECODE_INTERVAL_MS)
    return [
        InstanceConfig(
            id=InstanceId(f"i{index}"),
            role=role,
            epoch=secrets.token_hex(6),
            server_pid=os.getpid(),
            inbox=f"ipc://{run_dir}/i{index}",
            frontend=f"ipc://{run_dir}/frontend",
            threads=alone if Stage.PREFILL in role.stages else fair,
            threads_beside_encoders=fair,
            niceness=ENCODE_NICENESS if on_cpu and role is Role.E else 0,
            transfer=options.transfer,
            model=msgspec.structs.replace(options.model, device=_device(options.model.device, index)),
            memory=options.memory,
            scheduling=scheduling,
        )
        for index, role in enumerate(roles)
    ]


async def serve(options: ServeOptions, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Runs until `stop` is set, or until an instance cannot start: then raises ConfigError or InstanceError.

    `on_ready` gets the address once, when every stage has an active instance.
    """
    max_model_len = await asyncio.to_thread(fitting_model_len, options.model, options.memory)
    options = msgspec.structs.replace(
        options, model=msgspec.structs.replace(options.model, max_model_len=max_model_len)
    )
    with _run_dir() as run_dir, _listen(options.server.host, options.server.port) as listener:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        inbox, post = Inbox(context, f"ipc://{run_dir}/frontend"), Post(context)
        try:
            await _Running(options, run_dir, inbox, post, listener).until(stop, on_ready)
        finally:
            post.close()
            inbox.close()
            context.term()


class _Running:
    """The parts of one server, and the tasks that keep them going."""

    def __init__(self, options: ServeOptions, run_dir: Path, inbox: Inbox, post: Post, listener: socket.socket) -> None:
        self._options = options
        self._inbox = inbox
        self._listener = listener
        self._controller = Controller(LocalCluster(), post)
        # The workers take longest, so they start while this process is still loading its own part.
        configs = instance_configs(options, run_dir)
        self._tasks: list[asyncio.Task[Any]] = []
        self._starting = self._task(self._controller.start(configs, START_TIMEOUT_S))

    async def until(self, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
        stopping = self._task(stop.wait())
        try:
            await self._serve(stopping, on_ready)
        finally:
            await self._controller.stop()
            asyncio.get_running_loop().remove_reader(self._inbox.fd)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, stopping: asyncio.Task[Any], on_ready: Callable[[str], None]) -> None:
        """Until the server is to stop. A failure of any part on the way is raised at once."""
        building = self._task(self._build_app())
        if not await _first(building, self._starting, stopping):
            return
        frontend, app = building.result()
        http = make_http_server(app, shutdown_s=1)
        serving = self._task(http.serve([self._listener]))
        try:
            if await _first(self._starting, serving, stopping):
                self._controller.open(frontend)
                on_ready(_address(self._listener))
                if await _first(serving, stopping):
                    raise InstanceError("the HTTP server ended by itself")
        finally:
            frontend.close()
            http.should_exit = True
            await serving

    async def _build_app(self) -> tuple[Frontend, Starlette]:
        model, server = self._options.model, self._options.server
        processor = await asyncio.to_thread(Processor.load, model.path, revision=model.revision)
        telemetry = Telemetry(model.name)
        frontend = Frontend(
            processor,
            self._controller,
            telemetry,
            parallel_encode=self._options.scheduling.parallel_encode,
            prefix_caching=self._options.memory.prefix_caching,
        )
        self._read_for(frontend)
        assert model.max_model_len is not None
        app = create_app(
            frontend,
            processor,
            server,
            telemetry,
            max_model_len=model.max_model_len,
            model_root=model.path,
            directory=partial(_statuses, self._controller),
        )
        gc.collect()
        gc.freeze()  # what is loaded stays: a full collection over it would stop all streams for 0.7 s
        return frontend, app

    def _read_for(self, frontend: Frontend) -> None:
        """Hands every message of an instance to whom it concerns, from now on."""

        def drain() -> None:
            for message in self._inbox.receive():
                if isinstance(message, Ready):
                    self._controller.ready(message)
                else:
                    frontend.handle(message)

        asyncio.get_running_loop().add_reader(self._inbox.fd, drain)
        drain()

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task


async def _first(wanted: asyncio.Task[Any], *others: asyncio.Task[Any]) -> bool:
    """Waits for `wanted`; the last task means stop. False if it came first. Raises what a task that failed raised.

    A task in the middle may end well at any time: then the wait for the others goes on.
    """
    pending = {wanted, *others}
    while not wanted.done() and not others[-1].done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    return wanted.done()


def _statuses(controller: Controller) -> dict[InstanceId, InstanceStatus]:
    return {
        id: InstanceStatus(instance.config.role, instance.worker.pid, instance.state.value)
        for id, instance in controller.instances.items()
    }


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
        return bind(host, port)
    except OSError as error:
        raise ConfigError(f"host, port: cannot listen on {host}:{port}: {error.strerror}") from error


@contextlib.contextmanager
def _run_dir() -> Iterator[Path]:
    """Holds the sockets between the processes."""
    path = Path(tempfile.mkdtemp(prefix="triptych-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
