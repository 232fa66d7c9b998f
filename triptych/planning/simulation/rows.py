"""Decode steps in a row over the same sequences: made in one event, with the outcome of single ones."""

from dataclasses import dataclass
from math import ceil, sqrt

from triptych.core import Chunk, SampledToken
from triptych.memory.kv_cache import KVCache
from triptych.planning.costs.cost_model import Costs
from triptych.planning.simulation.clock import Event

TOKEN = SampledToken(1)


def first_step_after(costs: Costs, seconds: float, num_sequences: int, context: int, most: int) -> int:
    """The least number of steps that take so long, of at most `most`. `context`: tokens of all, before the first."""
    seconds = max(0.0, seconds)
    more_s = costs.decode_growth_s(num_sequences)
    linear_s = costs.decodes_s(num_sequences, context, 1) - 0.5 * more_s
    # Where linear_s * steps + more_s * steps ** 2 / 2 == seconds, without a difference of large numbers:
    twice_s = linear_s + sqrt(linear_s * linear_s + 2.0 * more_s * seconds)
    number = most if most * twice_s <= 2.0 * seconds else max(1, ceil(2.0 * seconds / twice_s))
    while number > 1 and costs.decodes_s(num_sequences, context, number - 1) >= seconds:  # by rounding
        number -= 1
    while number < most and costs.decodes_s(num_sequences, context, number) < seconds:
        number += 1
    return number


def num_left(chunks: list[Chunk]) -> list[int]:
    """Steps until each of these sequences ends, which is where it may be no longer."""
    sequences = [chunk.sequence for chunk in chunks]
    return [s.num_prompt_tokens + s.sampling.max_tokens - len(s.token_ids) for s in sequences]


@dataclass(slots=True, eq=False)
class DecodeRow:
    """The last of its steps ends with `end`."""

    costs: Costs
    began_s: float
    chunks: list[Chunk]
    context: int
    num_steps: int
    silent: list[int]  # steps after which nobody has to hear of a token of each chunk
    end: Event

    def seconds(self, num_steps: int) -> float:
        """Of the first ones."""
        return self.costs.decodes_s(len(self.chunks), self.context, num_steps)

    def num_begun(self, elapsed_s: float) -> int:
        """The step that runs then is the last of so many."""
        return first_step_after(self.costs, elapsed_s, len(self.chunks), self.context, self.num_steps)

    def num_done(self, elapsed_s: float) -> int:
        num_steps = self.num_begun(elapsed_s)
        return num_steps - (self.seconds(num_steps) > elapsed_s)

    def catch_up(self, kv: KVCache, num_steps: int) -> list[Chunk]:
        """Makes so many steps in the books, but for the last one of those chunks that are returned: of these the stage
        has to hear."""
        said: list[Chunk] = []
        for chunk, num_silent in zip(self.chunks, self.silent, strict=True):
            sequence, made = chunk.sequence, num_steps
            if num_silent < num_steps:
                said.append(chunk)
                made -= 1
            sequence.token_ids += [TOKEN.token_id] * made
            sequence.num_computed += made
            if made:
                kv.hold(sequence, sequence.num_computed + num_steps - made)
                kv.seal(sequence)
        return said
