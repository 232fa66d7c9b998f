"""Roles that follow the load, on simulated time: what `control.adaptive` does to a real cluster."""

from triptych.core import Role
from triptych.planning.allocator import PURE, Allocator, Decision, Policy
from triptych.planning.estimator import Estimator, Observation
from triptych.planning.simulation.simulator import Simulation

INTERVAL_S = 1.0


class Adaptation:
    """From now on the simulation looks at its load once a second, and switches roles where that is worth it."""

    def __init__(self, simulation: Simulation, policy: Policy | None = None, *, interval_s: float = INTERVAL_S) -> None:
        self.decisions: list[Decision] = []
        self._simulation = simulation
        self._estimator = Estimator(simulation.sizes_of(Role.D).max_num_seqs)
        self._allocator = Allocator(policy, PURE | set(simulation.roles().values()))
        self._is_switching = False
        simulation.every(interval_s, self._look)

    @property
    def switches(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.switch is not None]

    def _look(self) -> None:
        simulation = self._simulation
        router = simulation.frontend.router
        seen = Observation.of(simulation.clock.now, simulation.table, simulation.loads, router.pressure())
        estimate = self._estimator.observe(seen)
        if self._is_switching or not seen.roles:
            return
        decision = self._allocator.decide(estimate, seen)
        self.decisions.append(decision)
        if decision.switch is not None:
            self._switch(decision)

    def _switch(self, decision: Decision) -> None:
        made = decision.switch
        assert made is not None
        self._is_switching = True

        def done(steps_s: dict[str, float] | None) -> None:
            self._is_switching, now = False, self._simulation.clock.now
            if steps_s is None:
                self._allocator.failed(now)
            else:
                self._allocator.switched(made, steps_s, now)

        self._simulation.switch_role(made.instance, made.after, done)
