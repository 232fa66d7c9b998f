"""Everything that is not answered yet: what of it waits and for what, what is with the instances, and how it is taken
up again when these are lost. Knows predicted work and attempts; no tokens, no clients."""

import logging
from collections.abc import Callable, Iterable

from triptych.config import AdmissionConfig
from triptych.core import InstanceId, RequestId, Stage, UnitHash
from triptych.errors import RequestError
from triptych.router.admission import broken, unavailable
from triptych.router.attempts import Attempt, Task
from triptych.router.clock import Clock, Timer
from triptych.router.dispatch import Dispatcher, Route
from triptych.router.generation import Generation
from triptych.router.quarantine import Quarantine
from triptych.router.slots import Slots
from triptych.router.waiting import NO_WORK, Waiter, WaitingRoom

logger = logging.getLogger(__name__)

EARLY_S = 1e-3  # that a timer may be, by rounding: nothing waits for the rest of it


class Backlog:
    """Tasks from the moment they are asked for until they are dropped. `attempts` are those with the instances."""

    def __init__(
        self,
        config: AdmissionConfig,
        dispatcher: Dispatcher,
        clock: Clock,
        slots: Slots,
        retried: Callable[[str], None],
        fail: Callable[[Generation, RequestError], None],
    ) -> None:
        """`retried` hears the reason of each further attempt. `fail` ends a generation, which drops all that is left of
        it here."""
        self.room: WaitingRoom[list[Task]] = WaitingRoom(config, slots)
        self.attempts: dict[RequestId, Attempt] = {}
        self._recovery_timeout_s = config.recovery_timeout_s
        self._dispatcher = dispatcher
        self._clock = clock
        self._retried = retried
        self._fail = fail
        self._quarantine = Quarantine()
        self._wanting: dict[Attempt, float] = {}  # those that miss units while nobody encodes, and since when
        self._recovery: Timer | None = None
        self._is_pumping = False

    def queue(self, tasks: list[Task]) -> None:
        """They go to the instances together as soon as it is their turn: at once, if nothing is before them."""
        try:
            self._queue(tasks)
        except Exception:  # the boundary of a request: nobody else would ever hear of it again
            logger.exception("%s: cannot be queued", tasks[0].output.request_id)
            self._fail(tasks[0].generation, broken())

    def _queue(self, tasks: list[Task]) -> None:
        now, first = self._clock.now, tasks[0]
        route = self._dispatcher.route(first, len(tasks))
        arrived_at, deadline = first.generation.arrived_at, first.generation.deadline
        queued_at = now if first.suspected_at is None else first.suspected_at
        goes_on = first.output.num_tokens > 0
        waiter = Waiter(tasks, first.kind, len(tasks), route.work, arrived_at, queued_at, deadline, goes_on)
        for task in tasks:
            task.waiter = waiter
        self.room.add(waiter, now)
        self._pump(waiter, route)
        if waiter.is_waiting:
            self._watch_stalled()

    def drop(self, task: Task, *, tell: bool = True) -> None:
        """Nobody works on it any more. `tell` the instances, unless they have ended it by themselves. Then `settle`."""
        self._withdraw(task, tell=tell)
        self._quarantine.discard(task)

    def settle(self) -> None:
        """Something left: others may have their turn."""
        suspect = self._quarantine.next()
        if suspect is not None:
            self._queue_again(suspect)
        self._pump()

    def retry(self, attempts: Iterable[Attempt], reason: str, pause_s: float = 0.0) -> None:
        """Takes attempts back, then begins with new ones, in the order in which clients asked."""
        tasks = sorted((attempt.task for attempt in attempts), key=lambda task: task.generation.arrived_at)
        for task in tasks:
            assert task.attempt is not None, f"{task.output.request_id} is not with the instances"
            self._dispatcher.forget_orders(task.attempt)
            self._withdraw(task)
            task.output.restart()
            self._retried(reason)
            logger.info("%s: %s, goes on behind token %d", task.output.request_id, reason, task.output.num_tokens)
        for task in tasks:
            if task.generation.failed:  # because another choice of it could not be sent, just now
                continue
            if task.num_blames and not self._quarantine.is_out(task):
                task.suspected_at = task.suspected_at or self._clock.now
                self._quarantine.add(task)
            elif pause_s:
                task.timer = self._clock.after(pause_s, self._queue_again, task)
            else:
                self._queue_again(task)
        self.settle()

    # ---- what is heard of attempts

    def hand_over(self, attempt: Attempt, decode: InstanceId, epoch: str = "") -> bool:
        """An attempt goes on at an instance. False if that was lost before this was known: `instance_lost` could not
        count it among those that it held."""
        if self._dispatcher.has_reached(decode, attempt, epoch):
            attempt.handed_to(decode)
            return True
        self.retry([attempt], "instance_lost")
        return False

    def want(self, attempt: Attempt, units: Iterable[UnitHash]) -> None:
        """Units that were thought to be somewhere have to be encoded for it after all."""
        attempt.wanted.update(units)
        self._encode(attempt)

    def prefilled(self, attempt: Attempt) -> None:
        """It is past prefill: something else may go there."""
        attempt.prefilled()
        attempt.task.num_failures = 0
        self._wanting.pop(attempt, None)
        self._release(attempt, done=True)
        self._pump()

    def decodes(self, attempt: Attempt, instance: InstanceId) -> None:
        """A token came from the instance that decodes it: a suspect got past where an instance ended with it."""
        attempt.decodes_at(instance)
        task = attempt.task
        task.num_losses = 0
        if task.num_blames:
            task.num_blames, task.suspected_at = 0, None
            self._quarantine.discard(task)
            self.settle()

    # ---- sending

    def _pump(self, newest: Waiter[list[Task]] | None = None, route: Route | None = None) -> None:
        """Sends all that may go now. `route` is that of the `newest`, found just now."""
        if self._is_pumping:  # one that cannot be sent fails, which asks for this again: it goes on anyway
            return
        self._is_pumping = True
        try:
            while (waiter := self.room.take(self._clock.now)) is not None:
                self._send_or_fail(waiter, route if waiter is newest else None)
        finally:
            self._is_pumping = False

    def _send_or_fail(self, waiter: Waiter[list[Task]], route: Route | None) -> None:
        try:
            self._send(waiter, route)
        except Exception:  # the boundary of a request: others go on
            logger.exception("%s: cannot be sent", waiter.what[0].output.request_id)
            self._unsend(waiter)
            self._fail(waiter.what[0].generation, broken())

    def _send(self, waiter: Waiter[list[Task]], route: Route | None) -> None:
        tasks = waiter.what
        for task in tasks:
            task.waiter = None
        attempts = self._dispatcher.send(tasks, route or self._dispatcher.route(tasks[0], len(tasks)))
        for attempt in attempts:  # the first one stands for the work of all, which is that of their prompt
            attempt.work = waiter.work if attempt is attempts[0] else NO_WORK
            self.attempts[attempt.request_id] = attempt

    def _unsend(self, waiter: Waiter[list[Task]]) -> None:
        """Of one that could not be sent: nothing of it counts for the window of its kind."""
        now = self._clock.now
        for task in waiter.what:
            task.attempt = None
            self.room.leave(waiter.kind)
            self.room.release(waiter.kind, waiter.work if task is waiter.what[0] else NO_WORK, now, done=False)

    def _encode(self, attempt: Attempt) -> None:
        """Orders what an attempt wants; without anybody who encodes it goes on wanting."""
        if not self._dispatcher.table.serving(Stage.ENCODE):
            self._wanting.setdefault(attempt, self._clock.now)
            self._watch_stalled()
            return
        units, attempt.wanted = attempt.wanted, set()
        self._wanting.pop(attempt, None)
        self._dispatcher.encode(attempt, units)

    def _queue_again(self, task: Task) -> None:
        task.timer = None
        self.queue([task])

    def _release(self, attempt: Attempt, *, done: bool) -> None:
        """It does not count for the window of its kind any more. Idempotent."""
        if attempt.work is not None:
            work, attempt.work = attempt.work, None
            self.room.release(attempt.task.kind, work, self._clock.now, done=done)

    def _withdraw(self, task: Task, *, tell: bool = True) -> None:
        """From wherever it waits, or from the instances."""
        if task.timer is not None:
            task.timer.cancel()
            task.timer = None
        if task.waiter is not None:
            self.room.remove(task.waiter, self._clock.now)
            task.waiter = None
        attempt, task.attempt = task.attempt, None
        if attempt is not None:
            del self.attempts[attempt.request_id]
            self.room.leave(task.kind)
            self._wanting.pop(attempt, None)
            self._release(attempt, done=task.output.finish is not None)
            if tell:
                self._dispatcher.withdraw(attempt)

    # ---- instances that come and go

    def instances_changed(self) -> None:
        """Somebody came, went, or takes no more new work."""
        self.room.set_instances(self._dispatcher.num_serving(), self._clock.now)
        self.room.returning = self._dispatcher.returning_stages()
        for attempt in list(self._wanting):
            self._encode(attempt)
        self._pump()
        self._watch_stalled()

    def _watch_stalled(self) -> None:
        """Sees to it that what waits for a stage without an instance does not wait for ever."""
        if self._recovery is None:
            since = min((since for _, _, since in self._stalled()), default=None)
            if since is not None:
                wait_s = since + self._recovery_timeout_s - self._clock.now
                self._recovery = self._clock.after(max(wait_s, 0.0), self._give_up_stalled)

    def _give_up_stalled(self) -> None:
        self._recovery = None
        now = self._clock.now
        for generation, stage, since in list(self._stalled()):
            if since + self._recovery_timeout_s <= now + EARLY_S:
                self._fail(generation, unavailable(stage))
        self._watch_stalled()

    def _stalled(self) -> Iterable[tuple[Generation, Stage, float]]:
        for waiter, stage, since in self.room.stalled():
            yield waiter.what[0].generation, stage, since
        for attempt, since in self._wanting.items():
            yield attempt.task.generation, Stage.ENCODE, since
        for task in self._quarantine.waiting():
            missing = self.room.missing_stage(task.kind)
            if missing is not None and task.suspected_at is not None:
                yield task.generation, missing, max(task.suspected_at, self.room.absent_since(missing))
