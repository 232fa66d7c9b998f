"""A line keeps its order, finds everybody by name, and knows what is foreseen for all without counting them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triptych.core import RequestId, SamplingParams, Sequence
from triptych.stages.base import foreseen_tokens
from triptych.stages.line import Line


def make_sequence(name: str, max_tokens: int = 10) -> Sequence:
    return Sequence(RequestId(name), [0] * 5, 4, SamplingParams(max_tokens=max_tokens, seed=0))


def test_who_waits_already_does_not_come_again():
    line = Line()
    line.append(make_sequence("a"))
    with pytest.raises(AssertionError, match="a waits already"):
        line.append(make_sequence("a"))


class Lines(RuleBasedStateMachine):
    """Against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line()
        self.model: list[Sequence] = []
        self.count = 0

    @rule(first=st.booleans(), max_tokens=st.integers(1, 400))
    def add(self, first: bool, max_tokens: int) -> None:
        self.count += 1
        sequence = make_sequence(f"r{self.count}", max_tokens)
        if first:
            self.line.put_first(sequence)
            self.model.insert(0, sequence)
        else:
            self.line.append(sequence)
            self.model.append(sequence)

    @precondition(lambda self: self.model)
    @rule(last=st.booleans())
    def pop(self, last: bool) -> None:
        popped = self.line.pop_last() if last else self.line.pop_first()
        assert popped is self.model.pop(-1 if last else 0)

    @rule(number=st.integers(1, 12))
    def take(self, number: int) -> None:
        wanted = RequestId(f"r{number}")
        there = next((sequence for sequence in self.model if sequence.request_id == wanted), None)
        assert (wanted in self.line) == (there is not None)
        assert self.line.take(wanted) is there
        if there is not None:
            self.model.remove(there)

    @invariant()
    def it_is_the_list(self) -> None:
        assert list(self.line) == self.model
        assert len(self.line) == len(self.model)
        assert self.line.foreseen_tokens == sum(map(foreseen_tokens, self.model))
        assert not self.model or self.line.first is self.model[0]


TestLines = Lines.TestCase
TestLines.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
