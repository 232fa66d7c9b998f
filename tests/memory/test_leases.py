"""Leases: granted once, ended once, by whichever way comes first."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from triptych.core import InstanceId, LeaseId
from triptych.memory.leases import Leases

READER = InstanceId("p0")


def test_a_released_lease_gives_its_content_back_once():
    leases, given_back = Leases(), []
    lease = leases.grant(READER, "rows", lambda: given_back.append("rows"))
    leases.release(lease)
    leases.release(lease)
    assert given_back == ["rows"]
    assert len(leases) == 0


def test_releasing_a_lease_that_never_was_is_nothing():
    Leases().release(LeaseId(99))


def test_a_claimed_lease_hands_its_content_over_and_gives_nothing_back():
    leases, given_back = Leases(), []
    lease = leases.grant(READER, "rows", lambda: given_back.append("rows"))
    assert leases.claim(lease) == "rows"
    assert leases.claim(lease) is None
    leases.release(lease)
    assert given_back == []


def test_the_leases_of_a_dead_reader_are_released_and_no_others():
    leases, given_back = Leases(), []
    for number, reader in enumerate(("p0", "p1", "p0")):
        leases.grant(InstanceId(reader), number, lambda reader=reader: given_back.append(reader))
    assert leases.release_reader(READER) == [0, 2], "what was promised"
    assert given_back == ["p0", "p0"]
    assert len(leases) == 1


def test_what_a_reader_declines_is_the_holder_s_again_and_its_lease_is_over():
    leases, ends = Leases(), []
    lease = leases.grant(READER, "kv", lambda: ends.append("freed"), lambda: ends.append("taken back"))
    leases.decline(lease)
    leases.decline(lease)
    leases.release(lease)
    assert ends == ["taken back"]
    assert len(leases) == 0


def test_what_nobody_wants_back_is_freed_when_it_is_declined():
    leases, ends = Leases(), []
    leases.decline(leases.grant(READER, "rows", lambda: ends.append("freed")))
    assert ends == ["freed"]


class Ledger(RuleBasedStateMachine):
    granted = Bundle("granted")

    def __init__(self):
        super().__init__()
        self.leases = Leases()
        self.live: dict[LeaseId, str] = {}
        self.given_back: list[LeaseId] = []
        self.expected: list[LeaseId] = []

    @rule(target=granted, reader=st.sampled_from(["p0", "p1"]))
    def grant(self, reader):
        name: list[LeaseId] = []
        lease = self.leases.grant(InstanceId(reader), reader, lambda: self.given_back.append(name[0]))
        name.append(lease)
        assert lease not in self.live
        self.live[lease] = reader
        return lease

    @rule(lease=granted)
    def release(self, lease):
        self.leases.release(lease)
        if self.live.pop(lease, None):
            self.expected.append(lease)

    @rule(lease=granted)
    def claim(self, lease):
        assert self.leases.claim(lease) == self.live.pop(lease, None)

    @rule(reader=st.sampled_from(["p0", "p1", "p2"]))
    def lose(self, reader):
        self.leases.release_reader(InstanceId(reader))
        self.expected += [lease for lease, held_by in self.live.items() if held_by == reader]
        self.live = {lease: held_by for lease, held_by in self.live.items() if held_by != reader}

    @invariant()
    def each_lease_ended_once(self):
        assert len(self.leases) == len(self.live)
        assert self.given_back == self.expected


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
