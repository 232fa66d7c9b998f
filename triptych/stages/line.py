"""Sequences that wait, in the order of their arrival, and what is foreseen for them."""

from collections import OrderedDict
from collections.abc import Iterator

from triptych.core import RequestId, Sequence
from triptych.stages.base import foreseen_tokens


class Line:
    """However many wait: each is found by its id, and their tokens are not counted anew. Nothing changes about a
    sequence while it is in a line."""

    def __init__(self) -> None:
        self._sequences: OrderedDict[RequestId, Sequence] = OrderedDict()
        self.foreseen_tokens = 0  # of all together

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._sequences

    @property
    def first(self) -> Sequence:
        return next(iter(self._sequences.values()))

    def append(self, sequence: Sequence) -> None:
        assert sequence.request_id not in self._sequences, f"{sequence.request_id} waits already"
        self._sequences[sequence.request_id] = sequence
        self.foreseen_tokens += foreseen_tokens(sequence)

    def put_first(self, sequence: Sequence) -> None:
        """It goes before all others."""
        self.append(sequence)
        self._sequences.move_to_end(sequence.request_id, last=False)

    def pop_first(self) -> Sequence:
        return self._left(self._sequences.popitem(last=False)[1])

    def pop_last(self) -> Sequence:
        return self._left(self._sequences.popitem()[1])

    def take(self, request_id: RequestId) -> Sequence | None:
        """Out of its turn; None if it is not in this line."""
        sequence = self._sequences.pop(request_id, None)
        return None if sequence is None else self._left(sequence)

    def _left(self, sequence: Sequence) -> Sequence:
        self.foreseen_tokens -= foreseen_tokens(sequence)
        return sequence
