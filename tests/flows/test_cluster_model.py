"""Random clusters of stages under random work: everything ends, every answer is exact, nothing leaks."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.flows.cluster_model import Ask, Scenario, play

PLACEMENTS = [
    "1e1p1d", "1e1pd", "1ep1d", "1ed1p", "1epd", "2e2p2d", "2epd", "2e1p1d", "1e2p1d", "2ep1d", "2ep2d", "2ed1p",
    "2ed2p", "1e2pd", "1e2pd1d", "1e1p1pd", "1ep1pd", "1e1p1epd", "1ed1ep",
]  # fmt: skip

asks = st.builds(
    Ask,
    pictures=st.lists(st.integers(0, 6), max_size=4).map(tuple),
    text=st.integers(1, 8),
    max_tokens=st.integers(1, 24),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    at=st.integers(0, 150),
    abort_at=st.one_of(st.none(), st.none(), st.integers(0, 600)),
)


@st.composite
def scenarios(draw, failures: bool):
    return Scenario(
        placement=draw(st.sampled_from(PLACEMENTS)),
        asks=tuple(draw(st.lists(asks, min_size=1, max_size=12))),
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


settled = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

BURST = tuple(Ask((i, i % 3, i % 5)[: i % 4], text=2 + i % 5, max_tokens=16, n=1 + i % 2) for i in range(16))


@given(scenarios(failures=False))
@settled
def test_every_request_is_answered_exactly_and_nothing_leaks(scenario):
    play(scenario)


@given(scenarios(failures=True))
@settled
def test_failures_end_the_requests_that_they_hit_and_no_others(scenario):
    play(scenario)


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
            num_offloads += instance.decode.num_offloads if instance.decode is not None else 0
            num_cached += instance.cache.num_hits
            num_evicted += instance.cache.num_evicted
    assert min(num_offloads, num_evicted, num_cached) > 0, "the pools were not small enough to show anything"


def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind():
    for moment in range(0, 120, 3):
        asks = (Ask((0, 1), n=2, max_tokens=9, abort_at=moment), Ask((1, 2), max_tokens=9))
        cluster = play(Scenario("2e1p1d", asks, seed=moment))
        assert [answer.finish is not None for answer in cluster.answers.values() if answer.ask == 1] == [True]
