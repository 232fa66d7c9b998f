"""Who does what: an immutable picture of the cluster and pure pickers over it. Knows no socket and no clock."""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from triptych.core import EncodeUnit, InstanceId, Stage, UnitHash
from triptych.errors import RequestError
from triptych.messages import Peer, Table


@dataclass(frozen=True)
class RoutingTable:
    """One version of who is there, indexed by stage. Replaced whole, never changed."""

    version: int = 0
    peers: dict[InstanceId, Peer] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table) -> "RoutingTable":
        return cls(table.version, {peer.id: peer for peer in table.peers})

    def serving(self, stage: Stage) -> tuple[Peer, ...]:
        """Those that take new work."""
        return self._serving[stage]

    @cached_property
    def _serving(self) -> dict[Stage, tuple[Peer, ...]]:
        taking = [peer for peer in self.peers.values() if not peer.leaving]
        return {stage: tuple(peer for peer in taking if stage in peer.role.stages) for stage in Stage}

    @property
    def complete(self) -> bool:
        """Whether every stage has an instance."""
        return all(self.serving(stage) for stage in Stage)


Loads = Mapping[InstanceId, float]  # predicted seconds of work that an instance still has to do for a stage


def pick(table: RoutingTable, stage: Stage, loads: Loads, prefer: InstanceId | None = None) -> Peer:
    """The least loaded instance that serves `stage`; among equals `prefer`, then the first of the table.

    Raises RequestError(503) if there is none.
    """
    return _least_loaded(table.serving(stage), stage, loads, prefer)


def pick_decode(table: RoutingTable, loads: Loads, prefill: InstanceId, request_id: str) -> Peer:
    """Who decodes what `prefill` has prefilled: the least loaded; among equals `prefill` itself.

    Loads are a report old, and every instance that prefills sees the same ones: where there are several, each request
    is shown its share of those that decode, at least two, drawn by its id. Or all would choose the same one until the
    next report (the power of two choices: Mitzenmacher, IEEE TPDS 2001).

    An instance that decodes as well hands on to itself or to one that only decodes: two instances that prefill could
    each fill their KV pool with sequences that wait for space in the other's. Raises RequestError(503).
    """
    own = table.peers.get(prefill)
    candidates = table.serving(Stage.DECODE)
    if own is not None and Stage.DECODE in own.role.stages:
        candidates = tuple(peer for peer in candidates if peer is own or Stage.PREFILL not in peer.role.stages)
    share = max(-(-len(candidates) // max(len(table.serving(Stage.PREFILL)), 1)), 2)
    if share < len(candidates):
        drawn = random.Random(request_id).sample(candidates, share)
        candidates = tuple(peer for peer in candidates if peer in drawn or peer is own)
    return _least_loaded(candidates, Stage.DECODE, loads, prefill)


def _least_loaded(candidates: Sequence[Peer], stage: Stage, loads: Loads, prefer: InstanceId | None) -> Peer:
    if not candidates:
        raise RequestError(f"no instance serves {stage.name.lower()} at the moment", status=503, code="unavailable")
    return min(candidates, key=lambda peer: (loads.get(peer.id, 0.0), peer.id != prefer))


def assign_units(
    table: RoutingTable,
    units: Iterable[EncodeUnit],
    loads: Loads,
    cost_s: float,
    *,
    items: Mapping[UnitHash, bytes] = MappingProxyType({}),
    holders: Mapping[UnitHash, Collection[InstanceId]] = MappingProxyType({}),
    spread: bool = True,
) -> dict[UnitHash, InstanceId]:
    """Picks an encode instance for each distinct unit of one request.

    A unit goes to an instance that seems to hold it already (`holders`). The others are spread over all encode
    instances by cost, intra-request parallelism (section 3.2.2 of the paper): longest first onto the instance that
    would finish it earliest (Graham's LPT rule: at most 4/3 of the best makespan). Units of one of the `items` stay
    together, because whoever encodes one of them reads the whole item; an item is divided where there are two instances
    or more for each. Without `spread` all go to the least loaded one.
    `cost_s` is the predicted time of one embedding row. Raises RequestError(503) without an encode instance.
    """
    busy = dict(loads)
    assigned: dict[UnitHash, InstanceId] = {}
    able = {peer.id for peer in table.serving(Stage.ENCODE)}
    missing: dict[bytes, list[EncodeUnit]] = {}
    for unit in {unit.hash: unit for unit in units}.values():
        held = sorted(able.intersection(holders.get(unit.hash, ())))
        if held:
            assigned[unit.hash] = min(held, key=lambda id: busy.get(id, 0.0))
        else:
            missing.setdefault(items.get(unit.hash, unit.hash), []).append(unit)
    only = pick(table, Stage.ENCODE, busy).id if missing and not spread else None
    num_parts = max(len(able) // max(len(missing), 1), 1)
    parts = [part for together in missing.values() for part in _divided(together, num_parts)]
    for part in sorted(parts, key=_num_rows, reverse=True):
        chosen = only or pick(table, Stage.ENCODE, busy).id
        assigned |= dict.fromkeys((unit.hash for unit in part), chosen)
        busy[chosen] = busy.get(chosen, 0.0) + _num_rows(part) * cost_s
    return assigned


def _divided(units: list[EncodeUnit], num_parts: int) -> list[list[EncodeUnit]]:
    """Consecutive parts of about equal numbers of rows, at most so many."""
    parts: list[list[EncodeUnit]] = [[] for _ in range(num_parts)]
    total, before = _num_rows(units), 0
    for unit in units:
        middle = before + unit.num_tokens / 2
        parts[min(int(middle * num_parts / total), num_parts - 1)].append(unit)
        before += unit.num_tokens
    return [part for part in parts if part]


def _num_rows(units: list[EncodeUnit]) -> int:
    return sum(unit.num_tokens for unit in units)
