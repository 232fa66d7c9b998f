"""From options to a running server: the only place where cluster, controller, frontend and HTTP meet."""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette

from triptych.cluster.local import LocalCluster
from triptych.config import (
    ENCODE_NICENESS,
    AdmissionConfig,
    ControlConfig,
    Count,
    InstanceConfig,
    MemoryConfig,
    ModelConfig,
    SchedulingConfig,
    ServerConfig,
    TransferMode,
    decode_interval_ms,
)
from triptych.control.changes import MAX_INSTANCES
from triptych.control.controller import Controller
from triptych.control.instances import Cluster
from triptych.core import InstanceId, Placement, Role, Stage
from triptych.engine.pools import fitting_model_len
from triptych.engine.sockets import Inbox, Post, make_context, room_for_clients
from triptych.errors import ConfigError, InstanceError
from triptych.messages import Alive, Ready, Switched, Unreachable
from triptych.model.processor import Processor
from triptych.server.app import create_app
from triptych.server.frontend import Frontend
from triptych.server.running import bind, make_http_server
from triptych.telemetry import Telemetry
from triptych.timeline import Timeline, timeline_file

logger = logging.getLogger(__name__)


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `triptych serve` was told."""

    placement: Placement
    model: ModelConfig
    memory: MemoryConfig
    scheduling: SchedulingConfig
    server: ServerConfig
    transfer: TransferMode
    threads: Count | None  # per instance; None: the cores are shared out
    admission: AdmissionConfig = AdmissionConfig()
    control: ControlConfig = ControlConfig()
    log_level: str = "info"
    timeline: str | None = None  # file for what happens when


def instance_config(
    options: ServeOptions, run_dir: Path, id: InstanceId, slot: int, role: Role, roles: Sequence[Role]
) -> InstanceConfig:
    """Of a new incarnation of `id`, with its share of cores and devices among instances of these `roles`.

    On CPU an instance that only encodes yields a little to those that answer, and where there are more threads than
    cores, those make decode steps at intervals while it has work for them. Shares are given when a process starts and
    when it changes its role; the others keep theirs meanwhile.
    """
    cores, on_cpu = len(os.sched_getaffinity(0)), options.model.device == "cpu"
    fair = options.threads or max(1, cores // len(roles))
    # Who prefills knows when encoders work for it: at other times it may use the cores that they leave idle.
    alone = options.threads or max(fair, cores // max(1, sum(other is not Role.E for other in roles)))
    scheduling = options.scheduling
    if scheduling.decode_interval_ms is None and on_cpu:
        interval_ms = decode_interval_ms(len(roles), fair, cores)
        scheduling = msgspec.structs.replace(scheduling, decode_interval_ms=interval_ms)
    epoch = secrets.token_hex(6)
    return InstanceConfig(
        id=id,
        role=role,
        epoch=epoch,
        server_pid=os.getpid(),
        inbox=f"ipc://{run_dir}/{id}-{epoch}",
        frontend=f"ipc://{run_dir}/frontend",
        threads=alone if Stage.PREFILL in role.stages else fair,
        threads_beside_encoders=fair,
        niceness=ENCODE_NICENESS if on_cpu and role is Role.E else 0,
        transfer=options.transfer,
        model=msgspec.structs.replace(options.model, device=_device(options.model.device, slot)),
        memory=options.memory,
        scheduling=scheduling,
        log_level=options.log_level,
        black_box=f"{run_dir}/{id}-{epoch}.box",
        timeline=options.timeline is not None,
    )


class Stop:
    """How a server is told to end: `ask` once, and what runs is finished first; once more, and it is not."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.asked_again = asyncio.Event()

    def ask(self) -> None:
        (self.asked_again if self.asked.is_set() else self.asked).set()


async def serve(
    options: ServeOptions, stop: Stop, on_ready: Callable[[str], None], *, cluster: Cluster | None = None
) -> None:
    """Runs until `stop` is asked for, or until an instance cannot start: then raises ConfigError or InstanceError.

    `on_ready` gets the address once, when every stage has an active instance. `cluster` is where instances run: by
    default in processes of this host.
    """
    max_model_len = await asyncio.to_thread(fitting_model_len, options.model, options.memory)
    options = msgspec.structs.replace(
        options, model=msgspec.structs.replace(options.model, max_model_len=max_model_len)
    )
    with (
        _timeline(options.timeline) as timeline,
        _run_dir() as run_dir,
        _listen(options.server.host, options.server.port) as listener,
    ):
        context = make_context(len(options.placement.roles))
        inbox, post = Inbox(context, f"ipc://{run_dir}/frontend"), Post(context)
        configure = partial(instance_config, options, run_dir)
        controller = Controller(cluster or LocalCluster(), post, configure, options.control)
        try:
            await _Running(options, controller, inbox, listener, timeline).until(stop, on_ready)
        finally:
            post.close()
            inbox.close()
            context.term()


class _Running:
    """The parts of one server, and the tasks that keep them going."""

    def __init__(
        self,
        options: ServeOptions,
        controller: Controller,
        inbox: Inbox,
        listener: socket.socket,
        timeline: Timeline | None,
    ) -> None:
        self._options = options
        self._timeline = timeline
        self._inbox = inbox
        self._listener = listener
        self._controller = controller
        # The workers take longest, so they start while this process is still loading its own part.
        self._tasks: list[asyncio.Task[Any]] = []
        self._starting = self._task(controller.start(options.placement.roles))

    async def until(self, stop: Stop, on_ready: Callable[[str], None]) -> None:
        try:
            await self._serve(stop, on_ready)
        finally:
            await self._controller.stop()
            asyncio.get_running_loop().remove_reader(self._inbox.fd)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, stop: Stop, on_ready: Callable[[str], None]) -> None:
        """Until the server is to stop. A failure of any part on the way is raised at once."""
        building, stopping = self._task(self._build_app()), self._task(stop.asked.wait())
        if not await _first(building, self._starting, stopping):
            return
        frontend, app = building.result()
        num_instances = max(len(self._options.placement.roles), MAX_INSTANCES)
        http = make_http_server(app, shutdown_s=1, max_connections=room_for_clients(num_instances))
        serving = self._task(http.serve([self._listener]))
        try:
            if await _first(self._starting, serving, stopping):
                self._controller.open(frontend)
                if self._options.control.adaptive:
                    self._controller.adapt(frontend, self._options.scheduling.max_num_seqs)
                on_ready(_address(self._listener))
                if await _first(serving, stopping):
                    raise InstanceError("the HTTP server ended by itself")
                await self._drain(frontend, serving, stop)
        finally:
            frontend.close()
            http.should_exit = True
            await serving

    async def _drain(self, frontend: Frontend, serving: asyncio.Task[Any], stop: Stop) -> None:
        """No new request; those that run are finished, unless they take too long, or nobody wants to wait for them."""
        await self._controller.drain()
        frontend.drain()
        ways = [self._task(frontend.drained()), self._task(stop.asked_again.wait()), serving]
        drain_timeout_s = self._options.control.drain_timeout_s
        done, _ = await asyncio.wait(ways, timeout=drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ways[0] not in done:
            why = "was told again" if done else f"waited {drain_timeout_s:g} s"
            logger.warning("stopping before every request was answered: %s", why)

    async def _build_app(self) -> tuple[Frontend, Starlette]:
        model, server = self._options.model, self._options.server
        processor = await asyncio.to_thread(Processor.load, model.path, revision=model.revision)
        telemetry = Telemetry(model.name)
        frontend = Frontend(
            processor,
            self._controller,
            telemetry,
            parallel_encode=self._options.scheduling.parallel_encode,
            max_num_seqs=self._options.scheduling.max_num_seqs,
            prefix_caching=self._options.memory.prefix_caching,
            admission=self._options.admission,
            timeline=self._timeline,
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
            control=self._controller,
        )
        gc.collect()
        gc.freeze()  # what is loaded stays: a full collection over it would stop all streams for 0.7 s
        return frontend, app

    def _read_for(self, frontend: Frontend) -> None:
        """Hands every message of an instance to whom it concerns, from now on."""

        def drain() -> None:
            for message in self._inbox.receive():
                if isinstance(message, Ready | Switched | Alive | Unreachable):
                    self._controller.handle(message)
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


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _device(device: str, slot: int) -> str:
    """`cuda` means all devices in turn; anything else is taken as it is."""
    if device != "cuda":
        return device
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("device: cuda asked for, but this host has no CUDA device that torch can use")
    return f"cuda:{slot % count}"


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is loaded, so that a port in use is told at once."""
    try:
        return bind(host, port)
    except OSError as error:
        hint = "; take another port" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"host, port: cannot listen on {host}:{port}: {error.strerror}{hint}") from error


def _timeline(path: str | None) -> contextlib.AbstractContextManager[Timeline | None]:
    """From the first moment on, so that a file that cannot be written is told at once."""
    return contextlib.nullcontext() if path is None else timeline_file(Path(path), "--timeline", time.monotonic())


@contextlib.contextmanager
def _run_dir() -> Iterator[Path]:
    """Holds the sockets between the processes."""
    path = Path(tempfile.mkdtemp(prefix="triptych-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
