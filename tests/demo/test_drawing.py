import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.demo.drawing import MAX_ASPECT, MAX_SIDE, MIN_SIDE, draw
from triptych.demo.facts import NUM_FACTS, Facts, fact_directions, fact_vector, number_directions, random_facts

seeds = st.integers(0, 2**32)


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_the_same_seed_draws_the_same_picture(seed: int) -> None:
    facts = random_facts(random.Random(seed))
    first, second = (draw(facts, random.Random(seed)) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_pictures_stay_within_the_limits(seed: int) -> None:
    rng = random.Random(seed)
    width, height = draw(random_facts(rng), rng).size
    assert min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE
    assert max(width, height) / min(width, height) < MAX_ASPECT * 1.02


@given(seeds)
def test_facts_survive_the_stored_row(seed: int) -> None:
    facts = random_facts(random.Random(seed))
    assert Facts.from_row(facts.to_row()) == facts


def test_different_facts_have_different_vectors() -> None:
    seen = {facts: fact_vector(facts) for facts in map(random_facts, map(random.Random, range(2000)))}
    told_apart = {(frozenset(facts.things), facts.count, facts.digit) for facts in seen}
    assert len({vector.tobytes() for vector in seen.values()}) == len(told_apart)


def test_directions_are_orthonormal() -> None:
    rows = np.concatenate([fact_directions(192), number_directions(192)])
    assert len(fact_directions(192)) == NUM_FACTS
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)
