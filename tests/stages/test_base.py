"""Surroundings: when a sequence ends, and which tickets are worth pulling."""

from typing import Any

import msgspec
import pytest

from tests.builders import make_near, make_sampling, make_ticket
from triptych.core import FinishReason, RequestId, Sequence
from triptych.stages.base import USUAL_ANSWER_TOKENS, Gone, foreseen

EOS, STOP_TOKEN, WORD = 0, 7, 5


def finish(token: int = WORD, *, num_output: int = 2, **sampling: object) -> FinishReason | None:
    near = make_near()
    near.eos_token_ids = frozenset({EOS})
    near.max_model_len = 20
    params = msgspec.structs.replace(make_sampling(max_tokens=4), **sampling)
    prompt = [WORD] * 10
    return near.finish_of(Sequence(RequestId("r"), prompt + [WORD] * (num_output - 1) + [token], len(prompt), params))


def test_a_sequence_goes_on_until_something_ends_it():
    assert finish() is None


def test_the_end_of_sequence_token_stops_unless_it_is_ignored():
    assert finish(EOS) is FinishReason.STOP
    assert finish(EOS, ignore_eos=True) is None


def test_a_stop_token_stops_even_when_the_end_of_sequence_is_ignored():
    assert finish(STOP_TOKEN, stop_token_ids=(STOP_TOKEN,), ignore_eos=True) is FinishReason.STOP


@pytest.mark.parametrize("token", [EOS, STOP_TOKEN])
def test_nothing_stops_before_min_tokens(token):
    stops = {"stop_token_ids": (STOP_TOKEN,), "min_tokens": 3}
    assert finish(token, num_output=2, **stops) is None
    assert finish(token, num_output=3, **stops) is FinishReason.STOP


def test_max_tokens_and_the_length_of_the_model_end_a_sequence():
    assert finish(num_output=4) is FinishReason.LENGTH
    assert finish(num_output=9, max_tokens=100) is None
    assert finish(num_output=10, max_tokens=100) is FinishReason.LENGTH


def test_a_stop_on_the_last_possible_token_counts_as_stop():
    assert finish(EOS, num_output=4) is FinishReason.STOP


@pytest.mark.parametrize(
    ("sampling", "num_output", "expected"),
    [
        ({"max_tokens": 100}, 30, 70),
        ({"max_tokens": 4000}, 30, USUAL_ANSWER_TOKENS),  # hardly anybody uses all that is allowed
        ({"max_tokens": 4000, "min_tokens": 1000}, 30, 970),
        ({"max_tokens": 4000, "ignore_eos": True}, 30, 3970),
        ({"max_tokens": 4000, "ignore_eos": True, "stop_token_ids": (7,)}, 30, USUAL_ANSWER_TOKENS),
    ],
)
def test_a_usual_answer_is_foreseen_unless_more_is_certain(sampling: dict[str, Any], num_output: int, expected: int):
    assert foreseen(msgspec.structs.replace(make_sampling(), **sampling), num_output) == expected


def test_a_ticket_of_an_earlier_incarnation_is_stale():
    near = make_near("p0", p0="p", e0="e")
    assert not near.is_stale(make_ticket("e0"))
    assert near.is_stale(make_ticket("e0", epoch="0"))
    assert near.is_stale(make_ticket("p0", epoch="0"))
    assert not near.is_stale(make_ticket("e9")), "who is not known yet may be new"


def test_requests_that_left_are_remembered_and_the_oldest_forgotten():
    gone = Gone()
    for i in range(Gone.MAX_REMEMBERED + 1):
        gone.add(RequestId(str(i)))
    assert "0" not in gone
    assert "1" in gone
    assert str(Gone.MAX_REMEMBERED) in gone
