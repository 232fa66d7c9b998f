"""Random clusters of stages under random work, deaths and role switches: all ends, every answer is exact, nothing
leaks."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.flows.cluster_model import Cluster, play
from tests.flows.model_instance import PLACEMENTS, Ask, Scenario, Turn, random_scenario, restless_scenario
from triptych.core import InstanceId, Placement, Role

asks = st.builds(
    Ask,
    pictures=st.lists(st.integers(0, 6), max_size=4).map(tuple),
    text=st.integers(1, 8),
    max_tokens=st.integers(1, 24),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    at=st.integers(0, 150),
    abort_at=st.one_of(st.none(), st.none(), st.integers(0, 600)),
)


turns = st.builds(
    Turn,
    at=st.integers(0, 600),
    subject=st.integers(0, 7),
    what=st.sampled_from(["kill", "kill", "stay", "end", *Role]),
)


@st.composite
def scenarios(draw, failures: bool, changes: bool = False):
    return Scenario(
        placement=draw(st.sampled_from(PLACEMENTS)),
        asks=tuple(draw(st.lists(asks, min_size=1, max_size=12))),
        turns=tuple(draw(st.lists(turns, min_size=1, max_size=10))) if changes else (),
        kv_blocks=draw(st.integers(8, 24)),
        more_kv_blocks=draw(st.sampled_from([0, 0, 3, 12])),
        embedding_blocks=draw(st.integers(4, 12)),
        max_num_seqs=draw(st.integers(1, 6)),
        budget=draw(st.integers(4, 40)),
        max_encode_tokens=draw(st.integers(4, 24)),
        streamed=draw(st.booleans()),
        chunked_transfer=draw(st.booleans()),
        prefix_caching=draw(st.booleans()),
        state_blocks=draw(st.sampled_from([0, 0, 0, 2])),
        lies=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        whole_spans=draw(st.booleans()),
        pull_failures=draw(st.sampled_from([0.1, 0.4])) if failures else 0.0,
        encode_failures=draw(st.sampled_from([0.0, 0.1, 0.4])) if failures else 0.0,
        seed=draw(st.integers(0, 1 << 16)),
    )


settled = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])

BURST = tuple(Ask((i, i % 3, i % 5)[: i % 4], text=2 + i % 5, max_tokens=16, n=1 + i % 2) for i in range(16))


@given(scenarios(failures=False))
@settled
def test_every_request_is_answered_exactly_and_nothing_leaks(scenario):
    play(scenario)


@given(scenarios(failures=True))
@settled
def test_a_unit_that_cannot_be_encoded_ends_its_requests_and_a_pull_that_fails_ends_none(scenario):
    play(scenario)


@given(scenarios(failures=False, changes=True))
@settled
def test_whoever_dies_or_changes_its_role_every_request_is_answered_exactly_and_nothing_leaks(scenario):
    play(scenario)


@given(scenarios(failures=True, changes=True))
@settled
def test_deaths_role_switches_and_failures_together_cost_no_answer_either(scenario):
    play(scenario)


# Each of these once hung, leaked or gave a wrong answer.
@pytest.mark.parametrize("seed", [198, 280, 294, 309, 435, 620, 760, 1262, 1568, 1601, 1924, 5248, 5337, 6175])
def test_what_broke_a_cluster_once_does_not_again(seed):
    play(random_scenario(seed))


def test_a_request_that_gave_its_kv_up_while_another_started_is_not_forgotten():
    play(restless_scenario(647))


@pytest.mark.parametrize("first", [100_000, 100_100, 100_200])
def test_a_hundred_random_clusters(first):
    for seed in range(first, first + 100):
        play((random_scenario, restless_scenario)[seed % 2](seed))


def test_units_that_an_encode_instance_gives_back_never_wait_behind_those_of_younger_requests():
    """Whose embeddings fill the other one, and are pulled only when the older request is done."""
    for seed in range(40):
        asks = tuple(Ask((3 * i, 3 * i + 1, 3 * i + 2)[: 1 + i % 3], text=1, max_tokens=2) for i in range(20))
        leaves = Turn(at=20 + 2 * seed, subject=1, what="d")
        cluster = play(
            Scenario("2e1p1d", asks, (leaves,), 24, embedding_blocks=6 + seed % 4, max_num_seqs=2, seed=seed)
        )
        assert cluster.instances[InstanceId("e0")].num_fittings == 2


def test_the_random_clusters_see_everything_that_can_happen():
    seen: Counter[str] = Counter()
    for seed in range(60):
        seen.update(play(random_scenario(seed)).seen)
    wanted = ("kill", "switched", "retry", "pull from the dead", "Declined", "Wanted", "Share", "Prefilling", "Located")
    assert {name for name in wanted if not seen[name]} == set()


SWITCHES = [
    ("1e1p2d", "d0", "p"),
    ("2e1p1d", "e0", "d"),
    ("1e2p1d", "p0", "d"),
    ("1e1p2d", "d0", "e"),
    ("2epd", "epd0", "e"),
]


@pytest.mark.parametrize(("placement", "name", "role"), SWITCHES)
def test_an_instance_that_changes_its_role_under_load_costs_no_answer_at_any_moment(placement, name, role):
    for moment in range(1, 400, 21):
        cluster = Cluster(Scenario(placement, BURST, kv_blocks=14, embedding_blocks=8, seed=moment))
        subject = sorted(cluster.instances).index(InstanceId(name))
        cluster.turn_later(Turn(moment, subject, role))
        cluster.run()
        cluster.check_answers()
        assert all(answer.finish is not None for answer in cluster.answers.values())
        assert cluster.instances[InstanceId(name)].num_fittings == 2
        assert not cluster.seen["kill"]


@pytest.mark.parametrize("placement", ["2e2p2d", "1e1p1d", "2epd"])
def test_every_instance_may_die_at_any_moment(placement):
    for moment in range(1, 500, 37):
        for subject in range(len(Placement.parse(placement).roles)):
            play(Scenario(placement, BURST[:8], (Turn(moment, subject, "kill"),), seed=moment))


def test_two_decode_instances_that_leave_and_stay_by_turns_never_wait_for_each_other():
    num_declined = 0
    for seed in range(20):
        turns = tuple(Turn(at + seed, at // 15, ("p", "stay")[at % 2]) for at in range(20, 400, 15))
        cluster = play(Scenario("1e1p2d", BURST, turns, kv_blocks=11, prefix_caching=seed % 2 == 0, seed=seed))
        num_declined += cluster.seen["Declined"]
    assert num_declined, "nothing was ever declined"


@given(st.sampled_from(["1ep1pd", "1e1p1pd", "1e2pd", "2epd"]), st.integers(8, 16), st.integers(0, 1 << 16))
@settings(max_examples=60, deadline=None)
def test_instances_that_prefill_and_decode_never_wait_for_each_other_in_a_circle(placement, kv_blocks, seed):
    play(Scenario(placement, BURST, kv_blocks=kv_blocks, embedding_blocks=5, seed=seed))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_burst_through_tiny_pools_is_held_back_offloaded_evicted_and_still_answered_exactly(placement):
    num_offloads = num_evicted = num_cached = 0
    for seed in range(6):
        cluster = play(Scenario(placement, BURST, kv_blocks=11, embedding_blocks=5, seed=seed))
        assert all(answer.finish is not None for answer in cluster.answers.values())
        for instance in cluster.instances.values():
            num_offloads += instance.num_offloads
            num_cached += instance.cache.num_hits
            num_evicted += instance.cache.num_evicted
    assert min(num_offloads, num_evicted, num_cached) > 0, "the pools were not small enough to show anything"


def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind():
    for moment in range(0, 120, 3):
        asks = (Ask((0, 1), n=2, max_tokens=9, abort_at=moment), Ask((1, 2), max_tokens=9))
        cluster = play(Scenario("2e1p1d", asks, seed=moment))
        assert [answer.finish is not None for answer in cluster.answers.values() if answer.ask == 1] == [True]
