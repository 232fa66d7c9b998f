"""Instances that are only a slab and its transports: one in a process of its own to be read from, one here to read."""

import multiprocessing
import os
import selectors
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from triptych.core import InstanceId, LeaseId, Role
from triptych.messages import Peer, Ticket
from triptych.transfer.base import PullResult
from triptych.transfer.select import Mode, Transfers
from triptych.transfer.slab import RegionSize, Slab, slab_bytes

SIZES: dict[str, RegionSize] = {"kv": (32 << 10, 512, "kv-bfloat16"), "embedding": (4 << 10, 96, "embedding-float32")}

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch"])  # imported once for all children


class Holder:
    """A child process with a filled slab. `peer` is its row of the routing table."""

    def __init__(
        self,
        mode: Mode,
        name: str = "p0",
        epoch: str = "first",
        sizes: dict[str, RegionSize] = SIZES,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_hold, args=(theirs, mode, name, epoch, sizes, environment or {}), daemon=True
        )
        self.process.start()
        theirs.close()
        self.peer: Peer = self._receive()

    def ask(self, question: str, *arguments: Any) -> Any:
        self._connection.send((question, *arguments))
        return self._receive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def ticket(self, blocks: list[int], region: str = "kv", epoch: str | None = None) -> Ticket:
        return make_ticket(self.peer, blocks, region, epoch)

    def _receive(self) -> Any:
        assert self._connection.poll(60), "the child says nothing"
        return self._connection.recv()


class Reader:
    """An instance in this process."""

    def __init__(self, mode: Mode, sizes: dict[str, RegionSize] = SIZES, name: str = "d0") -> None:
        epoch = f"{os.getpid()}-{time.monotonic_ns()}"
        self.slab = Slab(f"triptych-test-{name}-{epoch}", slab_bytes(sizes))
        self.slab.carve(sizes)
        self.id = InstanceId(name)
        self.transfers = Transfers(self.slab, self.id, epoch, mode)

    def region(self, name: str = "kv") -> torch.Tensor:
        """uint8 [num_blocks, block_bytes]"""
        return self.slab.region_tensor(name).view(-1, self.slab.regions[name].block_bytes)

    def wait(self, count: int = 1, timeout_s: float = 10) -> list[PullResult]:
        """The next `count` results or, when time is up, those that came."""
        results: list[PullResult] = []
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.transfers.wake_fd, selectors.EVENT_READ)
            while len(results) < count and (left := deadline - time.monotonic()) > 0:
                selector.select(left)
                results += self.transfers.completed()
        return results

    def has(self, peer: Peer, source: list[int], target: list[int], region: str = "kv") -> bool:
        expected = content(peer.epoch, region, source, self.slab.regions[region].block_bytes)
        return torch.equal(self.region(region)[target], expected)

    def close(self) -> None:
        self.transfers.close()
        self.slab.close()


@contextmanager
def holding(mode: Mode, **options: Any) -> Iterator[Holder]:
    holder = Holder(mode, **options)
    try:
        yield holder
    finally:
        holder.kill()


@contextmanager
def reading(mode: Mode, *holders: Holder, **options: Any) -> Iterator[Reader]:
    reader = Reader(mode, **options)
    for holder in holders:
        reader.transfers.connect(holder.peer)
    try:
        yield reader
    finally:
        reader.close()


def make_ticket(peer: Peer, blocks: list[int], region: str = "kv", epoch: str | None = None) -> Ticket:
    return Ticket(peer.id, epoch or peer.epoch, LeaseId(1), region, blocks, 0)


def content(epoch: str, region: str, blocks: list[int], block_bytes: int) -> torch.Tensor:
    """What stands in these blocks of a holder: bytes that depend on incarnation, region, block and place."""
    seed = sum(map(ord, epoch + region))
    return (torch.arange(block_bytes) * 31 + torch.tensor(blocks)[:, None] * 17 + seed).remainder(251).to(torch.uint8)


def _hold(
    connection: Connection,
    mode: Mode,
    name: str,
    epoch: str,
    sizes: dict[str, RegionSize],
    environment: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    slab = Slab(f"triptych-test-{name}-{epoch}", slab_bytes(sizes))
    transfers = Transfers(slab, InstanceId(name), epoch, mode)

    def carve(sizes: dict[str, RegionSize]) -> Peer:
        slab.carve(sizes)
        for region, (block_bytes, num_blocks, _) in sizes.items():
            blocks = content(epoch, region, list(range(num_blocks)), block_bytes)
            slab.region_tensor(region).copy_(blocks.view(-1))
        return Peer(InstanceId(name), Role.P, epoch, "", transfers.describe())

    connection.send(carve(sizes))
    while True:
        match connection.recv():
            case ("carve", new_sizes):
                connection.send(carve(new_sizes))
            case ("process_time",):
                connection.send(time.process_time())
            case ("modules",):
                connection.send(sorted(sys.modules))
            case ("close",):
                transfers.close()
                slab.close()
                connection.send(None)
                return
