"""Reads through NIXL over UCX: GPU memory, other hosts, or both. The only file that imports NIXL, and only when used.

Facts of NIXL 1.5.1 that shape this file (found by experiment, November 2026):
- Its own Python constructor makes the progress thread spin on one core; the bindings let us give it a delay, after
  which it sleeps on file descriptors. With it a holder needs no call of its own while it is read from.
- A read that has not finished and is released or whose peer is removed still lands later. So neither happens here
  before the read has ended, and if it never ends, its handle, the agent and the slab are kept for ever.
- A killed peer shows as an error of the read at once; a hung one does not show at all.
"""

import ctypes
import importlib
import logging
import time
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

from triptych.errors import ConfigError, InstanceError
from triptych.messages import Peer, RegionDescription
from triptych.transfer.base import Mailbox, Read, Transport
from triptych.transfer.slab import Slab

logger = logging.getLogger(__name__)

_PROGRESS_DELAY_US = 1000
_CLOSE_GRACE_S = 1.0

Handle: TypeAlias = int


@dataclass(slots=True)
class _Link:
    """A peer's agent, loaded here, and its regions prepared for reading."""

    agent: str
    device: str
    base: int
    regions: dict[RegionDescription, Handle] = field(default_factory=dict)
    num_posted: int = 0
    detached: bool = False  # to be removed as soon as nothing is posted


@dataclass(slots=True)
class _Posted:
    read: Read
    link: _Link
    handle: Handle
    since: float


class NixlTransport(Transport):
    """`agent` must be a name that no process of the cluster ever had: instance and epoch."""

    name = "nixl"

    def __init__(self, slab: Slab, mailbox: Mailbox, agent: str) -> None:
        """Raises ConfigError if NIXL is not installed or does not start."""
        super().__init__(slab, mailbox)
        self._nixl = _import_bindings()
        self._links: dict[tuple[str, str], _Link] = {}  # by instance and epoch
        self._own_regions: dict[RegionDescription, Handle] = {}
        self._posted: list[_Posted] = []
        try:
            self._agent = _create_agent(self._nixl, agent)
            self._registered = self._register()
            self._metadata: bytes = self._agent.getLocalMD()  # after registering: it describes what is registered
        except Exception as error:  # NIXL's errors have no common base
            raise ConfigError(f"transfer: NIXL does not start: {type(error).__name__}: {error}") from error
        self._thread.start()

    def describe(self) -> bytes:
        return self._metadata

    def _link(self, peer: Peer) -> None:
        if (peer.id, peer.epoch) not in self._links:
            agent = self._agent.loadRemoteMD(peer.slab.transports[self.name])
            name = agent.decode() if isinstance(agent, bytes) else agent
            link = _Link(name, peer.slab.device, peer.slab.base)
            self._links[peer.id, peer.epoch] = link
            self._agent.makeConnection(name, [])
            for region in peer.slab.regions.values():
                self._remote_region(link, region)

    def _unlink(self, peer: Peer) -> None:
        link = self._links.pop((peer.id, peer.epoch), None)
        if link is not None:
            link.detached = True
            self._remove_if_idle(link)

    def _start(self, read: Read) -> None:
        link = self._links[read.peer.id, read.peer.epoch]
        handle = self._agent.makeXferReq(
            self._nixl.NIXL_READ,
            self._own_region(read.target),
            np.array(read.target_blocks, dtype=np.int32),
            self._remote_region(link, read.source),
            np.array(read.source_blocks, dtype=np.int32),
        )
        posted = _Posted(read, link, handle, time.monotonic())
        link.num_posted += 1
        self._posted.append(posted)
        self._look_at(posted, self._agent.postXferReq)

    def _poll(self) -> float | None:
        for posted in tuple(self._posted):
            self._look_at(posted, self._agent.getXferStatus)
        if not self._posted:
            return None
        # A tenth of the youngest one's age: soon enough for a short read, and no load while a long one runs or hangs.
        age = time.monotonic() - max(posted.since for posted in self._posted)
        return min(max(age / 10, 20e-6), 10e-3)

    def _shut(self) -> None:
        deadline = time.monotonic() + _CLOSE_GRACE_S
        while self._posted and time.monotonic() < deadline:
            time.sleep(self._poll() or 0)
        if self._posted:
            logger.warning("%d reads never ended: their memory is kept until the process ends", len(self._posted))
            _keep_for_ever(self._agent, self._slab.tensor)
            return
        for link in self._links.values():
            self._remove(link)
        for handle in self._own_regions.values():
            self._agent.releasedDlistH(handle)
        self._agent.deregisterMem(self._registered, [])
        del self._agent

    def _look_at(self, posted: _Posted, ask: Any) -> None:
        """Post or check a read, and end it if it has ended. NIXL raises for a read that ended in an error."""
        error = None
        try:
            if ask(posted.handle) == self._nixl.NIXL_IN_PROG:
                return
        except Exception as raised:  # NIXL's errors have no common base
            error = InstanceError(f"reading from {posted.read.peer.id}: {type(raised).__name__}: {raised}")
        self._agent.releaseXferReq(posted.handle)
        self._posted.remove(posted)
        posted.link.num_posted -= 1
        self._remove_if_idle(posted.link)
        self._finish(posted.read, error)

    def _remove_if_idle(self, link: _Link) -> None:
        if link.detached and link.num_posted == 0:
            self._remove(link)

    def _remove(self, link: _Link) -> None:
        for handle in link.regions.values():
            self._agent.releasedDlistH(handle)
        self._agent.invalidateRemoteMD(link.agent)

    def _register(self) -> Any:
        row = (self._slab.address, self._slab.nbytes, _device_index(self._slab.device), "")
        registered = self._nixl.nixlRegDList(self._memory_kind(self._slab.device), [row])
        self._agent.registerMem(registered, [])
        return registered

    def _own_region(self, region: RegionDescription) -> Handle:
        if region not in self._own_regions:
            self._own_regions[region] = self._prepare(
                self._nixl.NIXL_INIT_AGENT, self._slab.device, self._slab.address, region
            )
        return self._own_regions[region]

    def _remote_region(self, link: _Link, region: RegionDescription) -> Handle:
        if region not in link.regions:
            link.regions[region] = self._prepare(link.agent, link.device, link.base, region)
        return link.regions[region]

    def _prepare(self, agent: str, device: str, base: int, region: RegionDescription) -> Handle:
        size = region.block_bytes
        # One row of NIXL's strided form: address, length, device, stride, count.
        rows = np.array([[base + region.offset, size, _device_index(device), size, region.num_blocks]], dtype=np.uint64)
        handle: Handle = self._agent.prepXferDlist(agent, self._memory_kind(device), rows, [])
        return handle

    def _memory_kind(self, device: str) -> Any:
        return self._nixl.DRAM_SEG if device == "cpu" else self._nixl.VRAM_SEG


def _import_bindings() -> ModuleType:
    """The wheel for this torch's CUDA; a CPU torch takes whichever is installed. Raises ConfigError if none is."""
    cuda = torch.version.cuda
    wheels = [f"nixl_cu{cuda.split('.')[0]}"] if cuda else ["nixl_cu13", "nixl_cu12"]
    for wheel in wheels:
        try:
            return importlib.import_module(f"{wheel}._bindings")
        except ModuleNotFoundError:
            continue
    extra = wheels[0].replace("_", "-")
    raise ConfigError(f"transfer: NIXL is needed and not installed: pip install 'triptych[{extra}]'")


def _create_agent(nixl: ModuleType, name: str) -> Any:
    config = nixl.nixlAgentConfig()
    config.useProgThread = True
    config.useListenThread = False
    config.pthrDelay = _PROGRESS_DELAY_US
    config.captureTelemetry = False
    config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT  # created on one thread, used on another
    agent = nixl.nixlAgent(name, config)
    agent.createBackend("UCX", {})
    return agent


def _device_index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _keep_for_ever(*things: object) -> None:
    """Bytes may still land: neither the agent nor the memory may be freed, not even as the interpreter ends."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
