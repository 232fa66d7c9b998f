"""A simulated run under the names that the server's own metrics have, so that one dashboard shows both."""

from triptych.core import FinishReason
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Simulation
from triptych.router.admission import REFUSALS
from triptych.telemetry import InstanceSample, Telemetry


def tell(telemetry: Telemetry, simulation: Simulation) -> None:
    """Of a simulation that has run: every request, and the instances as they are at the end."""
    for record in simulation.records:
        _tell_request(telemetry, record)
    samples = {}
    for id, instance in simulation.instances.items():
        load = instance.load()
        pools = {name: (p.total, p.free, p.used, p.cached) for name, p in load.pools.items()}
        samples[str(id)] = InstanceSample(instance.role.value, load.queues, pools, load.counters)
    telemetry.instances(samples)


def _tell_request(telemetry: Telemetry, record: Record) -> None:
    if record.error is not None:
        telemetry.refused(REFUSALS[record.error])
        return
    telemetry.first_token(record.ttft_s, record.demand.prompt_tokens)
    for _ in range(record.num_tokens - 1):
        assert record.tpot_s is not None
        telemetry.next_token(record.tpot_s)
    telemetry.finished(FinishReason.LENGTH, record.latency_s, record.demand.prompt_tokens, record.num_tokens)
