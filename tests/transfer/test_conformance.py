"""What every transport promises, shown on each of them between real processes."""

import os
import random
import selectors
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import pytest
import torch

from tests.transfer.holders import SIZES, Holder, Reader, holding, reading
from triptych.errors import InstanceError
from triptych.messages import Peer
from triptych.transfer.base import StaleTicketError
from triptych.transfer.select import Mode

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["shm", "nixl"])
def mode(request: pytest.FixtureRequest) -> Mode:
    if request.param == "nixl" and find_spec("nixl_cu13") is None and find_spec("nixl_cu12") is None:
        pytest.skip("NIXL is not installed")
    return cast(Mode, request.param)


@pytest.fixture(scope="module")
def holder(mode: Mode) -> Iterator[Holder]:
    """For the tests that leave it as it is."""
    with holding(mode) as holder:
        yield holder


def pull(reader: Reader, holder: Holder, source: list[int], target: list[int], region: str = "kv") -> Any:
    """The error of one pull, or None; fails when it does not settle."""
    reader.transfers.pull("it", holder.ticket(source, region), target)
    (result,) = reader.wait()
    assert result.key == "it"
    return result.error


def test_blocks_of_both_regions_arrive_where_they_were_wanted_and_nowhere_else(mode: Mode, holder: Holder) -> None:
    with reading(mode, holder) as reader:
        for region in SIZES:
            num_blocks = SIZES[region][1]
            source, target = random.sample(range(num_blocks), 40), random.sample(range(num_blocks), 40)
            assert pull(reader, holder, source, target, region) is None
            assert reader.has(holder.peer, source, target, region)
            others = sorted(set(range(num_blocks)) - set(target))
            assert not reader.region(region)[others].any()


def test_a_whole_region_arrives_in_one_pull(mode: Mode, holder: Holder) -> None:
    with reading(mode, holder) as reader:
        every = list(range(SIZES["kv"][1]))
        assert pull(reader, holder, every, every) is None
        assert reader.has(holder.peer, every, every)


def test_many_pulls_from_two_holders_are_under_way_together(mode: Mode, holder: Holder) -> None:
    with holding(mode, name="p1", epoch="other") as other, reading(mode, holder, other) as reader:
        source = {index: [index * 4 + 3, index * 4, index * 4 + 1, index * 4 + 2] for index in range(128)}
        for index, blocks in source.items():
            reader.transfers.pull(index, (holder, other)[index % 2].ticket(blocks), blocks[::-1])
        results = reader.wait(len(source))
        assert {result.key for result in results} == set(source)
        assert [result.error for result in results] == [None] * len(source)
        assert all(reader.has((holder, other)[i % 2].peer, blocks, blocks[::-1]) for i, blocks in source.items())
        assert reader.transfers.counters == {"pulls": 128, "pulled_bytes": 128 * 4 * SIZES["kv"][0], "pull_failures": 0}


def test_a_ticket_of_another_incarnation_is_refused_and_nothing_is_read(mode: Mode, holder: Holder) -> None:
    with reading(mode, holder) as reader:
        reader.transfers.pull("old", holder.ticket([1], epoch="before"), [1])
        (result,) = reader.wait()
        assert isinstance(result.error, StaleTicketError)
        assert not reader.region().any()


def test_a_ticket_that_cannot_be_pulled_comes_back_as_an_error(mode: Mode, holder: Holder) -> None:
    with reading(mode) as reader:
        assert "not connected" in str(pull(reader, holder, [1], [1]))
        reader.transfers.connect(holder.peer)
        assert "outside" in str(pull(reader, holder, [SIZES["kv"][1]], [1]))
        assert "no region" in str(pull(reader, holder, [1], [1], region="latents"))
        assert pull(reader, holder, [1], [1]) is None
        reader.transfers.disconnect(holder.peer.id)
        assert "not connected" in str(pull(reader, holder, [1], [1]))


@pytest.mark.parametrize("moment_s", [0, 0.002, 0.01])
def test_every_pull_from_a_holder_that_is_killed_ends_in_the_right_bytes_or_in_an_error(
    mode: Mode, moment_s: float
) -> None:
    with holding(mode) as holder, reading(mode, holder) as reader:
        blocks = list(range(SIZES["kv"][1]))
        for key in range(60):  # of 16 MiB each
            random.shuffle(blocks)
            reader.transfers.pull(key, holder.ticket(list(blocks)), list(blocks))
        time.sleep(moment_s)
        holder.kill()
        results = reader.wait(60, timeout_s=30)
        assert {result.key for result in results} == set(range(60))
        assert reader.transfers.overdue(0) == []
        if all(result.error is None for result in results):
            assert reader.has(holder.peer, blocks, blocks)
        if mode == "nixl":
            assert isinstance(pull(reader, holder, [1], [1]), InstanceError)


def test_a_holder_that_died_before_the_first_pull_gives_an_error(mode: Mode) -> None:
    with holding(mode) as holder, reading(mode) as reader:
        holder.kill()
        reader.transfers.connect(holder.peer)
        assert isinstance(pull(reader, holder, [1], [1]), InstanceError)


def test_the_next_incarnation_of_a_killed_holder_is_read_and_the_old_one_no_more(mode: Mode) -> None:
    with holding(mode) as old, holding(mode, epoch="second") as new, reading(mode, old) as reader:
        assert pull(reader, old, [5], [6]) is None
        old.kill()
        reader.transfers.connect(new.peer)
        assert isinstance(pull(reader, old, [7], [8]), StaleTicketError)
        assert pull(reader, new, [7], [8]) is None
        assert reader.has(new.peer, [7], [8])
        assert reader.has(old.peer, [5], [6])


def test_a_pull_that_fails_is_complained_of_once(mode: Mode) -> None:
    with holding(mode) as holder, reading(mode) as reader:
        holder.kill()
        reader.transfers.connect(holder.peer)
        assert isinstance(pull(reader, holder, [1], [1]), InstanceError)
        (complaint,) = reader.transfers.complaints()
        assert (complaint.holder, complaint.epoch) == (holder.peer.id, holder.peer.epoch)
        assert reader.transfers.complaints() == []


def test_nobody_complains_of_a_holder_that_is_known_to_be_gone(mode: Mode) -> None:
    with holding(mode) as old, holding(mode, epoch="second") as new, reading(mode, old) as reader:
        reader.transfers.connect(new.peer)
        assert isinstance(pull(reader, old, [7], [8]), StaleTicketError)
        reader.transfers.disconnect(new.peer.id)
        assert isinstance(pull(reader, new, [7], [8]), InstanceError)
        assert reader.transfers.complaints() == []


def test_a_pull_that_does_not_settle_in_time_is_complained_of_once(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    with holding(mode) as holder, reading(mode, holder) as reader:
        reader.transfers.pull("it", holder.ticket([1]), [1])  # done or not, it is not delivered before it is taken
        assert reader.transfers.complaints() == []
        monkeypatch.setattr("triptych.transfer.select.PULL_DEADLINE_S", -1.0)
        (complaint,) = reader.transfers.complaints()
        assert "has not settled" in complaint.error
        assert reader.transfers.complaints() == []
        assert [result.error for result in reader.wait()] == [None]
        assert reader.transfers.num_under_way == 0


def test_a_region_of_another_layout_is_refused(mode: Mode) -> None:
    other = {"kv": (32 << 10, 16, "kv-float32")}
    smaller = {"kv": (16 << 10, 16, "kv-bfloat16")}
    elsewhere = {"embedding": SIZES["embedding"]}
    with holding(mode, sizes=other) as holder, reading(mode) as reader:
        with pytest.raises(InstanceError, match="kv-float32"):
            reader.transfers.connect(holder.peer)
        with pytest.raises(InstanceError, match="16384"):
            reader.transfers.connect(holder.ask("carve", smaller))
        reader.transfers.connect(holder.ask("carve", elsewhere))


def test_a_slab_that_is_carved_anew_is_read_without_a_new_incarnation(mode: Mode) -> None:
    with holding(mode) as holder, reading(mode, holder) as reader:
        assert pull(reader, holder, [1], [2]) is None
        sizes = {"embedding": (4 << 10, 400, "embedding-float32"), "kv": (32 << 10, 100, "kv-bfloat16")}
        holder.peer = holder.ask("carve", sizes)
        reader.transfers.connect(holder.peer)
        reader.slab.carve(sizes)
        assert pull(reader, holder, [399, 300], [350, 7], region="embedding") is None
        assert reader.has(holder.peer, [399, 300], [350, 7], region="embedding")


def test_connecting_again_and_to_itself_changes_nothing(mode: Mode, holder: Holder) -> None:
    with reading(mode, holder) as reader:
        itself = Peer(reader.id, holder.peer.role, "", "", reader.transfers.describe())
        for peer in (holder.peer, itself, holder.peer):
            reader.transfers.connect(peer)
        reader.transfers.disconnect(reader.id)
        assert pull(reader, holder, [3], [4]) is None


def test_the_wake_descriptor_is_readable_until_the_results_are_taken(mode: Mode, holder: Holder) -> None:
    with reading(mode, holder) as reader, selectors.DefaultSelector() as selector:
        selector.register(reader.transfers.wake_fd, selectors.EVENT_READ)
        assert selector.select(0.05) == []
        reader.transfers.pull("it", holder.ticket([1]), [1])
        assert reader.transfers.overdue(0) == ["it"]
        assert reader.transfers.overdue(60) == []
        assert len(selector.select(10)) == 1
        assert [result.key for result in reader.transfers.completed()] == ["it"]
        assert selector.select(0.05) == []
        assert reader.transfers.completed() == []
        assert reader.transfers.overdue(0) == []


def test_a_connected_pair_without_work_takes_no_processor_time(mode: Mode, holder: Holder) -> None:
    with reading(mode, holder) as reader:
        assert pull(reader, holder, [1], [1]) is None
        here, there = time.process_time(), holder.ask("process_time")
        time.sleep(1)
        assert time.process_time() - here < 0.05
        assert holder.ask("process_time") - there < 0.05


def test_nothing_is_left_in_shared_memory_after_closing_or_killing(mode: Mode) -> None:
    before = shared_memory()
    with holding(mode) as killed, holding(mode, name="p1") as closed, reading(mode, killed, closed) as reader:
        assert pull(reader, killed, [1], [1]) is None
        assert pull(reader, closed, [1], [1]) is None
        killed.kill()
        closed.ask("close")
        closed.process.join(10)
        assert closed.process.exitcode == 0
    assert shared_memory() == before


def shared_memory() -> list[str]:
    """But for what the OpenMP runtime of every process of the machine keeps there."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith("__KMP_REGISTERED_LIB_"))
