"""What may be bought and how it may be set: placements, degrees of tensor parallelism, bounds of steps, policies.

A role runs with one degree, and roles that serve a stage in common with the same one: so a degree belongs to a stage.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from triptych.config import Schedule
from triptych.core import Placement, Role, Stage, unserved

Family = tuple[Role, ...]  # the different roles of a placement, in the order of what they begin with
Degrees = tuple[int, int, int]  # GPUs of one instance that encodes, prefills, decodes

ROLES = (Role.E, Role.EP, Role.ED, Role.EPD, Role.P, Role.PD, Role.D)


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve."""

    placement: Placement
    degrees: Degrees = (1, 1, 1)
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_encode_tokens: int = 1024
    parallel_encode: bool = True
    streamed_prefill: bool = True
    schedule: Schedule = "fcfs"

    def degree(self, role: Role) -> int:
        """GPUs of one instance."""
        return self.degrees[list(Stage).index(role.stages[0])]

    @property
    def num_gpus(self) -> int:
        return sum(self.degree(role) for role in self.placement.roles)

    @property
    def family(self) -> Family:
        return tuple(role for role in ROLES if role in self.placement.roles)

    @property
    def is_aggregated(self) -> bool:
        return self.family == (Role.EPD,)

    def num_serving(self, stage: Stage) -> int:
        return sum(stage in role.stages for role in self.placement.roles)

    def __str__(self) -> str:
        """The placement; where an instance has several GPUs, with their number: `4e1p(2)1d(2)`."""
        counts = Counter(self.placement.roles)
        degrees = {role: f"({self.degree(role)})" if self.degree(role) > 1 else "" for role in counts}
        return "".join(f"{count}{role}{degrees[role]}" for role, count in counts.items())


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """All candidates of at most `num_gpus`. Of each option the values that are tried, the usual one first."""

    num_gpus: int
    roles: tuple[Role, ...] = ROLES
    most_roles: int = 3  # different ones in one placement
    degrees: tuple[int, ...] = (1,)
    max_num_seqs: tuple[int, ...] = (64,)
    max_num_batched_tokens: tuple[int, ...] = (2048,)
    max_encode_tokens: tuple[int, ...] = (1024,)
    parallel_encode: tuple[bool, ...] = (True,)
    streamed_prefill: tuple[bool, ...] = (True,)
    schedule: tuple[Schedule, ...] = ("fcfs",)

    @property
    def options(self) -> dict[str, tuple[Any, ...]]:
        """What is chosen beside the placement."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def families(self) -> list[Family]:
        """Sets of roles that serve every stage."""
        roles = [role for role in ROLES if role in self.roles]
        sizes = range(1, self.most_roles + 1)
        return [family for size in sizes for family in itertools.combinations(roles, size) if not unserved(family)]

    def bases(self) -> Iterator[Candidate]:
        """Every placement with every degree, all other options as usual."""
        usual = {name: values[0] for name, values in self.options.items()}
        for family in self.families:
            for degrees in self._degrees(family):
                for counts in self._counts([degrees[_first(role)] for role in family], self.num_gpus):
                    yield Candidate(placement=_placement(family, counts), degrees=degrees, **usual)

    def aggregated(self) -> list[Candidate]:
        """As many instances as there may be that do everything, with every degree, all other options as usual."""
        placements = ((degree, Placement((Role.EPD,) * (self.num_gpus // degree))) for degree in self.degrees)
        usual = {name: values[0] for name, values in self.options.items()}
        return [
            Candidate(placement=placement, degrees=(degree,) * 3, **usual)
            for degree, placement in placements
            if placement.roles
        ]

    def candidates(self) -> Iterator[Candidate]:
        """All of them, none twice."""
        names, values = list(self.options), list(self.options.values())
        for base in self.bases():
            for chosen in itertools.product(*values):
                candidate = msgspec.structs.replace(base, **dict(zip(names, chosen, strict=True)))
                if candidate == self.plain(candidate):
                    yield candidate

    def plain(self, candidate: Candidate) -> Candidate:
        """The usual value for options that make no difference: nothing is spread over a single encoder."""
        if candidate.num_serving(Stage.ENCODE) == 1:
            return msgspec.structs.replace(candidate, parallel_encode=self.parallel_encode[0])
        return candidate

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """Those that differ in one option, or in one instance that is moved, added or left out."""
        for name, values in self.options.items():
            for value in values:
                if value != getattr(candidate, name):
                    yield self.plain(msgspec.structs.replace(candidate, **{name: value}))
        for base in self.bases():
            if base.degrees == candidate.degrees and _distance(base.placement, candidate.placement) == 1:
                options = {name: getattr(candidate, name) for name in OPTIONS}
                yield self.plain(msgspec.structs.replace(base, **options))

    # ---- as points of a search

    def at(self, point: Mapping[str, Any]) -> Candidate | None:
        """What a point stands for: a family, GPUs, and how its roles split them. None where they are too few.

        `split_0` and so on are the shares, from 0 to 1, that each role but the last takes of what it may take.
        """
        family = self.families[point["family"]]
        degrees = _shared(family, [point[f"degree_{stage}"] for stage in Stage])
        sizes = [degrees[_first(role)] for role in family]
        left = point["gpus"] - sum(sizes)
        if left < 0:
            return None
        counts = []
        for index, size in enumerate(sizes[:-1]):
            extra = min(left // size, int(point[f"split_{index}"] * (left // size + 1)))
            counts.append(1 + extra)
            left -= extra * size
        counts.append(1 + left // sizes[-1])
        options = {name: point[name] for name in OPTIONS}
        return self.plain(Candidate(placement=_placement(family, counts), degrees=degrees, **options))

    def point(self, candidate: Candidate) -> dict[str, Any]:
        """One that stands for the candidate."""
        family, counts = candidate.family, Counter(candidate.placement.roles)
        sizes = [candidate.degree(role) for role in family]
        point: dict[str, Any] = {"family": self.families.index(family), "gpus": candidate.num_gpus}
        point |= {f"degree_{stage}": degree for stage, degree in zip(Stage, candidate.degrees, strict=True)}
        left = candidate.num_gpus - sum(sizes)
        for index in range(self.most_roles - 1):
            share = 0.5
            if index < len(family) - 1:
                extra = counts[family[index]] - 1
                share = (extra + 0.5) / (left // sizes[index] + 1)
                left -= extra * sizes[index]
            point[f"split_{index}"] = share
        return point | {name: getattr(candidate, name) for name in OPTIONS}

    def _degrees(self, family: Family) -> list[Degrees]:
        """Every choice of degrees that roles with a stage in common can share."""
        choices = itertools.product(self.degrees, repeat=len(Stage))
        return sorted({_shared(family, choice) for choice in choices})

    def _counts(self, sizes: Sequence[int], num_gpus: int) -> Iterator[tuple[int, ...]]:
        """Numbers of instances of these sizes, at least one of each."""
        first, *others = sizes
        room = num_gpus - sum(others)
        if not others:
            yield from ((count,) for count in range(1, num_gpus // first + 1))
            return
        for count in range(1, room // first + 1):
            for rest in self._counts(others, num_gpus - count * first):
                yield (count, *rest)


OPTIONS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_encode_tokens",
    "parallel_encode",
    "streamed_prefill",
    "schedule",
)


def _shared(family: Family, degrees: Sequence[int]) -> Degrees:
    """Stages that are served together get the degree of the first of them."""
    leaders = list(range(len(Stage)))
    for _ in Stage:  # a chain such as ep, pd takes more than one round
        for role in family:
            indices = [list(Stage).index(stage) for stage in role.stages]
            lowest = min(leaders[index] for index in indices)
            for index in indices:
                leaders[index] = lowest
    encode, prefill, decode = (degrees[leader] for leader in leaders)
    return encode, prefill, decode


def _first(role: Role) -> int:
    return list(Stage).index(role.stages[0])


def _placement(family: Family, counts: Sequence[int]) -> Placement:
    return Placement(tuple(role for role, count in zip(family, counts, strict=True) for _ in range(count)))


def _distance(one: Placement, other: Placement) -> int:
    """Instances that are of another role, added or left out."""
    counts, others = Counter(one.roles), Counter(other.roles)
    return max((counts - others).total(), (others - counts).total())
