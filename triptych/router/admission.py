"""Whether a request may come in: the ways in which the server says no, and when to ask again. Pure."""

from typing import Any

from triptych.config import AdmissionConfig
from triptych.core import InstanceId, Stage
from triptych.errors import RequestError
from triptych.router.waiting import Kind, WaitingRoom

MAX_WAITING = 10_000  # sequences, of all kinds: what they hold has to fit into this process
UNAVAILABLE_RETRY_S = 2.0  # about the time in which a lost instance is started again
BUSY_RETRY_S = 1.0  # where nothing can be predicted


REFUSALS = {  # why requests are refused, as metrics say it, by the code of the error
    "overloaded": "overload",
    "unavailable": "unavailable",
    "instance_lost": "unavailable",
    "deadline_exceeded": "deadline",
    "poison": "poison",
    "shutting_down": "shutting_down",
}


def unavailable(stage: Stage) -> RequestError:
    text = f"no instance serves {stage.name.lower()} at the moment"
    return RequestError(text, status=503, code="unavailable", retry_after_s=UNAVAILABLE_RETRY_S)


def deadline_exceeded() -> RequestError:
    return RequestError("the request's timeout has passed", status=504, code="deadline_exceeded")


def poisonous() -> RequestError:
    text = "an instance ended while it worked on this request, for the second time: it is not tried again"
    return RequestError(text, status=500, code="poison")


def lost_too_often(instance: InstanceId) -> RequestError:
    text = f"instance {instance} was lost, as others before it that worked on this request"
    return RequestError(text, status=503, code="instance_lost", retry_after_s=UNAVAILABLE_RETRY_S)


def broken() -> RequestError:
    return RequestError("internal server error", status=500, code="internal_error")


def overloaded(why: str, retry_after_s: float) -> RequestError:
    text = f"the server is overloaded: {why}; please try again later"
    return RequestError(text, status=503, code="overloaded", retry_after_s=max(retry_after_s, BUSY_RETRY_S))


class Admission:
    """The bounds of a waiting room: each request that would have to wait too long is told so at once."""

    def __init__(self, config: AdmissionConfig, room: WaitingRoom[Any]) -> None:
        self._config = config
        self._room = room

    def check_any(self, now: float) -> None:
        """Before it is known what a request is: raises RequestError(503) where every one would be refused."""
        missing = self._room.missing_stage(Kind.TEXT)
        if missing is not None and missing not in self._room.returning:
            raise unavailable(missing)
        waits_s = {kind: self._room.predicted_wait_s(kind, now) for kind in Kind}
        if self._room.num_waiting() >= MAX_WAITING:
            raise overloaded(f"{self._room.num_waiting()} sequences wait", max(waits_s.values()))
        shortest_s = min(waits_s.values())
        if shortest_s > self._config.max_queue_s:
            raise self._too_long(shortest_s, self._config.max_queue_s)

    def check(self, kind: Kind, deadline: float | None, now: float) -> None:
        """Raises RequestError(503) for one that cannot be taken, RequestError(504) for one that is too late already."""
        if deadline is not None and deadline <= now:
            raise deadline_exceeded()
        self.check_any(now)
        missing = self._room.missing_stage(kind)
        if missing is not None and missing not in self._room.returning:
            raise unavailable(missing)
        wait_s = self._room.predicted_wait_s(kind, now)
        limit_s = self._config.max_queue_s if deadline is None else min(self._config.max_queue_s, deadline - now)
        if wait_s > limit_s:
            raise self._too_long(wait_s, limit_s)

    def _too_long(self, wait_s: float, limit_s: float) -> RequestError:
        return overloaded(f"it would wait {wait_s:.1f} s, at most {limit_s:.1f} s are allowed", wait_s - limit_s)
