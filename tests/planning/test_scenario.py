"""What `triptych simulate` asks of instances: what a server would do, unless it is told otherwise."""

import msgspec
import pytest

from tests.planning.places import make_candidate
from tests.planning.plans import PHOTOS, PROFILE, SHAPE, make_workload
from triptych.config import SHARED_DECODE_INTERVAL_MS
from triptych.core import Role
from triptych.latency import Objectives
from triptych.planning.costs.sizes import Sizes
from triptych.planning.search.scenario import Scenario
from triptych.planning.workloads.kinds import SharedPrefix


def sizes_of(role: Role, placement: str = "1e1p1d", *, cores: int | None = None, alike: bool = False, **told) -> Sizes:
    """Of an instance with that role in a run of few requests, all alike in their beginnings if asked for."""
    costs = msgspec.structs.replace(PROFILE.costs_of_steps, cores=cores)
    kind = msgspec.structs.replace(PHOTOS, shared_prefix=SharedPrefix(tokens=64) if alike else None)
    scenario = Scenario(
        where="photos.json",
        workload=make_workload(kinds={"photos": kind}, num_requests=2),
        rows_of=SHAPE,
        profile=msgspec.structs.replace(PROFILE, costs_of_steps=costs),
        candidate=make_candidate(placement),
        objectives=Objectives(1000.0, 50.0, None),
        max_queue_s=60.0,
        **told,
    )
    return scenario.run(None).simulation.sizes_of(role)


def test_answers_slow_down_for_pictures_where_there_are_more_instances_than_cores_unless_told_otherwise():
    assert sizes_of(Role.D, cores=3).decode_interval_ms == 0.0
    assert sizes_of(Role.D, cores=2).decode_interval_ms == SHARED_DECODE_INTERVAL_MS
    assert sizes_of(Role.D, cores=2, decode_interval_ms=7.0).decode_interval_ms == 7.0
    assert sizes_of(Role.D, cores=2, decode_interval_ms=0.0).decode_interval_ms == 0.0


def test_roles_that_instances_may_get_are_known_and_count_for_no_more_of_them():
    found = sizes_of(Role.P, "2epd", cores=2, adaptive=True)
    assert found.num_kv_blocks > 0
    assert found.decode_interval_ms == 0.0
    with pytest.raises(KeyError):
        sizes_of(Role.P, "2epd", cores=2)


def test_prefixes_are_looked_for_where_there_are_any_and_nobody_forbids_it():
    assert not sizes_of(Role.P).prefix_caching
    assert sizes_of(Role.P, alike=True).prefix_caching
    assert not sizes_of(Role.P, alike=True, prefix_caching=False).prefix_caching
