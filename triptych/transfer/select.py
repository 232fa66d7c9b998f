"""The face of the transfer layer to an instance: what reaches which peer, and whether a ticket may be pulled."""

import os
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from triptych.core import InstanceId
from triptych.errors import ConfigError, InstanceError
from triptych.messages import Peer, SlabDescription, Ticket
from triptych.transfer.base import Mailbox, PullResult, Read, StaleTicketError, Transport
from triptych.transfer.nixl import NixlTransport
from triptych.transfer.shm import ShmTransport
from triptych.transfer.slab import Slab

Mode: TypeAlias = Literal["auto", "shm", "nixl"]

PULL_DEADLINE_S = 1.5  # within which an empty pull has to settle; a hung holder shows no other sign
SLOW_LINK_BYTES_PER_S = 50e6  # what else a pull is allowed to take


@dataclass(slots=True)
class _Asked:
    """A pull that is not delivered yet."""

    ticket: Ticket
    at: float
    nbytes: int = 0
    was_late: bool = False


@dataclass(frozen=True, slots=True)
class Complaint:
    """A pull from this incarnation of `holder` failed, or did not settle in time."""

    holder: InstanceId
    epoch: str
    error: str


class Transfers:
    """One per instance. Every method returns at once; reads happen on private threads.

    A pull is *settled* when no byte lands any more, whatever its outcome. `completed` delivers it then and only
    then, once: its target blocks may be reused, and `Release` may be sent. A pull whose holder hangs may never
    settle: it is never delivered, its blocks stay quarantined, and `overdue` names it. Cancelling is not offered,
    because bytes of a cancelled read still land. A one-sided read cannot see that its holder reused a block: the
    holder's lease is the only protection.
    """

    def __init__(self, slab: Slab, instance: InstanceId, epoch: str, mode: Mode, multi_host: bool = False) -> None:
        """`multi_host`: peers may be on other hosts, so that `auto` prepares for them too.

        Raises ConfigError if the mode cannot serve the slab, or if NIXL is needed and missing.
        """
        self._slab = slab
        self._instance = instance
        self._mode = mode
        self._mailbox = Mailbox()
        self._transports: dict[str, Transport] = {}
        for name in transports_for(mode, slab.device, multi_host):
            self._transports[name] = (
                ShmTransport(slab, self._mailbox)
                if name == ShmTransport.name
                else NixlTransport(slab, self._mailbox, f"{instance}-{epoch}")
            )
        self._routes: dict[InstanceId, tuple[Peer, Transport]] = {}
        self._under_way: dict[Hashable, _Asked] = {}
        self._failures: list[Complaint] = []
        self.counters: Counter[str] = Counter()  # pulls, pull_failures, pulled_bytes (asked for)

    @property
    def wake_fd(self) -> int:
        """Readable whenever `completed` has something to deliver: for the owner's poller."""
        return self._mailbox.fd

    def describe(self) -> SlabDescription:
        """Of the slab as it is carved now."""
        return SlabDescription(
            transports={name: transport.describe() for name, transport in self._transports.items()},
            host=host_id(),
            device=self._slab.device,
            base=self._slab.address,
            regions=self._slab.regions,
        )

    def connect(self, peer: Peer) -> None:
        """Idempotent. A new incarnation replaces the old one, a new carving of the same one is taken over.

        Raises InstanceError if a region that both have is laid out differently, or if no transport reaches the peer.
        A peer that is dead already is not noticed here, but by the pulls from it. The own row is ignored.
        """
        if peer.id == self._instance:
            return
        known = self._routes.get(peer.id)
        if known is not None and known[0].epoch != peer.epoch:
            self.disconnect(peer.id)
            known = None
        self._require_same_layouts(peer)
        if known is not None:
            self._routes[peer.id] = (peer, known[1])
            return
        transport = self._transports[choose(self._mode, self.describe(), peer.slab)]
        self._routes[peer.id] = (peer, transport)
        if self._slab.regions.keys() & peer.slab.regions.keys():
            transport.attach(peer)

    def disconnect(self, instance: InstanceId) -> None:
        """Idempotent. Further pulls fail; those under way go on to their end."""
        known = self._routes.pop(instance, None)
        if known is not None:
            peer, transport = known
            transport.detach(peer)

    def pull(self, key: Hashable, ticket: Ticket, blocks: list[int]) -> None:
        """Read `ticket.blocks[i]` into own block `blocks[i]` of the same region, in one go.

        `key` comes back in `completed` and must differ from those under way. Whatever is wrong with the ticket or its
        holder comes back as the error of the result.
        """
        assert key not in self._under_way, f"{key!r} is under way already"
        assert len(blocks) == len(ticket.blocks), f"{len(ticket.blocks)} blocks to read into {len(blocks)}"
        asked = self._under_way[key] = _Asked(ticket, time.monotonic())
        self.counters["pulls"] += 1
        try:
            read, transport = self._checked(key, ticket, blocks)
        except InstanceError as error:
            self._mailbox.put(PullResult(key, error))
        else:
            asked.nbytes = read.nbytes
            self.counters["pulled_bytes"] += read.nbytes
            transport.read(read)

    def completed(self) -> list[PullResult]:
        """The pulls that settled since the last call."""
        results = self._mailbox.take()
        for result in results:
            asked = self._under_way.pop(result.key)
            self.counters["pull_failures"] += result.error is not None
            if result.error is not None and not asked.was_late:
                self._complain(asked.ticket, str(result.error))
        return results

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def overdue(self, seconds: float) -> list[Hashable]:
        """Keys of the pulls that were asked for longer ago than that and are not delivered."""
        limit = time.monotonic() - seconds
        return [key for key, asked in self._under_way.items() if asked.at < limit]

    def complaints(self) -> list[Complaint]:
        """About connected peers, since the last call: each pull that failed or is late, once. To be asked right after
        `completed`: what that has not delivered counts as late, even if it settled while nobody looked."""
        now = time.monotonic()
        for asked in self._under_way.values():
            if not asked.was_late and now - asked.at > PULL_DEADLINE_S + asked.nbytes / SLOW_LINK_BYTES_PER_S:
                asked.was_late = True
                self._complain(
                    asked.ticket, f"a pull of {asked.nbytes} bytes has not settled for {now - asked.at:.1f} s"
                )
        failures, self._failures = self._failures, []
        return failures

    def _complain(self, ticket: Ticket, error: str) -> None:
        """A holder that is known to be gone, or that came back as another, is no news."""
        known = self._routes.get(ticket.holder)
        if known is not None and known[0].epoch == ticket.epoch:
            self._failures.append(Complaint(ticket.holder, ticket.epoch, error))

    def close(self) -> None:
        """Ends the threads. The slab may be closed after this."""
        for transport in self._transports.values():
            transport.close()
        self._mailbox.close()

    def _checked(self, key: Hashable, ticket: Ticket, blocks: list[int]) -> tuple[Read, Transport]:
        if ticket.holder not in self._routes:
            raise InstanceError(f"{ticket.holder} is not connected")
        peer, transport = self._routes[ticket.holder]
        if ticket.epoch != peer.epoch:
            raise StaleTicketError(f"stale ticket of {ticket.holder}: epoch {ticket.epoch}, connected {peer.epoch}")
        source, target = peer.slab.regions.get(ticket.region), self._slab.regions.get(ticket.region)
        if source is None or target is None:
            raise InstanceError(f"{peer.id if source is None else self._instance} has no region {ticket.region!r}")
        self._require_same_layouts(peer)  # again: either side may have been carved anew since
        if not all(0 <= block < source.num_blocks for block in ticket.blocks):
            raise InstanceError(f"ticket of {peer.id} names blocks outside its {source.num_blocks}: {ticket.blocks}")
        assert all(0 <= block < target.num_blocks for block in blocks), f"blocks {blocks} of {target.num_blocks}"
        return Read(key, peer, source, target, ticket.blocks, blocks), transport

    def _require_same_layouts(self, peer: Peer) -> None:
        for name in self._slab.regions.keys() & peer.slab.regions.keys():
            mine, theirs = self._slab.regions[name], peer.slab.regions[name]
            if (mine.layout, mine.block_bytes) != (theirs.layout, theirs.block_bytes):
                raise InstanceError(
                    f"region {name!r} of {peer.id} is {theirs.layout} in blocks of {theirs.block_bytes} bytes, "
                    f"here it is {mine.layout} in blocks of {mine.block_bytes}"
                )


def transports_for(mode: Mode, device: str, multi_host: bool) -> list[str]:
    """The transports that an instance offers its peers, best first. Raises ConfigError if the mode rules out all."""
    if mode == "shm" and device != "cpu":
        raise ConfigError(f"transfer: shm moves bytes in CPU memory only, and the pools are on {device}")
    if mode != "auto":
        return [mode]
    by_device = ["shm"] if device == "cpu" else ["nixl"]
    return [*by_device, "nixl"] if multi_host and device == "cpu" else by_device


def choose(mode: Mode, mine: SlabDescription, theirs: SlabDescription) -> str:
    """The transport between two slabs. Raises InstanceError if there is none."""
    usable = [name for name in ("shm", "nixl") if mode in ("auto", name)]
    if mine.host != theirs.host:
        usable = [name for name in usable if name != "shm"]
    for name in usable:
        if name in mine.transports and name in theirs.transports:
            return name
    raise InstanceError(
        f"no transport ({mode}) between {mine.device} on {mine.host} with {sorted(mine.transports)} "
        f"and {theirs.device} on {theirs.host} with {sorted(theirs.transports)}"
    )


def host_id() -> str:
    """Equal where one process can map the memory of the other: same kernel, same process numbers, same user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"
