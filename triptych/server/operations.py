"""The routes of operation: health, version, metrics, and the state of the cluster."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import triptych
from triptych.core import InstanceId, Placement, Role
from triptych.errors import RequestError
from triptych.messages import Load
from triptych.server.frontend import Frontend
from triptych.server.http import Exchange
from triptych.server.schema import ClusterView, InstanceView, PoolView, VersionResponse
from triptych.telemetry import METRICS_CONTENT_TYPE, InstanceSample, Telemetry


@dataclass(frozen=True)
class InstanceStatus:
    """What the controller knows about an instance and the frontend does not."""

    role: Role
    pid: int | None
    state: str


Directory = Callable[[], Mapping[InstanceId, InstanceStatus]]


class Operations:
    """`directory` lists all instances, also those that the routing table does not name; by default the table's."""

    def __init__(self, frontend: Frontend, telemetry: Telemetry, directory: Directory | None) -> None:
        self._frontend = frontend
        self._telemetry = telemetry
        self._directory = directory or self._from_table

    async def health(self, exchange: Exchange) -> None:
        """200 only while every stage has an active instance."""
        if not self._frontend.ready:
            raise RequestError("not every stage has an active instance", status=503, code="unavailable")
        await exchange.payload(b"", [])

    async def ping(self, exchange: Exchange) -> None:
        await exchange.payload(b"", [])

    async def version(self, exchange: Exchange) -> None:
        await exchange.json(VersionResponse(triptych.__version__))

    async def metrics(self, exchange: Exchange) -> None:
        statuses = self._directory()
        self._telemetry.instances(
            {id: _sample(statuses[id].role, load) for id, load in self._frontend.loads.items() if id in statuses}
        )
        await exchange.payload(self._telemetry.exposition(), [(b"content-type", METRICS_CONTENT_TYPE.encode())])

    async def cluster(self, exchange: Exchange) -> None:
        statuses = self._directory()
        placement = Placement(tuple(status.role for status in statuses.values()))
        views = [self._view(id, status) for id, status in statuses.items()]
        await exchange.json(ClusterView(str(placement), views))

    def _view(self, id: InstanceId, status: InstanceStatus) -> InstanceView:
        load = self._frontend.loads.get(id)
        pools = {} if load is None else load.pools
        return InstanceView(
            id=id,
            pid=status.pid,
            role=status.role,
            state=status.state,
            queues={} if load is None else load.queues,
            pools={name: PoolView(p.total, p.free, p.used, p.cached) for name, p in pools.items()},
            counters={} if load is None else load.counters,
        )

    def _from_table(self) -> Mapping[InstanceId, InstanceStatus]:
        peers = self._frontend.table.peers.values()
        return {peer.id: InstanceStatus(peer.role, None, "active") for peer in peers}


def _sample(role: Role, load: Load) -> InstanceSample:
    pools = {name: (p.total, p.free, p.used, p.cached) for name, p in load.pools.items()}
    return InstanceSample(role, load.queues, pools, load.counters)
