"""Decode steps in a row over the same sequences: made in one event, with the outcome of single ones."""

from dataclasses import dataclass
from math import ceil, sqrt

from triptych.core import Chunk, SampledToken
from triptych.memory.kv_cache import KVCache

TOKEN = SampledToken(1)


@dataclass(slots=True)
class StepTimes:
    """Of steps in a row over the same sequences: each takes `more_s` longer than the one before it."""

    first_s: float
    more_s: float

    def seconds(self, number: int) -> float:
        """Of the first ones."""
        return number * (self.first_s + 0.5 * (number - 1) * self.more_s)

    def first_after(self, seconds: float, most: int) -> int:
        """The least number of them that take so long, of at most `most`."""
        seconds = max(0.0, seconds)
        linear_s = self.first_s - 0.5 * self.more_s
        # Where linear_s * steps + more_s * steps ** 2 / 2 == seconds, without a difference of large numbers:
        twice_s = linear_s + sqrt(linear_s * linear_s + 2.0 * self.more_s * seconds)
        number = most if most * twice_s <= 2.0 * seconds else max(1, ceil(2.0 * seconds / twice_s))
        while number > 1 and self.seconds(number - 1) >= seconds:  # by rounding
            number -= 1
        while number < most and self.seconds(number) < seconds:
            number += 1
        return number


def num_left(chunks: list[Chunk]) -> list[int]:
    """Steps until each of these sequences ends, which is where it may be no longer."""
    sequences = [chunk.sequence for chunk in chunks]
    return [s.num_prompt_tokens + s.sampling.max_tokens - len(s.token_ids) for s in sequences]


@dataclass(slots=True, eq=False)
class DecodeRow:
    """One that is under way. `context`: tokens of its sequences before it, together."""

    times: StepTimes
    began_s: float
    chunks: list[Chunk]
    context: int
    num_steps: int
    left: list[int]  # steps until the sequence of each chunk ends, as `num_left` says before the row
    silent: list[int]  # steps after which nobody has to hear of a token of each chunk

    def num_begun(self, elapsed_s: float) -> int:
        """The step that runs then is the last of so many."""
        return self.times.first_after(elapsed_s, self.num_steps)

    def num_done(self, elapsed_s: float) -> int:
        num_steps = self.num_begun(elapsed_s)
        return num_steps - (self.times.seconds(num_steps) > elapsed_s)

    def catch_up(self, kv: KVCache, num_steps: int) -> list[Chunk]:
        """Makes so many steps in the books, but for the last one of those chunks that are returned: of these the stage
        has to hear."""
        said: list[Chunk] = []
        tokens = [TOKEN.token_id] * num_steps
        for chunk, num_silent in zip(self.chunks, self.silent, strict=True):
            sequence, made = chunk.sequence, num_steps
            if num_silent < num_steps:
                said.append(chunk)
                made -= 1
                if not made:
                    continue
            sequence.token_ids += tokens if made == num_steps else tokens[1:]
            sequence.num_computed += made
            kv.hold(sequence, sequence.num_computed + num_steps - made)
            kv.seal(sequence)
        return said
