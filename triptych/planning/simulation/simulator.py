"""A cluster on simulated time: requests in, one record per request out. Deterministic; no process, no tensor.

The stages, the memory, the routing and the router are those of the engine and of the server; what a forward, a message
or a pull takes comes from a cost model.
"""

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isinf

from triptych.config import AdmissionConfig
from triptych.core import InstanceId, Placement, RequestId, Role
from triptych.messages import FRONTEND, AnyMessage, Load, Peer, SlabDescription, Table
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.clock import Clock
from triptych.planning.simulation.failures import Failure
from triptych.planning.simulation.frontend import Record, SimulatedFrontend
from triptych.planning.simulation.host import Host
from triptych.planning.simulation.instance import Leave, Mail, SimulatedInstance
from triptych.planning.simulation.process import Process
from triptych.planning.workloads.demand import Demand, Item
from triptych.routing import RoutingTable
from triptych.stages.base import Pull

NO_SLAB = SlabDescription(transports={}, host="", device="", base=0, regions={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a server's flags say, and what happens to it."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    parallel_encode: bool = True
    failures: tuple[Failure, ...] = ()


@dataclass(slots=True)
class SwitchOrder:
    """A role switch under way."""

    role: Role
    done: Callable[[dict[str, float] | None], None]
    began_s: float
    drain_s: float = 0.0


@dataclass(slots=True)
class Switch:
    """A role switch that was made, and how long each step took."""

    at_s: float
    instance: InstanceId
    before: Role
    after: Role
    steps_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stint:
    """An instance computed: `what` is encode, prefill, decode (steps in a row are one), or mixed for the last two."""

    instance: InstanceId
    role: Role
    what: str
    began_s: float
    ended_s: float
    size: int  # units, or sequences


@dataclass(slots=True)
class Loss:
    """An instance that ended, and when it was there again."""

    instance: InstanceId
    at_s: float
    back_s: float | None = None


class Simulation:
    """Instances of a placement, a frontend and a network. `run` plays a workload to its end."""

    def __init__(
        self,
        placement: Placement,
        costs: Costs,
        sizes: Sizes | Mapping[Role, Sizes] | None = None,
        options: Options | None = None,
    ) -> None:
        """`sizes`: of every instance, or of each role that there is or will be."""
        self.clock = Clock()
        self.costs = costs
        self.records: list[Record] = []
        self.switches: list[Switch] = []
        self.losses: list[Loss] = []
        self.unseen: list[Failure] = []  # those after the last answer
        self.stints: list[Stint] | None = None  # a list, and every step is written there
        self.follows_tokens = True  # each when it is said; `run` knows whether anybody needs that
        self.busy_s: dict[Role, float] = dict.fromkeys(Role, 0.0)  # computed, by all instances while they had the role
        self.table = RoutingTable()
        self._sizes = sizes or Sizes()
        self._options = options or Options()
        self._host = None if isinf(costs.cores) else Host(self.clock, costs.cores)
        # A server beside devices has a core of its own, and is one process.
        self.server_host = self._host or (Host(self.clock, 1.0) if costs.serving_takes_time else None)
        self._orders: dict[InstanceId, SwitchOrder] = {}
        self._lost: set[InstanceId] = set()
        self._epochs = itertools.count(1)
        self._link_free_at: dict[InstanceId, float] = {}
        self._copiers: dict[InstanceId, Process] = {}
        self.frontend = SimulatedFrontend(
            self.clock,
            costs,
            _Wire(self),
            Process(self.server_host),
            Process(self._host),
            admission=self._options.admission,
            parallel_encode=self._options.parallel_encode,
            prefix_caching=self._caches_prefixes,
            max_num_seqs=max(sizes.max_num_seqs for sizes in self._all_sizes),
        )
        self.instances: dict[InstanceId, SimulatedInstance] = {}
        for number, role in enumerate(placement.roles):
            self._start(InstanceId(f"i{number}"), role)
        for failure in self._options.failures:
            known = 0 <= failure.instance < len(self.instances)
            assert known, f"instance {failure.instance} fails, and there are {len(self.instances)}"
        self._publish()

    def sizes_of(self, role: Role) -> Sizes:
        return self._sizes if isinstance(self._sizes, Sizes) else self._sizes[role]

    def run(self, demands: Sequence[Demand]) -> list[Record]:
        """One record per request, in their order. The instances are at rest afterwards, and their books are checked."""
        self.follows_tokens = self._needs_tokens(demands)
        self.records = [Record(demand) for demand in demands]
        self.frontend.expect(self.records)
        for failure in self._options.failures:
            self.clock.at(failure.at_s, self._fail, failure)
        frontend = self.frontend
        with _few_collections():
            self.clock.run(until=lambda: not frontend.num_open)
            assert self.is_finished, f"{self.frontend.num_open} requests wait for ever"
            self._settle()
        return self.records

    def _needs_tokens(self, demands: Sequence[Demand]) -> bool:
        """Whether anything hangs on when each token is said: what it costs, what is left of an answer that ends early
        or has lost its instance, an objective that admission keeps."""
        ends_early = bool(self._options.failures) or any(demand.timeout_s is not None for demand in demands)
        costs = self.costs.server_step or self.costs.server_token
        return bool(costs) or ends_early or self._options.admission.slo_tpot_ms is not None

    @property
    def is_finished(self) -> bool:
        return not self.frontend.num_open

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        """As long as requests are unfinished."""

        def tick() -> None:
            if not self.is_finished:
                action()
                self.clock.after(seconds, tick)

        self.clock.after(seconds, tick)

    @property
    def loads(self) -> dict[InstanceId, Load]:
        """What the instances last said."""
        return self.frontend.router.dispatcher.loads

    @property
    def items(self) -> Mapping[bytes, Item]:
        return self.frontend.items

    def roles(self) -> dict[InstanceId, Role]:
        """Of those that take new work."""
        return {peer.id: peer.role for peer in self.table.peers.values() if not peer.leaving}

    def placement(self) -> Placement:
        order = list(Role)
        return Placement(tuple(sorted((instance.role for instance in self.instances.values()), key=order.index)))

    # ---- role switches

    def switch_role(self, id: InstanceId, role: Role, done: Callable[[dict[str, float] | None], None]) -> None:
        """No new work for the instance; it leaves its role, takes the new one, and `done` gets the steps, or None if it
        ended on the way."""
        assert id not in self._orders, f"{id} changes its role already"
        self._orders[id] = SwitchOrder(role, done, self.clock.now)
        self._publish()
        leave = Leave(self.frontend.router.dispatcher.room(), lambda: self._drained(self.instances[id]))
        self.clock.after(self.costs.message, self.instances[id].leave, leave)

    def _drained(self, instance: SimulatedInstance) -> None:
        order = self._orders[instance.id]
        order.drain_s = self.clock.now - order.began_s
        self.clock.after(self.costs.switch_s(instance.role, order.role), self._switched, instance)

    def _switched(self, instance: SimulatedInstance) -> None:
        if instance.id in self._lost or instance is not self.instances[instance.id]:
            return  # it ended on the way
        order = self._orders.pop(instance.id)
        before = instance.role
        instance.become(order.role, self.sizes_of(order.role))
        self._publish()
        steps_s = {"drain": order.drain_s, "switch": self.clock.now - order.began_s - order.drain_s}
        self.switches.append(Switch(order.began_s, instance.id, before, order.role, steps_s))
        order.done(steps_s)

    # ---- instances that come and go

    def _start(self, id: InstanceId, role: Role) -> None:
        epoch = str(next(self._epochs))
        sizes = self.sizes_of(role)
        self.instances[id] = SimulatedInstance(id, epoch, role, self.costs, sizes, self.clock, self, self._host)

    def _fail(self, failure: Failure) -> None:
        id = failure.id
        if self.is_finished:
            self.unseen.append(failure)
        elif id not in self._lost:
            self._lost.add(id)
            self.losses.append(Loss(id, self.clock.now))
            suspects = self.instances[id].kill()
            self.clock.after(failure.found_s, self._found, self.losses[-1], failure.restart_s, suspects)

    def _found(self, loss: Loss, restart_s: float, suspects: list[RequestId]) -> None:
        """In the order of the controller: first the table without it, then what it means for requests."""
        id = loss.instance
        order = self._orders.pop(id, None)
        self._publish(without=id)
        self.frontend.router.instance_lost(id, suspects)
        if order is not None:
            order.done(None)
        self.clock.after(restart_s, self._restart, loss)

    def _restart(self, loss: Loss) -> None:
        loss.back_s, id = self.clock.now, loss.instance
        self._lost.discard(id)
        self._start(id, self.instances[id].role)
        self._publish()

    def _publish(self, without: InstanceId | None = None) -> None:
        peers = [
            Peer(id, instance.role, instance.near.epoch, instance.near.epoch, NO_SLAB, leaving=id in self._orders)
            for id, instance in self.instances.items()
            if id not in self._lost or (id != without and id in self.table.peers)
        ]
        message = Table(self.table.version + 1, peers)
        self.table = RoutingTable.of(message)
        for instance in self.instances.values():
            instance.take_table(self.table)
        self.frontend.router.take(message)

    @property
    def _caches_prefixes(self) -> bool:
        return any(sizes.prefix_caching for sizes in self._all_sizes)

    @property
    def _all_sizes(self) -> list[Sizes]:
        return [self._sizes] if isinstance(self._sizes, Sizes) else list(self._sizes.values())

    # ---- network

    def send(self, mail: Mail) -> None:
        arriving = []
        for to, message in mail:
            if to == FRONTEND:
                arriving.append((self.frontend.handle, message))
            elif to in self.table.peers:
                arriving.append((self.instances[to].deliver, message))
        self.clock.after(self.costs.message, _deliver, arriving)

    def pull(self, reader: SimulatedInstance, pull: Pull) -> None:
        """Bytes into one instance come one pull after the other; where instances share cores, a thread copies them."""
        seconds = self.costs.pull_s(pull.ticket.region, pull.ticket.num_tokens)
        if self._host is not None:
            self._copiers.setdefault(reader.id, Process(self._host)).run(seconds, reader.settled, pull)
            return
        begins = max(self.clock.now, self._link_free_at.get(reader.id, 0.0))
        ends = begins + seconds
        self._link_free_at[reader.id] = ends
        self.clock.at(ends, reader.settled, pull)

    def computed(self, instance: SimulatedInstance, what: str, began_s: float, size: int) -> None:
        now = self.clock.now
        self.busy_s[instance.role] += now - began_s
        if self.stints is not None:
            self.stints.append(Stint(instance.id, instance.role, what, began_s, now, size))

    def _settle(self) -> None:
        """Lets what is on its way arrive, then checks the books."""
        self.clock.run(until=lambda: False)
        for instance in self.instances.values():
            instance.check_integrity()


@contextmanager
def _few_collections() -> Iterator[None]:
    """Next to nothing here refers to itself: looking for it at the usual pace takes a tenth of all time."""
    usual = gc.get_threshold()
    gc.set_threshold(1_000_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _deliver(arriving: list[tuple[Callable[[AnyMessage], None], AnyMessage]]) -> None:
    for take, message in arriving:
        take(message)


class _Wire:
    """How the router's messages leave."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def send(self, instance: InstanceId, message: AnyMessage) -> None:
        self._simulation.send([(instance, message)])
