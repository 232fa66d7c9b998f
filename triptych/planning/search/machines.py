"""What the instances of a candidate cost and hold: in time, in memory, in money."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import msgspec

from triptych.config import EMBEDDING_BLOCK_TOKENS, GIB, KV_BLOCK_TOKENS
from triptych.core import Role, Stage
from triptych.errors import ConfigError
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.embedding_room import blocks_of, least_blocks
from triptych.planning.costs.profile import Profile
from triptych.planning.costs.sizes import Sizes
from triptych.planning.search.space import ROLES, Candidate
from triptych.planning.workloads.demand import Demand


class Machines(Protocol):
    """Where candidates run."""

    def costs(self, candidate: Candidate) -> Costs: ...

    def sizes(self, candidate: Candidate) -> dict[Role, Sizes]:
        """Raises ConfigError that names the role that does not fit, and why."""

    def dollars_per_hour(self, candidate: Candidate) -> float | None:
        """None where no price is known."""


@dataclass(frozen=True, slots=True)
class Reach:
    """The largest that requests of a workload are, each measure by itself."""

    prompt_tokens: int
    sequence_tokens: int  # prompt and answer
    unit_blocks: int  # of embeddings
    media_blocks: int  # of all media of one request
    has_prefixes: bool = False  # some begin alike

    @classmethod
    def of(cls, demands: Sequence[Demand]) -> "Reach":
        return cls(
            max(demand.prompt_tokens for demand in demands),
            max(demand.prompt_tokens + demand.output_tokens for demand in demands),
            max((blocks_of(rows) for demand in demands for item in demand.media for rows in item.rows), default=0),
            max(sum(blocks_of(rows) for item in demand.media for rows in item.rows) for demand in demands),
            any(demand.prefix for demand in demands),
        )


@dataclass(frozen=True, slots=True)
class ProfiledMachines:
    """By the profiles of a model on one kind of GPU, one for each degree of tensor parallelism."""

    profiles: Mapping[int, Profile]
    reach: Reach

    def costs(self, candidate: Candidate) -> Costs:
        """A stage takes what it takes at its degree; what belongs to no stage is that of prefill."""
        by_stage = {stage: self.profiles[n].costs() for stage, n in zip(Stage, candidate.degrees, strict=True)}
        changed = {
            field.name: getattr(costs, field.name)
            for stage, costs in by_stage.items()
            for field in fields(costs)
            if field.name.startswith(f"{stage.name.lower()}_")
        }
        return replace(by_stage[Stage.PREFILL], **changed)

    @property
    def shares_cores(self) -> bool:
        """Whether instances are processes on the cores of one machine, instead of GPUs."""
        return math.isfinite(self._any_profile.costs().cores)

    def sizes(self, candidate: Candidate, others: Collection[Role] = ()) -> dict[Role, Sizes]:
        """Of its roles and of `others` that its instances may get. Prefixes cost time to look for, and are looked for
        where there are any; answers slow down for pictures where instances share cores: both as `triptych serve` does
        without being told."""
        interval_ms = self._any_profile.decode_interval_ms(len(candidate.placement.roles))
        return {
            role: replace(
                self._sizes(role, candidate), prefix_caching=self.reach.has_prefixes, decode_interval_ms=interval_ms
            )
            for role in ROLES
            if role in candidate.placement.roles or role in others
        }

    @property
    def _any_profile(self) -> Profile:
        """For what they have in common."""
        return next(iter(self.profiles.values()))

    def dollars_per_hour(self, candidate: Candidate) -> float | None:
        prices = [self.profiles[candidate.degree(role)].price for role in candidate.placement.roles]
        return None if any(price is None for price in prices) else sum(price for price in prices if price is not None)

    def require_context(self, where: str) -> None:
        """Raises ConfigError for a workload with a request that is longer than the model allows. `where` names it."""
        profile = self._any_profile
        longest, context = self.reach.sequence_tokens, profile.memory.context_len
        if longest > context:
            raise ConfigError(f"{where}: a request has {longest} tokens, the context of {profile.model} is {context}")

    def embedding_bytes(self) -> float:
        """Of each instance that has embeddings: four times what the largest request needs, as an instance that encodes
        and prefills gives half of them to each, and one request is taken in while another is prefilled."""
        profile = self._any_profile
        block_bytes = EMBEDDING_BLOCK_TOKENS * profile.memory.embedding_row
        return max(GIB / 4, 4 * self.reach.media_blocks * block_bytes)

    def context_len(self, role: Role, candidate: Candidate) -> int:
        """What the model allows, or what the workload needs, where memory allows no more."""
        profile = self.profiles[candidate.degree(role)]
        try:
            self._sizes_with(profile, role, candidate)
        except ConfigError:
            return self.reach.sequence_tokens
        return profile.memory.context_len

    def _sizes(self, role: Role, candidate: Candidate) -> Sizes:
        profile = self.profiles[candidate.degree(role)]
        context_len = self.context_len(role, candidate)
        memory = msgspec.structs.replace(profile.memory, context_len=context_len)
        sizes = self._sizes_with(msgspec.structs.replace(profile, memory=memory), role, candidate)
        require_room(role, sizes, self.reach)
        return sizes

    def _sizes_with(self, profile: Profile, role: Role, candidate: Candidate) -> Sizes:
        return profile.sizes(
            role,
            kv_bytes=profile.usual_kv_bytes,
            embedding_bytes=self.embedding_bytes(),
            max_num_seqs=candidate.max_num_seqs,
            max_num_batched_tokens=candidate.max_num_batched_tokens,
            max_encode_tokens=candidate.max_encode_tokens,
            streamed_prefill=candidate.streamed_prefill,
        )


@dataclass(frozen=True, slots=True)
class FixedMachines:
    """The same costs and pools whatever the candidate, as where only times are known."""

    times: Costs
    pools: Sizes
    dollars_per_gpu_hour: float | None = None

    def costs(self, candidate: Candidate) -> Costs:
        return self.times

    def sizes(self, candidate: Candidate) -> dict[Role, Sizes]:
        sizes = replace(
            self.pools,
            max_num_seqs=candidate.max_num_seqs,
            max_num_batched_tokens=candidate.max_num_batched_tokens,
            max_encode_tokens=candidate.max_encode_tokens,
            streamed_prefill=candidate.streamed_prefill,
        )
        return dict.fromkeys(candidate.family, sizes)

    def dollars_per_hour(self, candidate: Candidate) -> float | None:
        return None if self.dollars_per_gpu_hour is None else self.dollars_per_gpu_hour * candidate.num_gpus


def require_room(role: Role, sizes: Sizes, reach: Reach) -> None:
    """Raises ConfigError unless the largest request of a workload fits into the pools of an instance of this role."""
    if role.has_language_model:
        tokens = reach.sequence_tokens if Stage.DECODE in role.stages else reach.prompt_tokens
        _require_room(role, "KV cache", tokens, sizes.num_kv_blocks * KV_BLOCK_TOKENS)
    needed = least_blocks(role, reach.unit_blocks, reach.media_blocks) * EMBEDDING_BLOCK_TOKENS
    _require_room(role, "embedding cache", needed, sizes.num_embedding_blocks * EMBEDDING_BLOCK_TOKENS)


def _require_room(role: Role, pool: str, needed: int, room: int) -> None:
    if needed > room:
        raise ConfigError(f"{role}: the largest request needs room for {needed} in the {pool}, {room} fit")
