"""Decode steps in a row over the same sequences: made in one event, with the outcome of single ones."""

from dataclasses import dataclass

from triptych.core import Chunk, SampledToken
from triptych.memory.kv_cache import KVCache
from triptych.planning.costs.cost_model import Costs
from triptych.planning.simulation.clock import Event

TOKEN = SampledToken(1)


def first_step_after(costs: Costs, seconds: float, num_sequences: int, context: int, most: int) -> int:
    """The least number of steps that take so long, of at most `most`. `context`: tokens of all, before the first."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if costs.decodes_s(num_sequences, context, middle) >= seconds:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(slots=True, eq=False)
class DecodeRow:
    """The last of its steps ends with `end`."""

    costs: Costs
    began_s: float
    chunks: list[Chunk]
    context: int
    num_steps: int
    end: Event

    def seconds(self, num_steps: int) -> float:
        """Of the first ones."""
        return self.costs.decodes_s(len(self.chunks), self.context, num_steps)

    def steps_s(self) -> list[float]:
        """Of each one: every sequence looks at one token more than in the one before."""
        number = len(self.chunks)
        fixed = self.costs.decode_fixed_s(number)
        contexts = range(self.context, self.context + number * self.num_steps, number)
        return [fixed + context * self.costs.decode_context for context in contexts]

    def num_begun(self, elapsed_s: float) -> int:
        """The step that runs then is the last of so many."""
        return first_step_after(self.costs, elapsed_s, len(self.chunks), self.context, self.num_steps)

    def num_done(self, elapsed_s: float) -> int:
        num_steps = self.num_begun(elapsed_s)
        return num_steps - (self.seconds(num_steps) > elapsed_s)

    def catch_up(self, kv: KVCache, num_steps: int) -> None:
        """Steps of which the stage is not told, all but the last: only these books change in them."""
        for chunk in self.chunks if num_steps else ():
            sequence = chunk.sequence
            sequence.token_ids += [TOKEN.token_id] * num_steps
            sequence.num_computed += num_steps
            if not kv.has_space(sequence):
                kv.hold(sequence, len(sequence.token_ids))
            kv.seal(sequence)
