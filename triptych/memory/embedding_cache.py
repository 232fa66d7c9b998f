"""Embeddings of encode units by content hash: referenced, then reusable until the space is needed. Knows no tensor."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from triptych.core import EncodeUnit, UnitHash, distinct
from triptych.memory.block_pool import BlockPool
from triptych.messages import PoolUsage


@dataclass(slots=True)
class Entry:
    """One unit's rows. Valid to read once `ready`; `num_references` counts everyone who relies on it.

    `writing` keeps a second writer (an encode step here, a pull from elsewhere) away while the first is at work.
    """

    blocks: list[int]
    num_references: int = 0
    writing: bool = False
    ready: bool = False


class EmbeddingCache:
    """One per instance, shared by its encode and prefill stage, so that a unit encoded here is used here uncopied.

    References are held by: a request that will splice the unit, an encode step or a pull that is writing it, a lease
    that lets another instance read it. An entry without references stays, if ready, until its blocks are needed;
    the entry that became unreferenced first goes first.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self._pool = BlockPool(num_blocks)
        self._block_tokens = block_tokens
        self._entries: dict[UnitHash, Entry] = {}
        self._unreferenced: OrderedDict[UnitHash, Entry] = OrderedDict()
        self._num_reusable = 0  # blocks of unreferenced entries
        self.evicted: list[UnitHash] = []  # since somebody emptied it
        self.num_evicted = 0
        self.num_hits = 0  # units that a stage needed and found ready

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    def num_blocks_of(self, unit: EncodeUnit) -> int:
        return -(-unit.num_tokens // self._block_tokens)

    def find(self, unit: UnitHash) -> Entry | None:
        return self._entries.get(unit)

    def is_ready(self, unit: UnitHash) -> bool:
        entry = self._entries.get(unit)
        return entry is not None and entry.ready

    def can_hold(self, units: Iterable[EncodeUnit]) -> bool:
        """Whether all of `units` can be referenced at once beside what is referenced now. Changes nothing."""
        missing = sum(
            self.num_blocks_of(unit)
            for unit in distinct(units)
            if unit.hash not in self._entries or unit.hash in self._unreferenced
        )
        return missing <= self._pool.num_free + self._num_reusable

    def hold(self, unit: EncodeUnit) -> Entry:
        """Takes a reference, on the entry that is there or on a new one with its own blocks, evicting the oldest
        unreferenced entries for them. The caller asked `can_hold` first."""
        entry = self._entries.get(unit.hash)
        if entry is None:
            self._evict_until_free(self.num_blocks_of(unit))
            entry = self._entries[unit.hash] = Entry(self._pool.allocate(self.num_blocks_of(unit)))
        elif entry.num_references == 0:
            del self._unreferenced[unit.hash]
            self._num_reusable -= len(entry.blocks)
        entry.num_references += 1
        return entry

    def release(self, unit: UnitHash) -> None:
        """Gives one reference back. The last one leaves a ready entry cached and frees one that never became ready."""
        entry = self._entries[unit]
        assert entry.num_references > 0, f"unit {unit.hex()} released more often than held"
        entry.num_references -= 1
        if entry.num_references == 0:
            if entry.ready:
                self._unreferenced[unit] = entry
                self._num_reusable += len(entry.blocks)
            else:
                self._drop(unit)

    def usage(self) -> PoolUsage:
        return PoolUsage(
            total=self._pool.num_blocks,
            free=self._pool.num_free,
            used=self._pool.num_held - self._num_reusable,
            cached=self._num_reusable,
        )

    def check_integrity(self) -> None:
        self._pool.check_integrity()
        in_entries = sum(len(entry.blocks) for entry in self._entries.values())
        assert in_entries == self._pool.num_held, (
            f"entries hold {in_entries} blocks, the pool says {self._pool.num_held}"
        )
        idle = {hash_ for hash_, entry in self._entries.items() if entry.num_references == 0}
        assert idle == set(self._unreferenced), (
            f"{len(idle)} entries without references, {len(self._unreferenced)} listed"
        )
        cached = sum(len(entry.blocks) for entry in self._unreferenced.values())
        assert cached == self._num_reusable, f"unreferenced entries hold {cached} blocks, counted {self._num_reusable}"
        assert all(entry.ready for entry in self._unreferenced.values()), "an unready entry is kept without references"

    def _evict_until_free(self, num_blocks: int) -> None:
        while not self._pool.can_allocate(num_blocks):
            assert self._unreferenced, f"{num_blocks} blocks asked, {self._pool.num_free} free, nothing left to evict"
            oldest = next(iter(self._unreferenced))
            self._drop(oldest)
            self.evicted.append(oldest)
            self.num_evicted += 1

    def _drop(self, unit: UnitHash) -> None:
        entry = self._entries.pop(unit)
        if self._unreferenced.pop(unit, None) is not None:
            self._num_reusable -= len(entry.blocks)
        self._pool.free(entry.blocks)


class EmbeddingShare:
    """A stage's part in an embedding cache: it never references more than `max_blocks` blocks at once.

    An instance that encodes and prefills gives each stage a share. So two instances that encode for each other can
    never fill both their caches with reservations and wait for space in the other's for ever.
    """

    def __init__(self, cache: EmbeddingCache, max_blocks: int) -> None:
        self.cache = cache
        self.max_blocks = max_blocks
        self._references: Counter[UnitHash] = Counter()
        self._num_blocks = 0

    def can_hold(self, units: Sequence[EncodeUnit]) -> bool:
        new = sum(self.cache.num_blocks_of(unit) for unit in distinct(units) if unit.hash not in self._references)
        return self._num_blocks + new <= self.max_blocks and self.cache.can_hold(units)

    def hold(self, unit: EncodeUnit) -> Entry:
        entry = self.cache.hold(unit)
        if unit.hash not in self._references:
            self._num_blocks += len(entry.blocks)
        self._references[unit.hash] += 1
        return entry

    def release(self, unit: UnitHash) -> None:
        assert self._references[unit] > 0, f"unit {unit.hex()} released by a stage that does not hold it"
        self._references[unit] -= 1
        if self._references[unit] == 0:
            del self._references[unit]
            entry = self.cache.find(unit)
            assert entry is not None
            self._num_blocks -= len(entry.blocks)
        self.cache.release(unit)
