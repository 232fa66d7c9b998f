"""Random clusters of stages under random work: everything ends, every answer is exact, nothing leaks."""

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
        whole_spans=draw(st.booleans()),
        pull_failures=draw(st.sampled_from([0.1, 0.4])) if failures else 0.0,
        encode_failures=draw(st.sampled_from([0.0, 0.1, 0.4])) if failures else 0.0,
        seed=draw(st.integers(0, 1 << 16)),
    )


settled = settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(scenarios(failures=False))
@settled
def test_every_request_is_answered_exactly_and_nothing_leaks(scenario):
    play(scenario)


@given(scenarios(failures=True))
@settled
def test_failures_end_the_requests_that_they_hit_and_no_others(scenario):
    play(scenario)
