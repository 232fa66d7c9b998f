"""A placement under a workload, as `triptych simulate` plays it: at any rate, with failures and changing roles."""

from dataclasses import dataclass, replace

from triptych.config import AdmissionConfig
from triptych.latency import Objectives
from triptych.planning.allocator import PURE
from triptych.planning.costs.profile import Profile
from triptych.planning.costs.sizes import Sizes
from triptych.planning.search.machines import ProfiledMachines, Reach
from triptych.planning.search.space import Candidate
from triptych.planning.simulation.adaptation import Adaptation
from triptych.planning.simulation.failures import Failure
from triptych.planning.simulation.figures import Figures
from triptych.planning.simulation.simulator import Options, Simulation
from triptych.planning.workloads.demand import Rows
from triptych.planning.workloads.workload import Workload


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation that has run."""

    rate: float | None  # None: as the workload says
    simulation: Simulation
    figures: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything but the rate."""

    where: str  # of the workload, for messages
    workload: Workload
    rows_of: Rows
    profile: Profile
    candidate: Candidate
    objectives: Objectives
    max_queue_s: float
    failures: tuple[Failure, ...] = ()
    adaptive: bool = False
    prefix_caching: bool = True
    decode_interval_ms: float | None = None  # None: as a server sets it

    def run(self, rate: float | None, *, keeps_stints: bool = False) -> Run:
        """Raises ConfigError for a request that the model cannot take, and for a role that does not fit."""
        workload = self.workload if rate is None else self.workload.at_rate(rate, self.where)
        demands = workload.demands(self.rows_of, self.where)
        machines = ProfiledMachines({1: self.profile}, Reach.of(demands))
        machines.require_context(self.where)
        others = PURE if self.adaptive else ()
        sizes = {role: self._told(sizes) for role, sizes in machines.sizes(self.candidate, others).items()}
        simulation = Simulation(self.candidate.placement, machines.costs(self.candidate), sizes, self._options())
        if keeps_stints:
            simulation.stints = []
        if self.adaptive:
            Adaptation(simulation)
        simulation.run(demands)
        price = machines.dollars_per_hour(self.candidate)
        return Run(rate, simulation, Figures.of_run(simulation, self.objectives or None, price))

    def _told(self, sizes: Sizes) -> Sizes:
        """With what is said of them here."""
        interval_ms = sizes.decode_interval_ms if self.decode_interval_ms is None else self.decode_interval_ms
        caches = self.prefix_caching and sizes.prefix_caching
        return replace(sizes, prefix_caching=caches, decode_interval_ms=interval_ms)

    def _options(self) -> Options:
        admission = AdmissionConfig(
            schedule=self.candidate.schedule,
            max_queue_s=self.max_queue_s,
            slo_ttft_ms=self.objectives.ttft_ms,
            slo_tpot_ms=self.objectives.tpot_ms,
        )
        return Options(admission=admission, parallel_encode=self.candidate.parallel_encode, failures=self.failures)
