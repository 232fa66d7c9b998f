"""The frontend owns the truth about every request: what was asked, what was answered, who works on it.

It is the router with clients: it makes sequences out of what they ask for, hands their text out, and tells telemetry
and timeline. Knows no HTTP, no sockets and no pixels.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import Collection, Sequence

from msgspec.structs import replace

from triptych.config import AdmissionConfig
from triptych.core import InstanceId, RequestId, SamplingParams
from triptych.errors import RequestError, shutting_down
from triptych.messages import AnyMessage, Load, Steps, Table, Tokens
from triptych.model.processor import Processor
from triptych.router.admission import REFUSALS, deadline_exceeded
from triptych.router.attempts import Task
from triptych.router.clock import LoopClock
from triptych.router.dispatch import Wire
from triptych.router.generation import Generation, PreparedPrompt
from triptych.router.ledger import Ledger, Reservation
from triptych.router.output import Output
from triptych.router.pressure import Pressure
from triptych.router.router import Router
from triptych.router.waiting import Kind
from triptych.routing import RoutingTable
from triptych.telemetry import QueueSample, Telemetry
from triptych.timeline import Timeline

logger = logging.getLogger(__name__)


class Frontend:
    """Sends requests on their way and hands out what comes back.

    Single-threaded: everything runs on the event loop. `handle` takes messages in any order, any number of times,
    also about requests that nobody knows any more.
    """

    def __init__(
        self,
        processor: Processor,
        wire: Wire,
        telemetry: Telemetry,
        *,
        admission: AdmissionConfig | None = None,
        parallel_encode: bool = True,
        prefix_caching: bool = True,
        max_num_seqs: int = 64,
        timeline: Timeline | None = None,
    ) -> None:
        """`parallel_encode`: the units of a request are spread over all encode instances; else one encodes them all.
        `timeline`: where everything is written that happens to requests and instances."""
        self._config = admission or AdmissionConfig()
        self._processor = processor
        self._telemetry = telemetry
        self._timeline = timeline
        self._clock = LoopClock()
        self._router = Router(
            self._config,
            wire,
            self._clock,
            processor.identity,
            parallel_encode=parallel_encode,
            prefix_caching=prefix_caching,
            max_num_seqs=max_num_seqs,
            audience=self,
            retried=telemetry.retried,
        )
        self._requests = self._router.requests
        # What all requests hold of their bodies and media, also before they are asked for here.
        self.ledger = Ledger(self._config.max_media_held_bytes, self._clock, self._count_refusal)
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._id_prefix = secrets.token_hex(4)
        self._id_count = itertools.count()
        telemetry.watch_queues(self._queue_samples)
        telemetry.watch_media_held(lambda: self.ledger.num_bytes)

    @property
    def table(self) -> RoutingTable:
        return self._router.table

    @property
    def loads(self) -> dict[InstanceId, Load]:
        return self._router.dispatcher.loads

    @property
    def ready(self) -> bool:
        """Whether every stage has an active instance."""
        return self.table.complete

    # ---- what clients ask for

    def check_open(self) -> None:
        """Raises RequestError(503) where no request at all is taken now. Costs nothing, so that it can be asked before
        a request is even read."""
        try:
            if self._draining:
                raise shutting_down()
            self._router.admission.check_any(self._clock.now)
        except RequestError as error:
            self._count_refusal(error)
            raise

    def check_admission(self, kind: Kind, deadline: float | None = None) -> None:
        """Raises RequestError(503, 504) where a request of this kind would not be taken now."""
        try:
            if self._draining:
                raise shutting_down()
            self._router.admission.check(kind, deadline, self._clock.now)
        except RequestError as error:
            self._count_refusal(error)
            raise

    def too_late(self) -> RequestError:
        """For a request whose time was up before it could be asked for."""
        error = deadline_exceeded()
        self._count_refusal(error)
        return error

    def generate(
        self,
        prompts: Sequence[PreparedPrompt],
        samplings: Sequence[SamplingParams],
        n: int = 1,
        stop: tuple[str, ...] = (),
        *,
        arrived_at: float | None = None,
        deadline: float | None = None,
        reservation: Reservation | None = None,
    ) -> Generation:
        """Starts `n` sequences for each prompt, or lets them wait for their turn. Times are those of `time.monotonic`.

        From now on `reservation` holds the media of the prompts and nothing else; whoever opened it closes it when the
        prompts are let go. Without one they are held until everything is answered. Raises RequestError(503) if a stage
        that they need has no instance, if they would have to wait too long or there is no room for their media,
        RequestError(504) if the deadline has passed.
        """
        now = self._clock.now
        generation = Generation(self, prompts, now if arrived_at is None else arrived_at, deadline)
        kind = Kind.of(unit.modality for prompt in prompts for unit in prompt.units)
        self.check_admission(kind, deadline)
        groups = [
            self._new_tasks(generation, prompt, [replace(sampling, choice=choice) for choice in range(n)], stop, kind)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        if reservation is None:
            reservation = generation.reservation = self.ledger.reserve()
        reservation.keep(generation.media_bytes)
        self._tell_queued(generation, groups)
        self._idle.clear()
        self._requests.begin(generation, groups)
        return generation

    def abort(self, generation: Generation) -> None:
        """Takes every unfinished sequence back from all instances. Idempotent."""
        for task in self._requests.abort(generation):
            self._telemetry.aborted()
            self._ended(task, "aborted")

    # ---- what operators ask for

    def drain(self) -> None:
        """From now on new requests are refused with 503."""
        self._draining = True

    async def drained(self) -> None:
        """Returns when every sequence is answered, has failed or was aborted."""
        while self._requests.open:
            await self._idle.wait()

    def close(self) -> None:
        """Ends everything with 503: the server stops."""
        self._draining = True
        self._requests.fail(self._requests.open, shutting_down())

    def room(self) -> dict[InstanceId, int]:
        """KV blocks that instances which decode could take, as they last said."""
        return self._router.dispatcher.room()

    def pressure(self) -> Pressure:
        return self._router.pressure()

    # ---- what instances report

    def handle(self, message: AnyMessage) -> None:
        try:
            self._handle(message)
        except Exception:  # the boundary of a message: those that came with it are handled
            logger.exception("cannot take %s", type(message).__name__)
            self._router.give_up(getattr(message, "request_id", RequestId("")))

    def instance_lost(
        self, instance: InstanceId, suspects: Collection[RequestId] = (), *, as_asked: bool = False
    ) -> None:
        """Everything that cannot go on without it is taken up again; see the router's. `as_asked`: it ended as it was
        told to."""
        if self._timeline is not None:
            tell = self._timeline.stopped if as_asked else self._timeline.lost
            tell(instance, self._clock.now)
        self._router.instance_lost(instance, suspects)

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Tokens():
                self._tokens(message)
            case Steps():
                self._steps(message)
            case Table():
                self._table(message)
            case _:
                if not self._router.take(message):
                    logger.warning("frontend got %s, which is not for it", type(message).__name__)

    def _tokens(self, message: Tokens) -> None:
        for update in message.updates:
            try:
                self._requests.take(update, message.instance)
            except Exception:  # the boundary of a request: the others of this step go on
                logger.exception("%s: cannot take token %d", update.request_id, update.index)
                self._router.give_up(update.request_id)

    def _table(self, message: Table) -> None:
        before = self.table.version
        self._router.take(message)
        if self.table.version > before:
            self._tell_roles(message)

    # ---- what becomes of requests

    def said(self, task: Task, num_tokens: int, after_s: float) -> None:
        """One token came; see `Audience`."""
        output = task.output
        if output.num_tokens == 1:
            self._telemetry.first_token(after_s, len(task.prompt.token_ids))
            if self._timeline is not None:
                self._timeline.first_token(output.request_id, self._clock.now)
        else:
            self._telemetry.next_token(after_s)
        task.generation.notify(output)

    def answered(self, task: Task) -> None:
        """The last token came; see `Audience`."""
        output = task.output
        assert output.finish is not None, f"{output.request_id} is answered and goes on"
        after_s = self._clock.now - task.generation.arrived_at
        self._telemetry.finished(output.finish, after_s, len(task.prompt.token_ids), output.num_tokens)
        self._ended(task, "finished")

    def failed(self, generation: Generation, tasks: Sequence[Task], error: RequestError) -> None:
        """These sequences of it will not be answered; see `Audience`."""
        self._count_refusal(error)
        for task in tasks:
            self._telemetry.failed()
            self._ended(task, error.code or "failed")

    def _ended(self, task: Task, outcome: str) -> None:
        if self._timeline is not None:
            self._timeline.ended(task.output.request_id, self._clock.now, outcome, task.output.num_tokens)
        if not self._requests.open:
            self._idle.set()

    # ---- the timeline

    def _tell_queued(self, generation: Generation, groups: Sequence[Sequence[Task]]) -> None:
        if self._timeline is not None:
            for task in itertools.chain.from_iterable(groups):
                about = {"prompt_tokens": len(task.prompt.token_ids), "kind": task.kind.value}
                self._timeline.queued(task.output.request_id, generation.arrived_at, **about)

    def _tell_roles(self, table: Table) -> None:
        """An instance has its role once it is not leaving another one."""
        if self._timeline is not None:
            for peer in table.peers:
                if not peer.leaving:
                    self._timeline.instance(peer.id, peer.role.value, self._clock.now)

    def _steps(self, message: Steps) -> None:
        if self._timeline is not None:
            for step in message.steps:
                self._timeline.step(message.instance, step.what, step.began_s, step.ended_s, step.size)
            self._timeline.flush()

    # ---- inside

    def _count_refusal(self, error: RequestError) -> None:
        reason = REFUSALS.get(error.code or "")
        if reason is not None:
            self._telemetry.refused(reason)

    def _queue_samples(self) -> dict[str, QueueSample]:
        now = self._clock.now
        return {
            kind.value: QueueSample(self._router.room.num_waiting(kind), self._router.room.predicted_wait_s(kind, now))
            for kind in Kind
        }

    def _new_tasks(
        self,
        generation: Generation,
        prompt: PreparedPrompt,
        samplings: Sequence[SamplingParams],
        stop: tuple[str, ...],
        kind: Kind,
    ) -> list[Task]:
        """The choices of one prompt."""
        hashes, tasks = self._router.dispatcher.hashes(prompt), []
        for sampling in samplings:
            id = RequestId(f"{self._id_prefix}-{next(self._id_count)}")
            output = Output(len(generation.outputs), id, sampling, stop, self._processor.token_stream())
            generation.outputs.append(output)
            tasks.append(Task(output, generation, prompt, hashes, kind))
        return tasks
