"""One training row while it is put together: tokens, their positions, who sees them, and what to learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from triptych.demo.facts import Facts
from triptych.demo.pool import MERGE, Grid
from triptych.demo.questions import Question

NONE = -1  # no picture, no branch
_NAMED_FROM, _SEARCHED_FROM = 1, 2  # layers after which the model should know a picture that is named, or searched for

Position = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture as a row needs it; `index` is the caller's own name for it."""

    facts: Facts
    grid: Grid
    index: int = 0


@dataclass(slots=True)
class Row:
    """Lists with one entry per token, except `known`."""

    ids: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)  # 0 for what all branches see
    positions: list[Position] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    points_to: list[int] = field(default_factory=list)  # the number of the picture that the token should know of
    from_layer: list[int] = field(default_factory=list)  # after which layer it should
    known: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)  # (place, layer) -> facts
    next_position: int = 0

    def add_text(self, ids: Sequence[int], branch: int, learn: bool = False) -> None:
        self._add(ids, branch, [(p, p, p) for p in range(self.next_position, self.next_position + len(ids))], learn)
        self.next_position += len(ids)

    def add_picture(self, grid: Grid, image_id: int, number: int) -> None:
        rows, columns = grid[0] // MERGE, grid[1] // MERGE
        start = self.next_position
        places = [(start, start + i, start + j) for i in range(rows) for j in range(columns)]
        self._add([image_id] * len(places), 0, places, False)
        self.points_to[-len(places) :] = [number] * len(places)
        self.next_position += max(rows, columns)

    def hint(self, question: Question) -> None:
        """Says what the last token so far, where the answer begins, should know of the question."""
        if question.picture is not None:
            self.points_to[-1] = question.picture
            self.from_layer[-1] = _NAMED_FROM if question.names_picture else _SEARCHED_FROM
        for layer, facts in ((1, question.sought), (2, question.found)):
            if facts:
                self.known[len(self.ids) - 1, layer] = facts

    def _add(self, ids: Sequence[int], branch: int, positions: list[Position], learn: bool) -> None:
        self.ids += ids
        self.branches += [branch] * len(ids)
        self.positions += positions
        self.learn += [learn] * len(ids)
        self.points_to += [NONE] * len(ids)
        self.from_layer += [0] * len(ids)
