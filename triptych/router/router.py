"""From a client's request to the instances and back: who may come in, who waits, who works on it, who goes on with it.

The server's frontend gives it requests and hands out what they say; in a simulation the simulated one does.
"""

import logging
from collections.abc import Callable, Collection

from triptych.config import AdmissionConfig
from triptych.core import InstanceId, RequestId, Stage
from triptych.errors import RequestError
from triptych.messages import Abort, AnyMessage, Evicted, Failed, Load, Located, Table, Wanted
from triptych.router.admission import Admission, broken, lost_too_often, poisonous
from triptych.router.attempts import Attempt
from triptych.router.backlog import Backlog
from triptych.router.clock import Clock
from triptych.router.dispatch import Dispatcher, Wire
from triptych.router.pressure import AnswerTimes, Pressure
from triptych.router.requests import Audience, Requests
from triptych.router.slots import Slots
from triptych.router.waiting import Kind
from triptych.routing import RoutingTable

logger = logging.getLogger(__name__)

MAX_FAILURES = 10  # of a sequence in a row, without a new token, after which it is tried again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0  # after the second of these, and after the last ones
MAX_BLAMES = 2  # crashes while a sequence was computed
MAX_LOSSES = 10  # instances that a sequence may lose in a row, without a decoded token in between
_RETRY_REASONS = {"moved": "moved", "unavailable": "unavailable"}  # by the code of `Failed`; all others: transfer


class Router:
    """Takes requests, and what instances say of them. Messages may come in any order, any number of times, also about
    requests that nobody knows any more."""

    def __init__(
        self,
        config: AdmissionConfig,
        wire: Wire,
        clock: Clock,
        identity: bytes,
        *,
        parallel_encode: bool,
        prefix_caching: bool,
        max_num_seqs: int,
        audience: Audience,
        retried: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`identity` stands for the model in hashes of prompts. `max_num_seqs`: sequences that decode together on one
        instance. `retried` hears the reason of each further attempt."""
        slo_tpot_ms = config.slo_tpot_ms
        self.slots = Slots(max_num_seqs, None if slo_tpot_ms is None else slo_tpot_ms / 1e3)
        self.dispatcher = Dispatcher(wire, identity, parallel_encode=parallel_encode, prefix_caching=prefix_caching)
        self.backlog = Backlog(
            config, self.dispatcher, clock, self.slots, retried, lambda one, why: self.requests.fail([one], why)
        )
        self.room = self.backlog.room
        self.attempts = self.backlog.attempts
        self.admission = Admission(config, self.room)
        self.times = AnswerTimes()
        self.requests = Requests(self.backlog, wire, clock, self.slots, self.times, audience)
        self._config = config
        self._wire = wire
        self._clock = clock

    @property
    def table(self) -> RoutingTable:
        return self.dispatcher.table

    def pressure(self) -> Pressure:
        """What is asked of the instances, and how answers are doing."""
        now, queued = self._clock.now, self.room.queued()
        ttft_slack_s, tpot_slack_s = self.times.slack_s(self._config)
        return Pressure(
            {Stage.ENCODE: queued.encode_s, Stage.PREFILL: queued.prefill_s, Stage.DECODE: queued.decode_s},
            self.room.ahead().decode_s,
            {kind: self.room.num_waiting(kind) for kind in Kind},
            {kind: self.room.predicted_wait_s(kind, now) for kind in Kind},
            self.times.ttft_s,
            self.times.tpot_s,
            ttft_slack_s,
            tpot_slack_s,
        )

    # ---- what instances say

    def take(self, message: AnyMessage) -> bool:
        """Anything but tokens. False for what is not for a router."""
        match message:
            case Load():  # most are
                self.dispatcher.take_load(message)
            case Located():
                self._located(message)
            case Wanted():
                self._wanted(message)
            case Evicted():
                self.dispatcher.take_evicted(message)
            case Failed():
                self._failed(message)
            case Table():
                if self.dispatcher.take_table(message):
                    self.backlog.instances_changed()
            case _:
                return False
        return True

    def _located(self, message: Located) -> None:
        attempt = self.attempts.get(message.request_id)
        if attempt is None:  # aborted while it was on its way there; if it is finished, this changes nothing
            self._wire.send(message.decode, Abort(message.request_id))
        else:
            self.backlog.hand_over(attempt, message.decode, message.epoch)

    def _wanted(self, message: Wanted) -> None:
        attempt = self.attempts.get(message.request_id)
        if attempt is not None and not attempt.has_answered:  # an answer that goes on needs no unit any more
            self.backlog.want(attempt, message.units)

    def _failed(self, message: Failed) -> None:
        attempt = self.attempts.get(message.request_id)
        if attempt is None:
            return
        if message.retry:
            self._failed_for_now(attempt, message)
            return
        if message.unit is not None:
            self.dispatcher.could_not_encode(message.unit)
            if attempt.has_answered:  # it went on without that unit
                return
        param = None if message.unit is None else attempt.task.prompt.fields.get(message.unit)
        text = message.message if param is None else f"{param}: {message.message}"
        error = RequestError(text, status=message.status, param=param, code=message.code)
        self.requests.fail([attempt.task.generation], error)

    def _failed_for_now(self, attempt: Attempt, message: Failed) -> None:
        """An instance could not go on with it, but another may, or the same one a little later. That roles change is no
        reason to give up."""
        task, reason = attempt.task, _RETRY_REASONS.get(message.code or "", "transfer")
        task.num_failures += 1
        if reason == "transfer" and task.num_failures > MAX_FAILURES:
            self.requests.fail([task.generation], RequestError(message.message, status=500, code=message.code))
            return
        pause_s = min(FIRST_PAUSE_S * 2 ** (task.num_failures - 2), LONGEST_PAUSE_S) if task.num_failures > 1 else 0.0
        self.backlog.retry([attempt], reason, pause_s)

    # ---- instances that end

    def instance_lost(self, instance: InstanceId, suspects: Collection[RequestId] = ()) -> None:
        """Everything that cannot go on without it is taken up again. `suspects` are those that it was computing when it
        ended by itself: they are tried one at a time, and what is computed in two crashes is refused."""
        lost = {id: attempt for id, attempt in self.attempts.items() if instance in attempt.needs}
        blamed = {id: self.attempts[id] for id in suspects if id in self.attempts}
        for attempt in blamed.values():
            attempt.task.num_blames += 1
        guilty = [attempt.task.generation for attempt in blamed.values() if attempt.task.num_blames >= MAX_BLAMES]
        for attempt in self.attempts.values():
            attempt.holders.discard(instance)
        self.requests.fail(guilty, poisonous())
        for attempt in (lost | blamed).values():
            attempt.task.num_losses += 1
        often = [attempt.task.generation for attempt in lost.values() if attempt.task.num_losses > MAX_LOSSES]
        self.requests.fail(often, lost_too_often(instance))
        remaining = [attempt for id, attempt in (lost | blamed).items() if id in self.attempts]
        self.backlog.retry(remaining, "instance_lost")

    def give_up(self, request_id: RequestId) -> None:
        """What a message said of it could not be taken: it fails, and nothing else does."""
        attempt = self.attempts.get(request_id)
        if attempt is not None:
            self.requests.fail([attempt.task.generation], broken())
