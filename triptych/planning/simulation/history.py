"""A simulated run as a timeline, in the form in which a server writes its own."""

from triptych.core import InstanceId, Role
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Loss, Simulation, Switch
from triptych.timeline import Timeline


def tell(timeline: Timeline, simulation: Simulation) -> None:
    """Of a simulation that has run and kept its stints."""
    _tell_roles(timeline, simulation)
    for stint in simulation.stints or ():
        timeline.step(stint.instance, stint.what, stint.began_s, stint.ended_s, stint.size)
    for number, record in enumerate(simulation.records):
        _tell_request(timeline, f"r{number}", record)


def _tell_roles(timeline: Timeline, simulation: Simulation) -> None:
    """What instances began as, and in order what became of them."""
    roles = _first_roles(simulation)
    for id, role in roles.items():
        timeline.instance(id, role.value, 0.0)
    happened: list[tuple[float, Switch | Loss]] = [(_done_s(switch), switch) for switch in simulation.switches]
    happened += [(loss.at_s, loss) for loss in simulation.losses]
    happened += [(loss.back_s, loss) for loss in simulation.losses if loss.back_s is not None]
    for at_s, what in sorted(happened, key=lambda entry: entry[0]):
        if isinstance(what, Switch):
            roles[what.instance] = what.after
            timeline.step(what.instance, f"becomes {what.after}", what.at_s + what.steps_s["drain"], at_s)
        if isinstance(what, Loss) and at_s == what.at_s:
            timeline.lost(what.instance, at_s)
        else:
            timeline.instance(what.instance, roles[what.instance].value, at_s)


def _first_roles(simulation: Simulation) -> dict[InstanceId, Role]:
    now = {id: instance.role for id, instance in simulation.instances.items()}
    return now | {switch.instance: switch.before for switch in reversed(simulation.switches)}


def _done_s(switch: Switch) -> float:
    return switch.at_s + sum(switch.steps_s.values())


def _tell_request(timeline: Timeline, request: str, record: Record) -> None:
    demand = record.demand
    timeline.queued(request, demand.at_s, prompt_tokens=demand.prompt_tokens, media=len(demand.media))
    if record.first_token_s is not None:
        timeline.first_token(request, record.first_token_s)
    if record.finished_s is not None:
        timeline.ended(request, record.finished_s, "finished", record.num_tokens)
    elif record.failed_s is not None:
        timeline.ended(request, record.failed_s, record.error or "failed", record.num_tokens)
