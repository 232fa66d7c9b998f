"""What a simulated run comes to: latencies, throughput, attainment, goodput, cost, idle instances.

The definitions are those of `triptych bench` (`triptych.latency`); what it measures, is simulated here.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from triptych.core import Role
from triptych.latency import Latencies, Objectives, Percentiles, milliseconds
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Simulation

RATE_TOLERANCE = 0.01  # of a rate that is looked for


class Figures(Latencies, frozen=True, kw_only=True):
    """Of one run. Requests that were refused count as missing their objectives.

    ITL is told as if the tokens of an answer came at an even pace: the simulator makes decode steps in rows.
    """

    duration_s: float  # first arrival to last token
    sent_per_s: float | None  # requests that came, while they came; None: all at once
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    slo_attainment: float | None  # share of requests that met every objective given
    goodput_requests_per_s: float | None  # of those only
    dollars_per_hour: float | None
    dollars_per_1000_met: float | None  # of the time in which requests came; None: none met its objectives, or no price
    idle: dict[str, float]  # share of the time, by role

    @classmethod
    def of_run(
        cls, simulation: Simulation, objectives: Objectives | None = None, dollars_per_hour: float | None = None
    ) -> "Figures":
        """Of a simulation that has run."""
        records = simulation.records
        good = [record for record in records if record.error is None]
        duration_s, sent_per_s = _duration_s(records), _sent_per_s(records)
        num_met = sum(meets(record, objectives) for record in good) if objectives else None
        return cls(
            num_requests=len(records),
            num_failed=len(records) - len(good),
            ttft_ms=milliseconds(record.ttft_s for record in good),
            tpot_ms=milliseconds(record.tpot_s for record in good),
            itl_ms=Percentiles.of_repeated(
                (record.tpot_s * 1e3, record.num_tokens - 1) for record in good if record.tpot_s is not None
            ),
            e2e_ms=milliseconds(record.latency_s for record in good),
            duration_s=duration_s,
            sent_per_s=None if math.isinf(sent_per_s) else sent_per_s,
            requests_per_s=_per(len(good), duration_s),
            prompt_tokens_per_s=_per(sum(record.demand.prompt_tokens for record in good), duration_s),
            output_tokens_per_s=_per(sum(record.num_tokens for record in good), duration_s),
            slo_attainment=None if num_met is None else num_met / max(1, len(records)),
            goodput_requests_per_s=None if num_met is None else _per(num_met, duration_s),
            dollars_per_hour=dollars_per_hour,
            dollars_per_1000_met=_dollars_per_1000(num_met, len(records) / sent_per_s or duration_s, dollars_per_hour),
            idle=idle_shares(simulation),
        )


def meets(record: Record, objectives: Objectives) -> bool:
    """False of a request that was refused."""
    if record.error is not None or record.finished_s is None:
        return False
    return objectives.met(record.ttft_s, record.tpot_s, record.latency_s)


def idle_shares(simulation: Simulation) -> dict[str, float]:
    """Of the time that instances had a role, the part in which they computed nothing."""
    had_s = _role_times(simulation, _duration_s(simulation.records))
    return {role.value: max(0.0, 1.0 - _per(simulation.busy_s[role], had_s[role])) for role in Role if role in had_s}


def _role_times(simulation: Simulation, duration_s: float) -> dict[Role, float]:
    """Seconds that instances had each role, of all instances together. Until a switch is done it is the old one."""
    begun_s = min((record.demand.at_s for record in simulation.records), default=0.0)
    had_s: dict[Role, float] = defaultdict(float)
    for instance in simulation.instances.values():
        since_s = begun_s
        for switch in simulation.switches:
            if switch.instance == instance.id:
                done_s = switch.at_s + sum(switch.steps_s.values())
                had_s[switch.before] += done_s - since_s
                since_s = done_s
        had_s[instance.role] += max(0.0, begun_s + duration_s - since_s)
    return had_s


def highest_rate(
    attains: Callable[[float], bool],
    guess: float,
    *,
    least: float,
    most: float = math.inf,
    tolerance: float = RATE_TOLERANCE,
) -> float:
    """The highest rate at which `attains` is true, to a relative `tolerance`, taken as true below it and false above.

    `guess` is where the search begins, `most` where it ends; 0.0 if it is false at `least` already.
    """
    low, high = 0.0, math.inf
    rate = min(max(guess, least), most)
    while True:
        if attains(rate):
            low = rate
        else:
            high = rate
        if low >= most or (low and high <= low * (1 + tolerance)):
            return low
        if high <= least:
            return 0.0
        if not low:
            rate = max(least, high / 2)
        elif math.isinf(high):
            rate = min(most, low * 2)
        else:
            rate = math.sqrt(low * high)


def _duration_s(records: Sequence[Record]) -> float:
    begun = min((record.demand.at_s for record in records), default=0.0)
    ended = max((record.finished_s for record in records if record.finished_s is not None), default=begun)
    return ended - begun


def _sent_per_s(records: Sequence[Record]) -> float:
    """As many intervals as requests: the last one lasts as long as the others do."""
    times = [record.demand.at_s for record in records]
    span_s = max(times, default=0.0) - min(times, default=0.0)
    return (len(times) - 1) / span_s if span_s else math.inf


def _dollars_per_1000(num_met: int | None, seconds: float, dollars_per_hour: float | None) -> float | None:
    if not num_met or dollars_per_hour is None:
        return None
    return dollars_per_hour * seconds / 3600 * 1000 / num_met


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
