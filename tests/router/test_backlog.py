"""What waits when nothing can be sent any more: a fault of ours, which ends requests and nothing else."""

import pytest

from tests.server.fakes import D, E, P, num_live, processor
from tests.server.scripted import Wire, answer, attempt_of, lose, num_attempts, on_loop, publish, start
from triptych.config import AdmissionConfig
from triptych.core import InstanceId, Role
from triptych.errors import RequestError
from triptych.messages import AnyMessage, Load, Submit
from triptych.router.attempts import Task
from triptych.router.dispatch import Route
from triptych.router.generation import Generation
from triptych.server.frontend import Frontend
from triptych.telemetry import Telemetry

MANY = 1200  # more than Python lets functions call each other
OTHER = InstanceId("p1")


class Breakable(Wire):
    """Raises from some moment on, which no wire may."""

    is_broken = False

    def send(self, instance: InstanceId, message: AnyMessage) -> None:
        if self.is_broken and isinstance(message, Submit):
            raise RuntimeError("the wire is broken")
        super().send(instance, message)


def make_frontend() -> tuple[Frontend, Breakable]:
    """Each prompt is a second of work, so that only as many are sent as may always go."""
    wire = Breakable()
    admission = AdmissionConfig(max_queue_s=1e9)
    frontend = Frontend(processor(), wire, Telemetry("m"), admission=admission, prefix_caching=False)
    publish(frontend, (E, Role.E), (P, Role.P), (OTHER, Role.P), (D, Role.D))
    for id in (E, P, OTHER, D):
        frontend.handle(Load(id, {}, {}, {}, {}, {"p": 0.1, "e": 0.1, "d": 0.01}))
    return frontend, wire


def sent_and_waiting(frontend: Frontend, wire: Wire) -> tuple[list[Generation], list[Generation]]:
    generations = [start(frontend, num_tokens=10) for _ in range(MANY)]
    sent = [generation for generation in generations if num_attempts(wire, generation)]
    waiting = [generation for generation in generations if generation not in sent]
    assert len(sent) > 1 and len(waiting) > MANY - 100
    return sent, waiting


@pytest.mark.parametrize("how", ["a place is free", "an instance crashed"])
def test_where_nothing_can_be_sent_each_of_many_is_told_so(how: str) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        sent, waiting = sent_and_waiting(frontend, wire)
        wire.is_broken = True
        if how == "a place is free":
            frontend.abort(sent[0])
        else:
            lose(frontend, P, suspects=[attempt_of(one) for one in sent])
        for generation in waiting:
            with pytest.raises(RequestError, match="internal server error"):
                await generation.wait()
        for generation in sent:
            frontend.abort(generation)
        assert not num_live(frontend)

    on_loop(scenario)


def test_what_cannot_be_queued_is_told_so_also_when_it_is_taken_up_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        sound, lost = start(frontend, num_tokens=10), start(frontend, num_tokens=11)
        find_route = frontend._router.dispatcher.route

        def route(task: Task, num_sequences: int = 1) -> Route:
            if task.num_tokens == 11:
                raise RuntimeError("no route")
            return find_route(task, num_sequences)

        frontend._router.dispatcher.route = route  # type: ignore[method-assign]
        asked = start(frontend, num_tokens=11)
        lose(frontend, P)
        lose(frontend, OTHER)
        publish(frontend, (E, Role.E), (P, Role.P), (D, Role.D), epoch="next")
        for generation in (asked, lost):
            with pytest.raises(RequestError, match="internal server error"):
                await generation.wait()
        answer(frontend, wire, sound.outputs[0])
        await sound.wait()
        assert not num_live(frontend)

    on_loop(scenario)
    assert "no route" in caplog.text


def test_what_is_asked_after_that_is_answered_as_ever() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        sent, _ = sent_and_waiting(frontend, wire)
        wire.is_broken = True
        for generation in sent:
            frontend.abort(generation)
        wire.is_broken = False
        assert num_attempts(wire, start(frontend, num_tokens=10)) == 1

    on_loop(scenario)
