"""A split at a near tie is told from a wrong answer."""

import asyncio
import random

from tests.faults.asking import Ask, ask_all
from tests.faults.batches import batch, body
from tests.faults.ties import possible_texts
from tests.flows.servers import running
from tests.model.builders import checkpoint

TIED = 30_000_120  # a batch with a random number at the very edge of two probabilities in its fourth request


def test_answers_are_among_the_possible_ones_which_are_hardly_ever_more_than_one() -> None:
    folder, asks = checkpoint("qwen2_vl"), batch(1, stream=False)
    with running(folder, "1epd") as url:
        answers = asyncio.run(ask_all(url, asks))
    for each, answer in zip(asks, answers, strict=True):
        for index, choice in answer.choices.items():
            assert possible_texts(folder, each.body, index) == {choice.text}


def test_both_sides_of_a_tie_are_possible() -> None:
    found = possible_texts(checkpoint("qwen2_vl"), batch(TIED, stream=False)[3].body, 0)
    assert len(found) == 2


def test_what_another_seed_says_is_not_possible() -> None:
    folder, wanted = checkpoint("qwen2_vl"), body(random.Random(5), [], temperature=1.0)
    with running(folder, "1epd") as url:
        (other,) = asyncio.run(ask_all(url, [Ask(wanted | {"seed": 1}, stream=False)]))
    assert other.choices[0].text not in possible_texts(folder, wanted, 0)
