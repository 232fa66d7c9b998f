"""Changes that somebody asks for: the role of an instance, or the whole placement. One after the other, never two."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, groupby

import msgspec

from triptych.config import InstanceConfig
from triptych.control.events import Event
from triptych.control.fleet import Fleet
from triptych.control.instances import Instance, State, SwitchRecord
from triptych.control.placing import Move, Start, Stop, Switch, plan
from triptych.core import InstanceId, Placement, Role, unserved
from triptych.engine.sockets import most_peers
from triptych.errors import InstanceError, RequestError
from triptych.messages import Switched, SwitchRole

logger = logging.getLogger(__name__)

MAX_INSTANCES = 32  # of a placement that is asked for while the server runs
# For the answer to an order to stay: it may be reading weights for the role that it shall not get.
STAY_TIMEOUT_S = 120.0


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to one instance. `before` is None for a new one, `after` for one that ended."""

    instance: InstanceId
    before: Role | None
    after: Role | None
    steps_s: dict[str, float]


class Changes:
    """Whoever asks while a change is under way waits for it: each change is checked against what the one before left.

    While an instance changes its role it takes no new work; what it began it finishes or hands over.
    """

    def __init__(self, fleet: Fleet, switch_timeout_s: float) -> None:
        """`switch_timeout_s`: how long an instance may take to finish what it has, and an instance that is being
        restarted to be back, before a change that needs it is given up."""
        self._fleet = fleet
        self._timeout_s = switch_timeout_s
        self._lock = asyncio.Lock()
        self._orders = count(1)

    async def switch_role(self, id: InstanceId, role: Role) -> dict[str, float]:
        """Seconds of each step; empty if the instance has that role already.

        The placement that results has to serve every stage. While the instance switches, a stage that nobody else
        serves is not served: its requests wait. Raises RequestError: 404 for an unknown id, 400 where a stage would be
        left without an instance, 409 if the instance is not active, 503 if it did not finish its work in time and stays
        what it is, 500 if it could not take the role or was lost.
        """
        self._require_known(id)
        async with self._lock:
            instance = self._require_known(id)
            if instance.role is role:
                return {}
            self._require_complete_with(instance, role)
            if instance.state is not State.ACTIVE:
                text = f"instance {id} is {instance.state}, only an active one can change its role"
                raise RequestError(text, status=409, code="not_active", retry_after_s=1)
            return await self._switch(instance, role)

    async def place(self, placement: Placement) -> list[Change]:
        """What was done, in this order. Every stage keeps an instance that takes work at every moment.

        First gives up those of the instances that are not wanted which are being restarted, and waits until all others
        are active. What fails on the way stops the change: what was done before is told
        in the error and stays. Raises RequestError: 400 for too many instances, 503 for what did not happen in time,
        500 for an instance that could not take its role, did not start, or was lost.
        """
        _require_room(len(placement.roles))
        async with self._lock:
            done = self._dismiss_unwanted(placement)
            with self._in_time("every instance to be active"):
                async with asyncio.timeout(self._timeout_s):
                    await self._fleet.until(self._all_active)
            # A large change takes up to a second to plan, which streams would notice.
            moves_to_make = await asyncio.to_thread(plan, self._fleet.serving(), placement.roles)
            for moves in _together(moves_to_make):
                results = await asyncio.gather(*map(self._carry_out, moves), return_exceptions=True)
                done += [result for result in results if isinstance(result, Change)]
                for error in (result for result in results if isinstance(result, BaseException)):
                    raise _with_what_was_done(error, done) if isinstance(error, RequestError) else error
            return done

    def answered(self, message: Switched) -> None:
        """An answer to an older order is no news: the newest one is answered too."""
        instance = self._fleet.instances.get(message.instance)
        if instance is None or instance.answer is None or instance.answer.done() or instance.order != message.order:
            return
        instance.answer.set_result(message)

    # ---- one move

    def _dismiss_unwanted(self, placement: Placement) -> list[Change]:
        instances = list(self._fleet.instances.values())
        surplus = Counter(instance.role for instance in instances) - Counter(placement.roles)
        done: list[Change] = []
        for instance in instances:
            if not instance.serves and surplus[instance.role] > 0:
                surplus[instance.role] -= 1
                self._fleet.dismiss(instance)
                done.append(Change(instance=instance.id, before=instance.role, after=None, steps_s={}))
        return done

    async def _carry_out(self, move: Move) -> Change:
        if isinstance(move, Start):
            return await self._start(move.role)
        instance = self._require_known(move.instance)
        with self._in_time(f"the other instances to serve every stage without {instance.id}"):
            async with asyncio.timeout(self._timeout_s):
                await self._fleet.until(lambda: self._can_do_without(instance))
        before = instance.role
        if isinstance(move, Stop):
            return Change(instance=instance.id, before=before, after=None, steps_s=await self._stop(instance))
        steps_s = await self._switch(instance, move.role)
        return Change(instance=instance.id, before=before, after=move.role, steps_s=steps_s)

    async def _start(self, role: Role) -> Change:
        began = time.monotonic()
        try:
            instance = await self._fleet.enlist(role)
        except InstanceError as error:
            raise RequestError(str(error), status=500, code="start_failed") from error
        took_s = time.monotonic() - began
        return Change(instance=instance.id, before=None, after=role, steps_s={"start": took_s, "total": took_s})

    async def _switch(self, instance: Instance, role: Role) -> dict[str, float]:
        began = time.monotonic()
        record = instance.switch = SwitchRecord(instance.role, role)
        with self._recorded(instance, record):
            self._fleet.leave(instance)
            switched = await self._order_or_stay(instance, self._fleet.config_for(instance, role))
            self._fleet.arrived(instance, switched.peer)
            if switched.error is not None:
                text = f"instance {instance.id} could not become {role} and stays {instance.role}: {switched.error}"
                raise RequestError(text, status=500, code="switch_failed")
            record.steps_s = switched.steps_s | {"total": time.monotonic() - began}
        text = f"from {record.before} to {role}"
        self._fleet.note(Event(what="switched", instance=instance.id, text=text, numbers=record.steps_s))
        return record.steps_s

    async def _stop(self, instance: Instance) -> dict[str, float]:
        began = time.monotonic()
        record = instance.switch = SwitchRecord(instance.role, None)
        with self._recorded(instance, record):
            instance.disposable = True
            self._fleet.leave(instance)
            try:
                await self._order_or_stay(instance, None)
                raise AssertionError(f"instance {instance.id} was to end, and answered")
            except _LostError:
                if instance.state is not State.DEAD:  # lost while it was told to stay after all
                    raise
            took_s = time.monotonic() - began
            record.steps_s = {"drain": took_s, "total": took_s}
        return record.steps_s

    async def _order_or_stay(self, instance: Instance, config: InstanceConfig | None) -> Switched:
        """The answer to the order to become what `config` says, or to end. Raises _LostError if the instance is lost,
        and RequestError(503) if it took too long and stays what it is."""
        try:
            return await self._order(instance, config, self._timeout_s)
        except TimeoutError:
            pass
        instance.disposable = False
        stayed = await self._order_to_stay(instance)
        self._fleet.arrived(instance, stayed.peer)
        text = f"instance {instance.id} did not finish its work in {self._timeout_s:g} s and stays {instance.role}"
        raise RequestError(text, status=503, code="switch_timeout", retry_after_s=self._timeout_s)

    async def _order_to_stay(self, instance: Instance) -> Switched:
        try:
            return await self._order(instance, instance.config, STAY_TIMEOUT_S)
        except TimeoutError:
            self._require_serving(instance)
            reason = f"no answer to an order for {STAY_TIMEOUT_S:g} s"
            self._fleet.watch.accuse(instance, reason)
            raise _LostError(instance, reason) from None

    async def _order(self, instance: Instance, config: InstanceConfig | None, timeout_s: float) -> Switched:
        """The answer of one that serves still: a loss may come in the same turn of the loop as the answer, or as the
        timeout of the order before."""
        self._require_serving(instance)
        instance.order = next(self._orders)
        instance.answer = asyncio.get_running_loop().create_future()
        self._fleet.send(instance.id, SwitchRole(instance.order, config, self._fleet.room()))
        try:
            async with asyncio.timeout(timeout_s):
                switched = await instance.answer
        except InstanceError as error:
            raise _LostError(instance, str(error)) from error
        self._require_serving(instance)
        return switched

    # ---- conditions

    def _require_serving(self, instance: Instance) -> None:
        if not instance.serves:
            raise _LostError(instance, str(instance.last_failure))

    def _require_known(self, id: InstanceId) -> Instance:
        instance = self._fleet.instances.get(id)
        if instance is None:
            known = ", ".join(self._fleet.instances)
            raise RequestError(
                f"there is no instance {id[:100]!r}; there are {known}", status=404, code="unknown_instance"
            )
        return instance

    def _require_complete_with(self, instance: Instance, role: Role) -> None:
        roles = [role if other is instance else other.role for other in self._fleet.instances.values()]
        missing = [stage.name.lower() for stage in unserved(roles)]
        if missing:
            text = f"role: with {instance.id} as {role} no instance would serve {' or '.join(missing)}"
            raise RequestError(text, param="role", code="invalid_value")

    def _all_active(self) -> bool:
        return len(self._fleet.serving()) == len(self._fleet.instances)

    def _can_do_without(self, instance: Instance) -> bool:
        serving = self._fleet.serving()
        return serving.pop(instance.id, None) is not None and not unserved(serving.values())

    @contextmanager
    def _in_time(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            states = ", ".join(f"{i.id} ({i.role}) is {i.state}" for i in self._fleet.instances.values())
            text = f"waited {self._timeout_s:g} s for {what}: {states}"
            raise RequestError(text, status=503, code="not_active", retry_after_s=self._timeout_s) from None

    @contextmanager
    def _recorded(self, instance: Instance, record: SwitchRecord) -> Iterator[None]:
        """Writes down how it ended. A loss on the way becomes a RequestError."""
        try:
            yield
        except (RequestError, _LostError) as error:
            record.error = str(error)
            after = "its end" if record.after is None else record.after
            text = f"from {record.before} to {after}: {error}"
            self._fleet.note(Event(what="switch_failed", instance=instance.id, text=text))
            if isinstance(error, _LostError):
                raise RequestError(str(error), status=500, code="instance_lost") from error
            raise
        finally:
            record.is_over = True


class _LostError(InstanceError):
    """The instance was lost before it answered."""

    def __init__(self, instance: Instance, reason: str) -> None:
        super().__init__(f"instance {instance.id} was lost meanwhile and is started again as {instance.role}: {reason}")


def _require_room(num_instances: int) -> None:
    """Raises RequestError where the server could not have so many."""
    most = min(MAX_INSTANCES, most_peers())
    if num_instances > most:
        why = "" if most == MAX_INSTANCES else ", by the files that the server may have open (ulimit -Hn)"
        text = f"placement: {num_instances} instances, at most {most}{why}"
        raise RequestError(text, param="placement", code="invalid_value")


def _together(moves: list[Move]) -> Iterator[list[Move]]:
    """New instances start side by side, as old ones end; roles are switched one at a time."""
    for kind, group in groupby(moves, key=type):
        if kind is Switch:
            yield from ([move] for move in group)
        else:
            yield list(group)


def _with_what_was_done(error: RequestError, done: list[Change]) -> RequestError:
    if not done:
        return error
    told = ", ".join(f"{change.instance} {change.before or 'new'} -> {change.after or 'ended'}" for change in done)
    text = f"{error} (done before that: {told})"
    return RequestError(
        text, status=error.status, param=error.param, code=error.code, retry_after_s=error.retry_after_s
    )
