"""What the caches of the instances seem to hold, so that a request goes to where its parts are.

Written when something is ordered, corrected when an instance says what it evicted. It may be wrong: whoever is asked
for something that is not there says so (`Wanted`), and it is made again.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence

from triptych.core import BlockHash, BlockHashes, InstanceId, UnitHash
from triptych.messages import Evicted

MAX_UNITS = 1 << 17  # of all instances; what was ordered and then aborted is never evicted anywhere
MAX_BLOCKS = 1 << 18  # of one instance


class Directory:
    """Units and KV blocks by hash. Forgets the oldest."""

    def __init__(self) -> None:
        self._holders: OrderedDict[UnitHash, set[InstanceId]] = OrderedDict()
        self._blocks: defaultdict[InstanceId, OrderedDict[BlockHash, None]] = defaultdict(OrderedDict)

    def holders(self, unit: UnitHash) -> set[InstanceId]:
        return self._holders.get(unit, set())

    def num_cached_blocks(self, instance: InstanceId, hashes: BlockHashes) -> int:
        """Leading blocks of a prompt whose KV the instance seems to have."""
        known = self._blocks.get(instance)
        if not known or not hashes.blocks:  # as always without prefix caching
            return 0
        return next((i for i, hash_ in enumerate(hashes.blocks) if hash_ not in known), len(hashes.blocks))

    def add_unit(self, unit: UnitHash, *instances: InstanceId) -> None:
        self._holders.setdefault(unit, set()).update(instances)
        self._holders.move_to_end(unit)
        if len(self._holders) > MAX_UNITS:
            self._holders.popitem(last=False)

    def add_blocks(self, instance: InstanceId, blocks: Sequence[BlockHash]) -> None:
        known = self._blocks[instance]
        for hash_ in reversed(blocks):  # a beginning is of use without its end, and so is forgotten after it
            known[hash_] = None
            known.move_to_end(hash_)
        while len(known) > MAX_BLOCKS:
            known.popitem(last=False)

    def drop_blocks(self, instance: InstanceId, blocks: Sequence[BlockHash]) -> None:
        for hash_ in blocks:
            self._blocks[instance].pop(hash_, None)

    def drop_unit(self, unit: UnitHash, instance: InstanceId) -> None:
        holders = self._holders.get(unit)
        if holders is not None:
            holders.discard(instance)
            if not holders:
                del self._holders[unit]

    def evicted(self, message: Evicted) -> None:
        for unit in message.units:
            self.drop_unit(unit, message.instance)
        self.drop_blocks(message.instance, message.blocks)

    def forget(self, instance: InstanceId) -> None:
        """It is gone, with everything that it held."""
        self._blocks.pop(instance, None)
        for unit in [unit for unit, holders in self._holders.items() if instance in holders]:
            self.drop_unit(unit, instance)
