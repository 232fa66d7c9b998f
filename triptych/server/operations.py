"""The routes of operation: health, version, metrics, the state of the cluster, and what changes it."""

import time
from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

import triptych
from triptych.control.changes import Change
from triptych.control.events import Event
from triptych.control.instances import Instance, State, SwitchRecord
from triptych.core import InstanceId, Placement, Role
from triptych.errors import ConfigError, RequestError, shutting_down
from triptych.messages import Load
from triptych.planning.allocator import Decision
from triptych.server.frontend import Frontend
from triptych.server.http import Exchange
from triptych.server.parsing import decode_body
from triptych.server.schema import (
    ChangeView,
    ClusterView,
    EventView,
    InstanceView,
    PlacementRequest,
    PlacementResponse,
    PoolView,
    RoleRequest,
    RoleResponse,
    SwitchView,
    VersionResponse,
)
from triptych.telemetry import METRICS_CONTENT_TYPE, InstanceSample, Telemetry

MAX_BODY_BYTES = 64 << 10  # of a request here


class Control(Protocol):
    """Who keeps the instances; `control.Controller`."""

    @property
    def instances(self) -> Mapping[InstanceId, Instance]: ...
    @property
    def events(self) -> Iterable[Event]: ...
    @property
    def draining(self) -> bool: ...
    @property
    def decision(self) -> Decision | None: ...
    async def switch_role(self, id: InstanceId, role: Role) -> dict[str, float]: ...
    async def place(self, placement: Placement) -> list[Change]: ...


class Operations:
    def __init__(self, frontend: Frontend, telemetry: Telemetry, control: Control | None) -> None:
        """Without a `control` the instances are those of the routing table, and stay what they are."""
        self._frontend = frontend
        self._telemetry = telemetry
        self._control = control

    async def health(self, exchange: Exchange) -> None:
        """200 only while every stage has an active instance, and the server is not about to stop."""
        if self._control is not None and self._control.draining:
            raise shutting_down()
        if not self._frontend.ready:
            text = "not every stage has an active instance"
            raise RequestError(text, status=503, code="unavailable", retry_after_s=1)
        await exchange.payload(b"", [])

    async def ping(self, exchange: Exchange) -> None:
        await exchange.payload(b"", [])

    async def version(self, exchange: Exchange) -> None:
        await exchange.json(VersionResponse(triptych.__version__))

    async def metrics(self, exchange: Exchange) -> None:
        instances = self._instances()
        self._telemetry.instances(
            {id: _sample(instances[id], load) for id, load in self._frontend.loads.items() if id in instances}
        )
        await exchange.payload(self._telemetry.exposition(), [(b"content-type", METRICS_CONTENT_TYPE.encode())])

    async def cluster(self, exchange: Exchange) -> None:
        await exchange.json(
            ClusterView(
                placement=self._placement(),
                draining=self._control is not None and self._control.draining,
                instances=[self._view(instance) for instance in self._instances().values()],
                decision=None if self._control is None else msgspec.to_builtins(self._control.decision),
                events=[] if self._control is None else [_event(event) for event in self._control.events],
            )
        )

    async def set_role(self, exchange: Exchange) -> None:
        """Answers when the instance serves its new role."""
        request = decode_body(await exchange.body(MAX_BODY_BYTES), RoleRequest)
        try:
            role = Role(request.role)
        except ValueError:
            text = f"role: {request.role[:100]!r} is no role; roles are {', '.join(Role)}"
            raise RequestError(text, param="role", code="invalid_value") from None
        id = InstanceId(exchange.scope["path_params"]["id"])
        steps_s = await self._required_control().switch_role(id, role)
        await exchange.json(RoleResponse(id=id, role=role, steps_s=steps_s))

    async def set_placement(self, exchange: Exchange) -> None:
        """Answers when every instance serves the role that it has in the placement."""
        request = decode_body(await exchange.body(MAX_BODY_BYTES), PlacementRequest)
        try:
            placement = Placement.parse(request.placement)
        except ConfigError as error:
            raise RequestError(str(error), param="placement", code="invalid_value") from error
        began = time.monotonic()
        changes = await self._required_control().place(placement)
        views = [ChangeView(id=c.instance, before=c.before, after=c.after, steps_s=c.steps_s) for c in changes]
        await exchange.json(
            PlacementResponse(placement=self._placement(), changes=views, total_s=time.monotonic() - began)
        )

    def _required_control(self) -> Control:
        if self._control is None:
            raise RequestError("the instances of this server cannot be changed", status=501, code="not_supported")
        return self._control

    def _placement(self) -> str:
        return str(Placement.of(i.role for i in self._instances().values() if i.state is not State.DEAD))

    def _instances(self) -> Mapping[InstanceId, Instance]:
        if self._control is not None:
            return self._control.instances
        peers = self._frontend.table.peers.values()
        return {p.id: Instance(p.id, slot, p.role, peer=p, state=State.ACTIVE) for slot, p in enumerate(peers)}

    def _view(self, instance: Instance) -> InstanceView:
        load = self._frontend.loads.get(instance.id)
        pools = {} if load is None else load.pools
        epoch = instance.peer.epoch if instance.peer is not None else None
        return InstanceView(
            id=instance.id,
            pid=None if instance.worker is None else instance.worker.pid,
            role=instance.role,
            state=instance.state,
            epoch=epoch,
            restarts=instance.num_restarts,
            last_failure=instance.last_failure,
            started_at=instance.started_at,
            uptime_s=None if instance.started_at is None else time.time() - instance.started_at,
            switch=None if instance.switch is None else _switch(instance.switch),
            queues={} if load is None else load.queues,
            pools={name: PoolView(p.total, p.free, p.used, p.cached) for name, p in pools.items()},
            counters={} if load is None else load.counters,
        )


def _switch(record: SwitchRecord) -> SwitchView:
    return SwitchView(
        before=record.before,
        after=record.after,
        at=record.at,
        state="failed" if record.error is not None else "done" if record.is_over else "running",
        steps_s=record.steps_s,
        error=record.error,
    )


def _event(event: Event) -> EventView:
    return EventView(at=event.at, what=event.what, instance=event.instance, text=event.text, numbers=event.numbers)


def _sample(instance: Instance, load: Load) -> InstanceSample:
    pools = {name: (p.total, p.free, p.used, p.cached) for name, p in load.pools.items()}
    counters = load.counters | {"restarts": float(instance.num_restarts)}
    return InstanceSample(instance.role, load.queues, pools, counters)
