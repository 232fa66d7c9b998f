"""A request that ends every instance which works on it is refused after the second; nobody else notices."""

import random
from dataclasses import replace

import pytest

from tests.faults.asking import Ask, difference
from tests.faults.batches import batch, body, image
from tests.faults.grounds import ground
from tests.faults.points import Moment, Poison
from tests.model.builders import checkpoint

SEED = 666
ENDING = b"poison"


def poisoned(*, stream: bool) -> Ask:
    rng = random.Random("poison")
    return Ask(body(rng, [image(rng, ENDING)], num_words=30, seed=SEED), stream)


@pytest.mark.parametrize(
    ("placement", "moment", "stream"),
    [
        ("2e1p1d", Moment.ENCODING, False),
        ("1e3p1d", Moment.PREFILLING, True),
        ("1e1p1d", Moment.DECODING, True),
        ("1epd", Moment.PREFILLING, False),
    ],
)
def test_poison_is_refused_after_two_deaths_and_the_third_instance_lives(
    placement: str, moment: Moment, stream: bool
) -> None:
    with ground(checkpoint("qwen2_vl"), placement) as there:
        others = [*batch(1, stream=True), *batch(2, stream=False)]
        right = there.right(others)
        there.points.poison(Poison(moment, SEED, ENDING))
        *answers, refusal = there.ask([*others, poisoned(stream=stream)])
        assert refusal.wrong is not None
        assert refusal.code == "poison", refusal.wrong
        assert refusal.status == (200 if refusal.choices else 500)  # a stream that has begun ends with the error
        pairs = zip(answers, right, strict=True)
        assert [found for each, wanted in pairs if (found := difference(each, wanted))] == []
        assert len(there.points.deaths) == 2, there.points.deaths
        there.wait_until_whole()
        more = [replace(each, stream=not each.stream) for each in batch(3, stream=True)]
        assert not there.differences(more, there.right(more))
        assert len(there.points.deaths) == 2
        there.wait_until_whole()
        assert there.log.texts == []
