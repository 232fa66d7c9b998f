"""Which role switch, if any, is worth it now. Pure: it has no clock, and changes nothing.

The measure is the time in which a placement would do all that is there and all that comes within a horizon. A placement
that keeps up needs no longer than the horizon: it is left alone, however uneven it is. Of one that does not, the switch
that shortens this time most is proposed, if that is worth clearly more than what the switch costs, in the worst case
that noise permits: demand is lower than it seems where an instance would go to, or higher where it would come from, or
both by less.
"""

import math
from collections import Counter
from collections.abc import Mapping, Set

import msgspec

from triptych.core import STAGE_SETS, InstanceId, Placement, Role, Stage, unserved
from triptych.messages import Load
from triptych.planning.estimator import Estimate, Observation

PURE = frozenset({Role.E, Role.P, Role.D})
# Demand may be higher than it seems for who gives an instance, and lower for who gets it: shares of what noise permits.
# Both in full are far less likely than one of them; as likely are all errors whose squares have the same sum, and the
# worst of these decides (Hasofer and Lind, "Exact and Invariant Second-Moment Code Format", 1974).
ERRORS = [(1.0, 0.0), (math.sqrt(0.5), math.sqrt(0.5)), (0.0, 1.0)]


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What it takes to switch."""

    horizon_s: float = 30.0
    least_gain: float = 0.2  # share of the horizon that a switch must save beyond its cost
    sigmas: float = 2.0  # of noise in the demands together that must not change the decision
    reversal: float = 2.0  # so many times the gain, to undo the last switch
    reversal_s: float = 120.0  # until it is no reversal any more
    cool_down_s: float = 3.0  # after a switch
    failure_cool_down_s: float = 10.0  # after one that failed
    drain_s: float = 0.5  # until measured
    switch_weights_s: float = 0.7  # until measured, of a switch that loads another half of the model
    switch_books_s: float = 0.05  # until measured, of one that does not


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One switch, in seconds until everything is done that is there and that comes within the horizon, if the demand is
    as bad for it as noise permits."""

    instance: InstanceId
    before: Role
    after: Role
    now_s: float  # as it is
    then_s: float  # if it had been made already
    gain_s: float  # what it saves, of what is more than the horizon
    cost_s: float  # the work that is not done until it is made
    needed_s: float  # the least gain beyond the cost

    @property
    def saved_s(self) -> float:
        return self.gain_s - self.cost_s

    @property
    def is_worth_it(self) -> bool:
        return self.saved_s >= self.needed_s


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided, and every number that it follows from. `msgspec.to_builtins` makes it plain JSON."""

    at_s: float
    reason: str
    placement: str
    clear_s: float  # time to do everything that is there and that comes within the horizon
    estimate: Estimate
    candidates: list[Candidate] = []  # best first
    switch: Candidate | None = None

    def line(self) -> str:
        stages = "  ".join(
            f"{stage} demand {of.demand:.2f}+-{of.noise:.2f} backlog {of.backlog_s:.1f} s"
            for stage, of in self.estimate.stages.items()
        )
        memory = f"kv {self.estimate.memory_pressure:.0%}"
        return f"{self.placement}: {stages}  {memory}  clear {self.clear_s:.1f} s: {self.reason}"


class Allocator:
    """Decides once per estimate, and remembers what was switched, how long that took, and when."""

    def __init__(self, policy: Policy | None = None, roles: Set[Role] = PURE) -> None:
        """`roles`: what an instance may become; the pure ones, and the hybrids that the start placement has."""
        self._policy = policy or Policy()
        self._roles = sorted(roles, key=list(Role).index)
        self._last: Candidate | None = None
        self._last_at_s = 0.0
        self._rests_until_s = 0.0
        self._measured_s: dict[tuple[str, object], float] = {}

    def decide(self, estimate: Estimate, seen: Observation) -> Decision:
        """Whoever makes the switch says how it went."""
        counts = Counter(seen.roles.values())
        is_complete = not unserved(counts)  # else an instance was lost, and is restarted
        clear_s = self._clear_s(self._work_s(estimate, {}), counts) if is_complete else math.inf
        candidates = self._candidates(estimate, seen) if is_complete else []
        best = candidates[0] if candidates else None
        if not is_complete:
            chosen, reason = None, "a stage has no instance"
        elif not estimate.is_settled:
            chosen, reason = None, "too little was seen yet"
        elif best is None:
            chosen, reason = None, "no instance can be spared"
        else:
            chosen, reason = self._judge(best, clear_s, seen.at_s)
        return Decision(
            at_s=seen.at_s,
            reason=reason,
            placement=str(Placement.of(seen.roles.values())),
            clear_s=clear_s,
            estimate=estimate,
            candidates=candidates,
            switch=chosen,
        )

    def _judge(self, best: Candidate, clear_s: float, at_s: float) -> tuple[Candidate | None, str]:
        """Whether to make the best switch, and why."""
        if best.gain_s <= 0 and clear_s <= self._policy.horizon_s:
            return None, f"keeps up within {self._policy.horizon_s:g} s"
        if best.gain_s <= 0:  # what is too much may be noise, or work that instances have already
            return None, "no switch would help"
        reason = _reason(best)
        if not best.is_worth_it:
            return None, f"not worth it: {reason}"
        if at_s < self._rests_until_s:
            return None, f"rests for {self._rests_until_s - at_s:.1f} s more: {reason}"
        return best, reason

    def switched(self, made: Candidate, steps_s: Mapping[str, float], at_s: float) -> None:
        """It took that long, by steps; `drain` is the first of them. `total` may be more than their sum."""
        drain_s = steps_s.get("drain", 0.0)
        total_s = steps_s.get("total", sum(steps_s.values()))
        self._measure(("drain", made.before), drain_s)
        self._measure(("switch", made.before.num_halves_to_load(made.after) > 0), total_s - drain_s)
        self._last, self._last_at_s = made, at_s
        self._rests_until_s = at_s + self._policy.cool_down_s

    def failed(self, at_s: float) -> None:
        self._rests_until_s = at_s + self._policy.failure_cool_down_s

    def _measure(self, what: tuple[str, object], seconds: float) -> None:
        old = self._measured_s.get(what, seconds)
        self._measured_s[what] = 0.5 * (old + seconds)

    def _candidates(self, estimate: Estimate, seen: Observation) -> list[Candidate]:
        """The instance with least to give up for each pair of roles, best pair first."""
        roles, loads = seen.roles, seen.loads
        counts = Counter(roles.values())
        found: list[Candidate] = []
        for before in counts:
            instance = min((id for id in roles if roles[id] == before), key=lambda id: _held_s(loads.get(id)))
            for after in self._roles:
                if after != before and not unserved(_moved(counts, before, after)):
                    found.append(self._at_worst(instance, before, after, estimate, counts, seen.at_s))
        return sorted(found, key=lambda one: (-one.saved_s, one.before, one.after))

    def _at_worst(
        self, instance: InstanceId, before: Role, after: Role, estimate: Estimate, counts: Counter[Role], at_s: float
    ) -> Candidate:
        """With the demand as bad for it as noise permits."""
        gives, gets = set(before.stages) - set(after.stages), set(after.stages) - set(before.stages)
        cases = [dict.fromkeys(gives, more) | dict.fromkeys(gets, -less) for more, less in ERRORS]
        found = [self._candidate(instance, before, after, estimate, counts, at_s, errors) for errors in cases]
        return min(found, key=lambda one: one.saved_s)

    def _candidate(
        self,
        instance: InstanceId,
        before: Role,
        after: Role,
        estimate: Estimate,
        counts: Counter[Role],
        at_s: float,
        errors: Mapping[Stage, float],
    ) -> Candidate:
        policy = self._policy
        work_s = self._work_s(estimate, errors)
        then = _moved(counts, before, after)
        now_s = self._clear_s(work_s, counts)
        left_s = self._held_back_s(estimate, counts)
        then_s = max(self._clear_s(work_s, then), left_s)
        away_s = self._drain_s(before, estimate, counts) + self._change_s(before, after)
        delayed_s = max(self._clear_s(work_s, then, after, away_s), left_s)
        horizon_s = policy.horizon_s
        undoes = self._last is not None and (before, after) == (self._last.after, self._last.before)
        is_reversal = undoes and at_s - self._last_at_s < policy.reversal_s
        return Candidate(
            instance=instance,
            before=before,
            after=after,
            now_s=now_s,
            then_s=then_s,
            gain_s=max(now_s, horizon_s) - max(then_s, horizon_s),
            cost_s=max(delayed_s, horizon_s) - max(then_s, horizon_s),
            needed_s=policy.least_gain * horizon_s * (policy.reversal if is_reversal else 1.0),
        )

    def _work_s(self, estimate: Estimate, errors: Mapping[Stage, float]) -> dict[Stage, float]:
        """Work within the horizon by stage. A stage that violates its SLO has so much more of it. `errors`: by how much
        the estimates are too low, as shares of what noise permits."""
        work_s = {}
        for stage, of in estimate.stages.items():
            sigmas = self._policy.sigmas * errors.get(stage, 0.0)
            demand = max(0.0, of.demand + sigmas * of.noise)
            urgency = 1.0 if of.slack is None else min(2.0, max(1.0, 1.0 - of.slack))
            work_s[stage] = urgency * (of.backlog_s + demand * self._policy.horizon_s)
        return work_s

    def _clear_s(
        self, work_s: Mapping[Stage, float], counts: Counter[Role], late: Role | None = None, late_s: float = 0.0
    ) -> float:
        """The least time in which instances of these roles can do the work, each doing what it serves: no set of stages
        can be done faster than by all who serve any of them (Hall's condition, for work that can be divided). One in
        the role `late` begins only after `late_s`."""
        times = []
        for stages in STAGE_SETS:
            work = sum(work_s[stage] for stage in stages)
            number = sum(count for role, count in counts.items() if stages.intersection(role.stages))
            is_late = late is not None and bool(stages.intersection(late.stages))
            seconds = (work + late_s * is_late) / number
            times.append(min(seconds, work / (number - 1)) if is_late and number > 1 else seconds)
        return max(times)

    def _held_back_s(self, estimate: Estimate, counts: Counter[Role]) -> float:
        """What the instances of a stage have already stays theirs: it gains nothing from a new one."""
        times = []
        for stage, of in estimate.stages.items():
            number = sum(count for role, count in counts.items() if stage in role.stages)
            times.append(of.held_s / number)
        return max(times)

    def _drain_s(self, before: Role, estimate: Estimate, counts: Counter[Role]) -> float:
        """Until an instance has nothing left. Decodes go on elsewhere if there is room for them, and else end here."""
        drain_s = self._measured_s.get(("drain", before), self._policy.drain_s)
        number = sum(count for role, count in counts.items() if Stage.DECODE in role.stages)
        if Stage.DECODE in before.stages and estimate.memory_pressure * number >= number - 1:
            drain_s = max(drain_s, estimate.stages[Stage.DECODE].held_s / number)
        return drain_s

    def _change_s(self, before: Role, after: Role) -> float:
        weights = before.num_halves_to_load(after) > 0
        default = self._policy.switch_weights_s if weights else self._policy.switch_books_s
        return self._measured_s.get(("switch", weights), default)


def _reason(best: Candidate) -> str:
    return (
        f"{best.instance} from {best.before} to {best.after}: {best.now_s:.1f} s become {best.then_s:.1f} s, "
        f"gain {best.gain_s:.1f} s, cost {best.cost_s:.1f} s, needed {best.needed_s:.1f} s more"
    )


def _held_s(load: Load | None) -> float:
    return 0.0 if load is None else sum(load.work_s.values())


def _moved(counts: Counter[Role], before: Role, after: Role) -> Counter[Role]:
    return counts - Counter([before]) + Counter([after])
