"""What a candidate is worth: simulated at rates until the highest is known at which enough requests are served well."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from triptych.config import AdmissionConfig
from triptych.core import Stage
from triptych.errors import ConfigError
from triptych.latency import Objectives
from triptych.planning.search import bounds
from triptych.planning.search.load import Load
from triptych.planning.search.machines import Machines
from triptych.planning.search.space import Candidate
from triptych.planning.simulation.figures import RATE_TOLERANCE, Figures, highest_rate, meets
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Options, Simulation

SHORT_TOLERANCE = 0.05  # of rates found with short loads
GOOD_SHARE = 0.8  # of its bound: where the search for a rate begins
IDLE_SHARE = 0.05  # of the time in which a request may be served, one comes: whoever cannot do that never can
APART = 2.0  # so many times the time in which a request may be served, between two that never meet
AT_ONCE = 20.0  # so many times a load within that time, it comes all at once
ROUNDING = 1e-9
NUM_LOOKS = 100  # at a run, while requests arrive, whether it is decided
LEAST_STEP_S = 1e-3
LEAST_HALVED = 200  # requests, of which a half tells something
MAX_QUEUE_S = 3600.0  # whoever waits too long misses the objectives: nobody has to be refused for that


class _DecidedError(Exception):
    """Ends a run early."""

    def __init__(self, attains: bool) -> None:
        super().__init__()
        self.attains = attains


@dataclass(frozen=True)
class Evaluator:
    """Of candidates for one load. Deterministic; it can be sent to another process."""

    load: Load
    machines: Machines
    objectives: Objectives
    target: float  # share of the requests that must meet the objectives
    _least: dict[object, dict[frozenset[Stage], float]] = field(default_factory=dict, compare=False, repr=False)

    def misfit(self, candidate: Candidate) -> str | None:
        """Why it cannot be."""
        try:
            self.machines.sizes(candidate)
        except ConfigError as error:
            return str(error)
        return None

    def cost(self, candidate: Candidate) -> float:
        """Per hour in USD, or in GPUs where these have no price."""
        dollars = self.machines.dollars_per_hour(candidate)
        return float(candidate.num_gpus) if dollars is None else dollars

    def bound(self, candidate: Candidate, *, short: bool = False) -> float:
        """A rate that the kept one cannot exceed, or at which all requests come at once."""
        load = self._load(short)
        most = AT_ONCE * len(load.demands) / self._slack_s
        return min(most, bounds.highest_rate(candidate, self._least_work(candidate, short), load, self.objectives))

    def guess(self, candidate: Candidate) -> float:
        """About which rate it may keep."""
        guess = bounds.balanced_rate(candidate, self._least_work(candidate, short=False), self.load)
        return min(self.bound(candidate), guess)

    def _load(self, short: bool) -> Load:
        return self.load.short if short else self.load

    def _least_work(self, candidate: Candidate, short: bool) -> dict[frozenset[Stage], float]:
        batches = (candidate.max_num_seqs, candidate.max_num_batched_tokens, candidate.max_encode_tokens)
        key = (short, candidate.degrees, batches, bounds.rides(candidate))
        if key not in self._least:
            costs, load = self.machines.costs(candidate), self._load(short)
            self._least[key] = bounds.least_work(candidate, costs, load.demands, self.objectives, self.target)
        return self._least[key]

    @property
    def idle_rate(self) -> float:
        """So slow that a request that keeps the objectives hardly ever meets another one."""
        return IDLE_SHARE / self._slack_s

    @property
    def _slack_s(self) -> float:
        """The longest that a request may take."""
        objectives = self.objectives
        limits = [objectives.e2e_ms if objectives.ttft_ms is None else objectives.ttft_ms]
        assert limits[0] is not None, "TTFT or all of the time must be bounded"
        if objectives.e2e_ms is None and objectives.tpot_ms is not None:
            limits.append(objectives.tpot_ms * self.load.longest)
        return sum(limit for limit in limits if limit is not None) / 1e3

    def kept_rate(
        self,
        candidate: Candidate,
        *,
        short: bool = False,
        guess: float | None = None,
        least: float = 0.0,
        most: float = math.inf,
    ) -> float:
        """The highest rate at which the target is met; 0.0 if that is below `least`, `most` if it is above."""
        bound = min(most, self.bound(candidate, short=short))
        if bound < least:
            return 0.0
        return highest_rate(
            lambda rate: self.attains(candidate, rate, short=short),
            bound * GOOD_SHARE if guess is None else guess,
            least=min(bound, max(least, self.idle_rate)),
            most=bound,
            tolerance=SHORT_TOLERANCE if short else RATE_TOLERANCE,
        )

    def attains(self, candidate: Candidate, rate: float, *, short: bool = False) -> bool:
        """Whether enough requests meet the objectives, of all and, where they are not too few, of the later half: where
        queues grow as long as requests come, the earlier ones hide it. Simulates until that is decided."""
        simulation = self._simulation(candidate)
        try:
            self._run_watched(simulation, rate, short=short)
        except _DecidedError as decided:
            return decided.attains
        raise AssertionError("a run that is over is decided")

    def attained(self, candidate: Candidate, rate: float) -> Figures | None:
        """Figures of the whole run, or None as soon as it is known that too few requests meet the objectives."""
        simulation = self._simulation(candidate)
        try:
            self._run_watched(simulation, rate, to_its_end=True)
        except _DecidedError:
            return None
        return self._figures_of(simulation, candidate)

    def _run_watched(
        self, simulation: Simulation, rate: float, *, short: bool = False, to_its_end: bool = False
    ) -> None:
        """Raises _DecidedError as soon as what is still open does not matter; with `to_its_end` only if the objectives
        are missed."""
        demands = self._load(short).at(rate)
        step_s = max(LEAST_STEP_S, (demands[-1].at_s - demands[0].at_s) / NUM_LOOKS)

        def look() -> None:
            attains = self._decided(simulation.records, simulation.clock.now, short)
            if attains is False or (attains and not to_its_end):
                raise _DecidedError(attains)

        simulation.every(step_s, look)
        simulation.run(demands)
        look()

    def _decided(self, records: Sequence[Record], now: float, short: bool) -> bool | None:
        """Of all requests and of the later half; None while it is open."""
        tells = not short and len(records) >= LEAST_HALVED
        later = records[len(records) // 2 :] if tells else records
        parts = [self._kept(part, now) for part in (records, later)]
        return False if False in parts else None if None in parts else True

    def _kept(self, records: Sequence[Record], now: float) -> bool | None:
        """Whether enough of these meet the objectives; None while that is open."""
        ttft_ms, num_met, num_missed = self.objectives.ttft_ms, 0, 0
        num_needed = math.ceil(self.target * len(records) - ROUNDING)
        for record in records:
            if record.finished_s is not None or record.error is not None:
                met = meets(record, self.objectives)
                num_met += met
                num_missed += not met
            elif ttft_ms is not None and record.first_token_s is None:
                num_missed += (now - record.demand.at_s) * 1e3 > ttft_ms
        if num_missed > len(records) - num_needed:
            return False
        return True if num_met >= num_needed else None

    def figures(self, candidate: Candidate, rate: float) -> Figures:
        return self._figures_of(self.run(candidate, rate), candidate)

    def _figures_of(self, simulation: Simulation, candidate: Candidate) -> Figures:
        return Figures.of_run(simulation, self.objectives, self.machines.dollars_per_hour(candidate))

    def run(self, candidate: Candidate, rate: float | None, *, short: bool = False) -> Simulation:
        """To its end. Without a rate every request is alone."""
        simulation, load = self._simulation(candidate), self._load(short)
        simulation.run(load.apart(APART * self._slack_s) if rate is None else load.at(rate))
        return simulation

    def _simulation(self, candidate: Candidate) -> Simulation:
        costs, sizes = self.machines.costs(candidate), self.machines.sizes(candidate)
        return Simulation(candidate.placement, costs, sizes, self._options(candidate))

    def _options(self, candidate: Candidate) -> Options:
        admission = AdmissionConfig(
            schedule=candidate.schedule,
            max_queue_s=MAX_QUEUE_S,
            slo_ttft_ms=self.objectives.ttft_ms,
            slo_tpot_ms=self.objectives.tpot_ms,
        )
        return Options(admission=admission, parallel_encode=candidate.parallel_encode)
