"""A real server inside the test process: real worker processes, real sockets, a port that the system chose."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from triptych.config import (
    AdmissionConfig,
    ControlConfig,
    MemoryConfig,
    ModelConfig,
    SchedulingConfig,
    ServerConfig,
)
from triptych.control.instances import Cluster
from triptych.core import Placement
from triptych.serve import ServeOptions, Stop, serve

MODEL = "test-model"
KV_CACHE_BYTES = 64 << 20
EMBEDDING_CACHE_BYTES = 16 << 20


def options(folder: Path, placement: str, **changes: Any) -> ServeOptions:
    """`changes` are fields of the configurations, wherever they belong: dtype="bfloat16", api_key="secret", ..."""
    parts = {
        "model": ModelConfig(path=str(folder), name=MODEL, dtype="float32", max_model_len=2048),
        "memory": MemoryConfig(kv_cache_bytes=KV_CACHE_BYTES, embedding_cache_bytes=EMBEDDING_CACHE_BYTES),
        "scheduling": SchedulingConfig(max_num_batched_tokens=256),
        "server": ServerConfig(port=0, served_model_names=(MODEL,)),
        "admission": AdmissionConfig(),
        "control": ControlConfig(),
    }
    own = {"transfer": "auto", "threads": 1}
    for field, value in changes.items():
        owners = [name for name, part in parts.items() if field in part.__struct_fields__]
        for name in owners:
            parts[name] = msgspec.structs.replace(parts[name], **{field: value})
        if not owners:
            own[field] = value
    return ServeOptions(placement=Placement.parse(placement), **parts, **own)


@contextmanager
def running(folder: Path, placement: str, *, cluster: Cluster | None = None, **changes: Any) -> Iterator[str]:
    """The base URL of a server that is ready. Everything it started has ended when the block is left.

    `cluster` is where its instances run, for those that fail on purpose.
    """
    ready: Future[str] = Future()
    loop = asyncio.new_event_loop()
    stop = Stop()

    def run() -> None:
        serving = serve(options(folder, placement, **changes), stop, ready.set_result, cluster=cluster)
        try:
            loop.run_until_complete(serving)
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=run, name=f"server-{placement}")
    thread.start()
    try:
        yield ready.result(timeout=120)
    finally:
        loop.call_soon_threadsafe(stop.ask)
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not stop"
        loop.close()


def cluster(url: str) -> dict[str, Any]:
    body: dict[str, Any] = httpx.get(f"{url}/cluster").json()
    return body


def is_idle(view: dict[str, Any]) -> bool:
    """Whether no instance has work, and every pool holds nothing but reusable content."""
    return all(
        not any(instance["queues"].values()) and all(pool["used"] == 0 for pool in instance["pools"].values())
        for instance in view["instances"]
    )


def wait_until_idle(url: str, timeout_s: float) -> dict[str, Any]:
    """Asserts that the cluster falls idle within that time; instances report every quarter of a second."""
    import time

    deadline = time.monotonic() + timeout_s
    while not is_idle(view := cluster(url)):
        assert time.monotonic() < deadline, f"not idle after {timeout_s} s: {view}"
        time.sleep(0.02)
    return view
