"""The life of a request that was taken in: whose token this is and how late it comes, when it is answered, and how it
ends otherwise. Knows sequences and attempts; neither text nor clients."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

from triptych.core import InstanceId
from triptych.errors import RequestError
from triptych.messages import Abort, TokenUpdate
from triptych.router.admission import deadline_exceeded
from triptych.router.attempts import Attempt, Task
from triptych.router.backlog import Backlog
from triptych.router.clock import Clock
from triptych.router.dispatch import Wire
from triptych.router.generation import Generation
from triptych.router.pressure import AnswerTimes
from triptych.router.slots import Slots


class Audience(Protocol):
    """Who hears what becomes of requests: a frontend."""

    def said(self, task: Task, num_tokens: int, after_s: float, /) -> None:
        """So many tokens came, together. `after_s`: from one to the next; the first one's: since the client asked."""

    def answered(self, task: Task, /) -> None:
        """The last of its tokens came: nobody works on it any more."""

    def failed(self, generation: Generation, tasks: list[Task], error: RequestError, /) -> None:
        """These, of its sequences, will not be answered; nobody works on them any more."""


class Requests:
    """`open`: what is not answered yet. Tokens may come in any order and any number of times, also for requests that
    nobody knows any more."""

    def __init__(
        self, backlog: Backlog, wire: Wire, clock: Clock, slots: Slots, times: AnswerTimes, audience: Audience
    ) -> None:
        self.open: dict[Generation, dict[Task, None]] = {}
        self._backlog = backlog
        self._wire = wire
        self._clock = clock
        self._slots = slots
        self._times = times
        self._audience = audience

    def begin(self, generation: Generation, groups: Sequence[list[Task]]) -> None:
        """Each group, the choices of one prompt, goes to the instances as soon as it is its turn."""
        self.open[generation] = dict.fromkeys(itertools.chain.from_iterable(groups))
        if generation.deadline is not None:
            left_s = generation.deadline - self._clock.now
            generation.timer = self._clock.after(left_s, self.fail, [generation], deadline_exceeded())
        for tasks in groups:
            if generation in self.open:  # else one of its sequences could not be sent
                self._backlog.queue(tasks)

    # ---- tokens

    def take(self, update: TokenUpdate, instance: InstanceId) -> None:
        attempt = self._backlog.attempts.get(update.request_id)
        if attempt is None or attempt.decoder != instance:  # else, as for most tokens, nothing is new about where it is
            attempt = self._located(attempt, update, instance)
            if attempt is None:
                return
        task = attempt.task
        output = task.output
        for due in output.in_order(update):
            self._said(attempt, output.push(due))
            if output.finish is not None:
                self._answered(task, by_instance=due.finish is not None)
                return
        if attempt.decoder != instance:
            self._follow(attempt, update.index, instance)

    def _located(self, attempt: Attempt | None, update: TokenUpdate, instance: InstanceId) -> Attempt | None:
        """None if nobody waits for this token any more, or if it has to be sampled anew."""
        if attempt is None:
            if update.finish is None:  # aborted, but that instance did not know yet that it held it
                self._wire.send(instance, Abort(update.request_id))
            return None
        is_news = instance not in attempt.holders and update.index >= attempt.task.output.num_tokens
        if is_news and not self._backlog.hand_over(attempt, instance):
            return None
        return attempt

    def _said(self, attempt: Attempt, num_tokens: int) -> None:
        task, now = attempt.task, self._clock.now
        output = task.output
        num_before = len(output.token_ids) - num_tokens
        if num_before:
            after_s = (now - output.last_token_at) / num_tokens
            self._times.next(after_s, num_tokens)
            # Of the first token of an attempt it tells how long the sequence was taken up again.
            if num_before > attempt.start and self._slots.has_objective:
                self._slots.observe(after_s, self._backlog.room.num_out, now, num_tokens)
        else:
            after_s = now - task.generation.arrived_at
            self._times.first(after_s)
        output.last_token_at = now
        self._audience.said(task, num_tokens, after_s)

    def _follow(self, attempt: Attempt, index: int, instance: InstanceId) -> None:
        """The token with that index was taken, and is not the last one of its sequence."""
        if attempt.work is not None and attempt.has_answered:
            self._backlog.prefilled(attempt)
        # A token behind the first one comes from the instance that decodes. Only once all before it are here too, or
        # the loss of one on the way would never be noticed; and only the newest says where the sequence is now.
        if index > attempt.start and attempt.task.output.num_tokens == index + 1:
            self._backlog.decodes(attempt, instance)

    def _answered(self, task: Task, *, by_instance: bool) -> None:
        """After a stop string the instances would go on."""
        self._drop(task, tell=not by_instance)
        self._audience.answered(task)
        self._backlog.settle()

    # ---- other ends

    def fail(self, generations: Iterable[Generation], error: RequestError) -> None:
        for generation in list(generations):
            tasks = self._end(generation)
            if tasks:
                generation.fail(error)
                self._audience.failed(generation, tasks, error)
        self._backlog.settle()

    def abort(self, generation: Generation) -> list[Task]:
        """Takes every unfinished sequence back from all instances, and returns them. Idempotent."""
        tasks = self._end(generation)
        self._backlog.settle()
        return tasks

    def _end(self, generation: Generation) -> list[Task]:
        tasks = list(self.open.get(generation, ()))
        for task in tasks:
            self._drop(task)
        return tasks

    def _drop(self, task: Task, *, tell: bool = True) -> None:
        """Nobody works on it any more, and what was kept for it is let go."""
        self._backlog.drop(task, tell=tell)
        generation = task.generation
        del self.open[generation][task]
        if not self.open[generation]:
            del self.open[generation]
            generation.close()
