"""The stages of an instance as one: what becomes of messages whose receiver is gone."""

from tests.builders import make_embedded, make_near, make_prefilled, make_unit
from triptych.config import SchedulingConfig
from triptych.core import InstanceId, RequestId, Role
from triptych.memory.embedding_cache import EmbeddingCache
from triptych.memory.leases import Leases
from triptych.memory.pools import Pools
from triptych.messages import FRONTEND, Abort, AnyMessage, Share, Wanted
from triptych.stages.group import StageGroup


def undelivered(message: AnyMessage, happened: list[str]) -> list[tuple[InstanceId, AnyMessage]]:
    """`happened`: to the one lease that the instance has given, whose number is 1."""
    leases = Leases()
    lease = leases.grant(InstanceId("p0"), "rows", lambda: happened.append("freed"), lambda: happened.append("back"))
    assert lease == 1
    pools = Pools(leases, embeddings=EmbeddingCache(8, 4))
    return StageGroup(Role.E, make_near(), pools, SchedulingConfig()).undelivered(message)


def test_rows_for_an_instance_that_is_gone_are_free_again():
    happened: list[str] = []
    assert undelivered(make_embedded(lease=1), happened) == []
    assert happened == ["freed"]


def test_kv_for_an_instance_that_is_gone_goes_back_to_its_owner():
    happened: list[str] = []
    assert undelivered(make_prefilled(lease=1), happened) == []
    assert happened == ["back"]


def test_a_unit_that_nobody_is_left_to_share_is_wanted_from_the_frontend():
    unit = make_unit()
    instead = undelivered(Share(RequestId("r"), unit, InstanceId("p0")), [])
    assert instead == [(FRONTEND, Wanted(RequestId("r"), (unit.hash,)))]


def test_what_promised_nothing_is_dropped():
    happened: list[str] = []
    assert undelivered(Abort(RequestId("r")), happened) == []
    assert not happened
