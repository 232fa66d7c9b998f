"""The arithmetic of a change of placement: which instance becomes what, in which order. Knows no process and no time.

An instance that switches serves nothing meanwhile, so the order matters: at every moment some other one has to serve
each stage.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from triptych.core import InstanceId, Role, unserved

Roles = tuple[Role, ...]  # sorted: a multiset


@dataclass(frozen=True)
class Switch:
    instance: InstanceId
    role: Role


@dataclass(frozen=True)
class Start:
    role: Role


@dataclass(frozen=True)
class Stop:
    instance: InstanceId


Move = Switch | Start | Stop


def plan(current: Mapping[InstanceId, Role], wanted: Sequence[Role]) -> list[Move]:
    """Moves that make the instances' roles equal `wanted`, as multisets, which has to serve every stage.

    Instances whose role is wanted stay. As many of the others as possible are switched. Where no order of switches
    would keep every stage served, one instance is started in place of a switch, and another stopped at the end. Starts
    come first and stops last, because the one only adds to what is served, and what is left after the other is wanted.
    """
    assert not unserved(wanted), f"{wanted} serve nothing of {unserved(wanted)}"
    wanted_counts, current_counts = Counter(wanted), Counter(current.values())
    kept = tuple((current_counts & wanted_counts).elements())
    surplus = tuple(sorted((current_counts - wanted_counts).elements()))
    lacking = tuple(sorted((wanted_counts - current_counts).elements()))
    for num_starts in range(max(0, len(lacking) - len(surplus)), len(lacking) + 1):
        plans = []
        for started in _choices(lacking, num_starts):
            switches = _order(surplus, _without(lacking, started), frozenset(kept + started))
            if switches is not None:
                plans.append((sum(role.num_halves_to_load(target) for role, target in switches), started, switches))
        if plans:
            _, started, switches = min(plans)
            return _named(current, surplus, started, switches)
    raise AssertionError(f"no plan from {current} to {wanted}")  # starting all that lack always is one


def _order(surplus: Roles, lacking: Roles, others: frozenset[Role]) -> tuple[tuple[Role, Role], ...] | None:
    """An order of switches (from, to) that gives all of `lacking` and keeps every stage served by the remaining
    `surplus` and by `others`; None if there is none. Prefers switches that load no weights."""

    @cache
    def rest(surplus: Roles, lacking: Roles, others: frozenset[Role]) -> tuple[tuple[Role, Role], ...] | None:
        if not lacking:
            return ()
        pairs = {(role, target) for role in surplus for target in lacking}
        for role, target in sorted(pairs, key=lambda pair: (pair[0].num_halves_to_load(pair[1]), pair)):
            remaining = _without(surplus, (role,))
            if unserved({*remaining, *others}):
                continue
            behind = rest(remaining, _without(lacking, (target,)), others | {target})
            if behind is not None:
                return ((role, target), *behind)
        return None

    return rest(surplus, lacking, others)


def _named(
    current: Mapping[InstanceId, Role], surplus: Roles, started: Roles, switches: tuple[tuple[Role, Role], ...]
) -> list[Move]:
    """The same with instances: of those in one role the latest comes first."""
    free: dict[Role, list[InstanceId]] = {}
    for instance, role in current.items():
        free.setdefault(role, []).append(instance)
    moves: list[Move] = [Start(role) for role in started]
    moves += [Switch(free[role].pop(), target) for role, target in switches]
    stopped = _without(surplus, tuple(role for role, _ in switches))
    return moves + [Stop(free[role].pop()) for role in stopped]


def _choices(roles: Roles, number: int) -> list[Roles]:
    """The different multisets of that many of `roles`."""
    found: set[Roles] = {()}
    for _ in range(number):
        found = {tuple(sorted((*chosen, role))) for chosen in found for role in _without(roles, chosen)}
    return sorted(found)


def _without(roles: Roles, taken: Roles) -> Roles:
    return tuple(sorted((Counter(roles) - Counter(taken)).elements()))
