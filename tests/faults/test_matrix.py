"""Every instance fails in every way at every moment of a request, and no client sees anything of it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.faults.batches import batch
from tests.faults.cells import GROUNDS, Cell, cells
from tests.faults.grounds import Ground, ground
from tests.faults.points import TRANSFERS, Fault
from tests.flows.servers import cluster
from tests.flows.test_lifecycle import left_behind
from tests.model.builders import checkpoint

LONG = bool(os.environ.get("TRIPTYCH_SOAK"))  # the whole matrix instead of the column of SIGKILL
FAULTS = tuple(Fault) if LONG else (Fault.KILL,)
FAMILY = "qwen2_vl"


class Stand:
    """One server at a time: many cells in a row use the same."""

    def __init__(self) -> None:
        self._where: object = None
        self._open = ExitStack()

    @contextmanager
    def at(self, placement: str, transfer: str) -> Iterator[Ground]:
        if self._where != (placement, transfer):
            self.leave()
            self._ground = self._open.enter_context(self._clean_ground(placement, transfer))
            self._where = (placement, transfer)
        try:
            yield self._ground
        except BaseException:  # what is broken now must not be held against the next cell
            self.leave()
            raise

    def leave(self) -> None:
        self._where = None
        self._open.close()

    @contextmanager
    def _clean_ground(self, placement: str, transfer: str) -> Iterator[Ground]:
        before = left_behind()
        with ground(checkpoint(FAMILY), placement, transfer=transfer) as there:
            yield there
        assert left_behind() <= before


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    there = Stand()
    yield there
    there.leave()


def matrix() -> Iterator[object]:
    """Server by server."""
    for placement in GROUNDS:
        where = (placement, "auto")
        for cell in cells(placement, FAULTS, both=LONG):
            yield pytest.param(where, cell, id=f"{placement}-{cell}")
    where = ("2e1p2d", "nixl")
    for cell in cells(where[0], (Fault.KILL, Fault.STOP), both=False) if LONG else ():
        if cell.moment in TRANSFERS:
            yield pytest.param(where, cell, id=f"{where[0]}-nixl-{cell}")


@pytest.mark.parametrize(("where", "cell"), list(matrix()))
def test_no_client_sees_that_an_instance_fails(stand: Stand, where: tuple[str, str], cell: Cell) -> None:
    with stand.at(*where) as servers:
        assert_nobody_sees(servers, cell)


def assert_nobody_sees(servers: Ground, cell: Cell) -> None:
    asks = batch(hash_of(cell, servers), stream=cell.stream)
    right = servers.right(asks)
    servers.wait_until_whole()
    before, num_logged = servers.pids(), len(servers.log.texts)
    number = servers.arm(cell.moment, cell.fault, cell.role, len(asks))
    try:
        found = servers.differences(asks, right)
        fired = servers.points.fired(number)
        assert fired is not None, f"nobody was ever {cell.moment}; {found}"
        assert not found, f"{fired.instance} failed; {found}"
        if cell.fault is Fault.BREAK:
            servers.find_broken(fired)
        servers.wait_until_replaced(fired)
        servers.wait_until_whole()
    finally:
        servers.points.disarm()
    replaced = {id for id, pid in servers.pids().items() if before[id] != pid}
    assert fired.instance in replaced
    if cell.fault is not Fault.BREAK:  # of which it cannot be told at once which side is to blame
        assert replaced == {fired.instance}, cluster(servers.url)
    assert servers.log.texts[num_logged:] == []


def hash_of(cell: Cell, servers: Ground) -> int:
    """Of no other cell of the same server."""
    servers.num_asked += 1
    return servers.num_asked * 1_000_003 + len(str(cell))
