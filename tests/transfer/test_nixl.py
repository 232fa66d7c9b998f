"""What only NIXL shows: the network path, and a holder that hangs."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import pytest

from tests.transfer.holders import Holder, Reader, context, holding, make_ticket
from triptych.messages import Peer

pytest.importorskip("nixl_cu13")

NETWORK = {"UCX_TLS": "tcp"}  # as between two hosts: no look into the memory of other processes
Scene: TypeAlias = Callable[[Reader, Peer, int], Any]  # with the holder's row and process id


def test_blocks_arrive_over_the_network_path() -> None:
    with holding("nixl", environment=NETWORK) as holder:
        assert played(read_a_few, holder) == [("few", None), True]


def test_reads_from_a_hung_holder_are_overdue_and_arrive_when_it_goes_on() -> None:
    with holding("nixl", environment=NETWORK) as holder:
        assert played(read_until_the_holder_goes_on, holder) == [["hung"], [], ("hung", None), True]


def test_reads_from_a_hung_holder_end_in_errors_when_it_is_killed() -> None:
    with holding("nixl", environment=NETWORK) as holder:
        overdue, early, key, error = played(read_until_the_holder_is_killed, holder)
        assert (overdue, early, key) == (["hung"], [], "hung")
        assert "p0" in str(error)


def test_an_instance_with_a_read_that_never_ends_closes_and_exits() -> None:
    with holding("nixl", environment=NETWORK) as holder:
        assert played(close_while_the_holder_hangs, holder) < 3


def read_a_few(reader: Reader, peer: Peer, _pid: int) -> list[Any]:
    source, target = [5, 9, 6, 7], [1, 2, 3, 0]
    reader.transfers.pull("few", make_ticket(peer, source), target)
    (result,) = reader.wait()
    return [(result.key, result.error), reader.has(peer, source, target)]


def read_until_the_holder_goes_on(reader: Reader, peer: Peer, pid: int) -> list[Any]:
    overdue, early = _read_from_hung(reader, peer, pid)
    os.kill(pid, signal.SIGCONT)
    (result,) = reader.wait()
    return [overdue, early, (result.key, result.error), reader.has(peer, EVERY, EVERY)]


def read_until_the_holder_is_killed(reader: Reader, peer: Peer, pid: int) -> tuple[Any, ...]:
    overdue, early = _read_from_hung(reader, peer, pid)
    reader.transfers.disconnect(peer.id)
    os.kill(pid, signal.SIGKILL)
    (result,) = reader.wait()
    return overdue, early, result.key, result.error


def close_while_the_holder_hangs(reader: Reader, peer: Peer, pid: int) -> float:
    _read_from_hung(reader, peer, pid)
    started = time.monotonic()
    reader.close()
    return time.monotonic() - started


EVERY = list(range(512))


def _read_from_hung(reader: Reader, peer: Peer, pid: int) -> tuple[list[Any], list[Any]]:
    read_a_few(reader, peer, pid)
    os.kill(pid, signal.SIGSTOP)
    reader.transfers.pull("hung", make_ticket(peer, EVERY), EVERY)
    early = reader.wait(timeout_s=0.5)
    return reader.transfers.overdue(0.4), early


def played(scene: Scene, holder: Holder) -> Any:
    """What a scene returns in a process of its own. That this exits by itself is part of every test."""
    here, there = context.Pipe()
    process = context.Process(target=_play, args=(scene, holder.peer, holder.process.pid, there), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(60), "the scene does not end"
        outcome = here.recv()
        process.join(10)
        assert process.exitcode == 0
        return outcome
    finally:
        process.kill()
        process.join()


def _play(scene: Scene, peer: Peer, pid: int, connection: Connection) -> None:
    os.environ.update(NETWORK)
    reader = Reader("nixl")
    reader.transfers.connect(peer)
    connection.send(scene(reader, peer, pid))
    if scene is not close_while_the_holder_hangs:
        reader.close()
