"""All placements of so many GPUs, none twice, and each of them a point of a search."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planning.places import make_candidate
from triptych.core import Role, unserved
from triptych.planning.search.space import Space

PAPER = Space(  # section E.4: stages apart on eight GPUs
    num_gpus=8, roles=(Role.E, Role.P, Role.D), parallel_encode=(True, False)
)


def names(space: Space) -> list[str]:
    return [str(candidate) for candidate in space.bases()]


def test_three_gpus_have_all_placements_of_up_to_three_roles():
    found = names(Space(num_gpus=3))
    assert {"1epd", "2epd", "3epd", "1e1p1d", "1e1pd", "2e1pd", "1ep1d", "1ed1p", "1e1epd", "1ep1pd"} <= set(found)
    assert len(found) == len(set(found))
    assert not any("4" in name for name in found)


def test_the_papers_space_has_21_ways_to_split_eight_gpus():
    whole = [candidate for candidate in PAPER.candidates() if candidate.num_gpus == 8]
    placements = {str(candidate) for candidate in whole}
    assert len(placements) == 21
    assert "6e1p1d" in placements
    assert len(whole) == 21 + 15  # spread or not, where there is more than one encoder


@given(st.integers(1, 6), st.sets(st.sampled_from(list(Role)), min_size=1), st.sampled_from([(1,), (1, 2), (2, 4)]))
def test_every_placement_serves_every_stage_and_no_more_gpus_are_used_than_there_are(num_gpus, roles, degrees):
    found = list(Space(num_gpus=num_gpus, roles=tuple(roles), degrees=degrees).bases())
    assert len(found) == len(set(found))
    for candidate in found:
        assert not unserved(candidate.placement.roles)
        assert set(candidate.placement.roles) <= roles
        assert candidate.num_gpus <= num_gpus
        assert {candidate.degree(role) for role in candidate.family} <= set(degrees)


def test_roles_that_serve_a_stage_in_common_have_the_same_degree():
    for candidate in Space(num_gpus=8, degrees=(1, 2)).bases():
        by_stage = [{candidate.degree(role) for role in candidate.family if stage in role.stages} for stage in "epd"]
        assert all(len(degrees) == 1 for degrees in by_stage), candidate


def test_a_degree_is_told_with_the_placement():
    assert str(make_candidate("4e1p1d", degrees=(1, 2, 2))) == "4e1p(2)1d(2)"
    assert make_candidate("4e1p1d", degrees=(1, 2, 2)).num_gpus == 8


WIDE = Space(
    num_gpus=6,
    degrees=(1, 2),
    max_num_seqs=(64, 16),
    parallel_encode=(True, False),
    schedule=("fcfs", "slo"),
)
CANDIDATES = list(WIDE.candidates())


@given(st.sampled_from(CANDIDATES))
def test_every_candidate_is_a_point_of_a_search(candidate):
    assert WIDE.at(WIDE.point(candidate)) == candidate


@given(st.data())
def test_every_point_is_a_candidate_or_has_too_few_gpus(data: st.DataObject):
    point = {
        "family": data.draw(st.integers(0, len(WIDE.families) - 1)),
        "gpus": data.draw(st.integers(1, 6)),
        **{f"degree_{stage}": data.draw(st.sampled_from((1, 2))) for stage in "epd"},
        **{f"split_{index}": data.draw(st.floats(0, 1)) for index in range(2)},
        **{name: data.draw(st.sampled_from(values)) for name, values in WIDE.options.items()},
    }
    candidate = WIDE.at(point)
    family = WIDE.families[point["family"]]
    assert candidate is None or (candidate in set(CANDIDATES) and candidate.family == family)
    if candidate is None:
        assert point["gpus"] < sum(2 for _ in family)


def test_neighbours_differ_in_one_thing():
    start = make_candidate("2e1p1d")
    found = list(WIDE.neighbours(start))
    assert start not in found
    for candidate in found:
        counts, others = Counter(start.placement.roles), Counter(candidate.placement.roles)
        moved = max((counts - others).total(), (others - counts).total())
        changed = sum(getattr(start, name) != getattr(candidate, name) for name in WIDE.options)
        assert moved + changed == 1 or (moved == 1 and candidate.num_serving(Role.E.stages[0]) == 1)
    assert {"1e2p1d", "2e2p1d", "2e1pd"} <= {str(one) for one in found} | {"2e1pd"}


@pytest.mark.parametrize(("placement", "is_aggregated"), [("3epd", True), ("1e2epd", False), ("1e1p1d", False)])
def test_aggregated_is_what_does_everything_everywhere(placement: str, is_aggregated: bool):
    assert make_candidate(placement).is_aggregated is is_aggregated
