"""Packs conversations into training rows.

A row is one conversation's pictures followed by several questions ("branches") that share them: a branch sees the
pictures and itself, and its positions start right after the pictures, so each is exactly a one-question prompt.
Some rows are real conversations of several turns instead. Does not know where picture features come from.

    branch     0 0 0 0 0 0 0 0 0   1 1 1 1 1 1   2 2 2 2 2
    tokens     Picture 1: <image>  What ... red  How ... 3
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from triptych.demo.facts import NUM_FACTS, Facts
from triptych.demo.pool import MERGE, Grid
from triptych.demo.questions import KIND_SHARES, Question, ask
from triptych.demo.tokenizer import IMAGE
from triptych.demo.wordings import SYSTEMS

Shares = Mapping[int, float]

_ROUND_TO = 32  # lengths are rounded up so that few different shapes occur
_TURNS_SHARE, _TEXT_FIRST_SHARE, _SYSTEM_SHARE = 0.15, 0.1, 0.15
_PADDING = _NONE = -1


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture as the packer needs it; `index` is the caller's own name for it."""

    facts: Facts
    grid: Grid
    index: int = 0


@dataclass(slots=True)
class Batch:
    ids: Tensor  # [rows, length]
    positions: Tensor  # [3, rows, length]
    branches: Tensor  # [rows, length], 0 for what all branches see, _PADDING after the end
    learn: Tensor  # bool [rows, length]: answer tokens
    points_to: Tensor  # [rows, length], the number of the picture that this token should know of, or -1
    from_layer: Tensor  # [rows, length], after which layer it should know
    knowers: Tensor  # [tokens, 3] row, column and layer where a prompt's last token should know certain facts
    known: Tensor  # [tokens, facts], those facts, summing to 1
    scenes: list[Scene]  # in the order of their tokens, row by row
    questions: list[list[Question]]  # per row; question i of a row is branch i + 1, unless the row is a conversation

    @property
    def allowed(self) -> Tensor:
        """bool [rows, length, length]: who may attend to whom."""
        query, key = self.branches[:, :, None], self.branches[:, None, :]
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=self.ids.device)
        return causal & ((key == 0) | (key == query)) | itself


@dataclass(slots=True)
class _Row:
    ids: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    points_to: list[int] = field(default_factory=list)
    from_layer: list[int] = field(default_factory=list)
    known: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)  # by place in the row and layer
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

    def _add(self, ids: Sequence[int], branch: int, positions: list[tuple[int, int, int]], learn: bool) -> None:
        self.ids += ids
        self.branches += [branch] * len(ids)
        self.positions += positions
        self.learn += [learn] * len(ids)
        self.points_to += [_NONE] * len(ids)
        self.from_layer += [0] * len(ids)


class Packer:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, shares: Mapping[str, float] = KIND_SHARES) -> None:
        """`shares`: how often each kind of question is asked."""
        self._tokenizer, self._shares = tokenizer, shares
        self._pad_id = int(tokenizer.pad_token_id)
        self._image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))
        self._known: dict[str, list[int]] = {}

    def pack(
        self,
        conversations: Sequence[Sequence[Scene]],
        num_questions: int,
        rng: random.Random,
        *,
        held_out: bool = False,
        only_branches: bool = False,
    ) -> Batch:
        """One row per list of scenes. `only_branches`: no conversations and no system messages."""
        rows, questions = [], []
        for scenes in conversations:
            row, asked = self._row(scenes, num_questions, rng, held_out, only_branches)
            rows.append(row)
            questions.append(asked)
        return self._collate(rows, [scene for scenes in conversations for scene in scenes], questions)

    def _row(
        self, scenes: Sequence[Scene], num_questions: int, rng: random.Random, held_out: bool, only_branches: bool
    ) -> tuple[_Row, list[Question]]:
        row = _Row()
        if not only_branches and rng.random() < _SYSTEM_SHARE:
            self._text(row, f"<|im_start|>system\n{rng.choice(SYSTEMS)}<|im_end|>\n")
        style = rng.random() if scenes and not only_branches else 1.0
        if style < _TURNS_SHARE:
            return row, self._add_turns(row, scenes, rng)
        facts = [scene.facts for scene in scenes]
        if style < _TURNS_SHARE + _TEXT_FIRST_SHARE:
            question = ask(facts, rng, held_out, self._shares)
            self._text(row, f"<|im_start|>user\n{question.text}\n")
            self._pictures(row, scenes, 0)
            self._answer(row, question, branch=0)
            return row, [question]
        questions = [ask(facts, rng, held_out, self._shares) for _ in range(num_questions)]
        self._add_branches(row, scenes, questions)
        return row, questions

    def _add_branches(self, row: _Row, scenes: Sequence[Scene], questions: Sequence[Question]) -> None:
        self._text(row, "<|im_start|>user\n")
        self._pictures(row, scenes, 0)
        fork = row.next_position
        for branch, question in enumerate(questions, start=1):
            row.next_position = fork
            self._text(row, question.text, branch)
            self._answer(row, question, branch)

    def _add_turns(self, row: _Row, scenes: Sequence[Scene], rng: random.Random) -> list[Question]:
        """Two to four turns; pictures come with the first, or some with a later one."""
        questions: list[Question] = []
        shown = len(scenes) if rng.random() < 0.7 else rng.randint(1, len(scenes))
        start = 0
        for turn in range(rng.randint(2, 4)):
            if turn:
                self._text(row, "\n")
            self._text(row, "<|im_start|>user\n")
            self._pictures(row, scenes[start:shown], start)
            question = ask([scene.facts for scene in scenes[:shown]], rng, shares=self._shares)
            self._text(row, question.text)
            self._answer(row, question, branch=0)
            questions.append(question)
            start, shown = shown, len(scenes)
        return questions

    def _pictures(self, row: _Row, scenes: Sequence[Scene], first: int) -> None:
        for number, scene in enumerate(scenes, start=first):
            self._text(row, f"Picture {number + 1}:<|vision_start|>")
            row.add_picture(scene.grid, self._image_id, number)
            self._text(row, "<|vision_end|>")

    def _answer(self, row: _Row, question: Question, branch: int) -> None:
        self._text(row, "<|im_end|>\n<|im_start|>assistant\n", branch)
        if question.picture is not None:
            row.points_to[-1] = question.picture
            row.from_layer[-1] = 1 if question.names_picture else 2
        for layer, facts in ((1, question.sought), (2, question.found)):
            if facts:
                row.known[len(row.ids) - 1, layer] = facts
        row.add_text(self._encode(question.answer + "<|im_end|>"), branch, learn=True)

    def _text(self, row: _Row, text: str, branch: int = 0) -> None:
        row.add_text(self._encode(text), branch)

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 300_000:
                self._known.clear()
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def _collate(self, rows: Sequence[_Row], scenes: list[Scene], questions: list[list[Question]]) -> Batch:
        length = -(-max(len(row.ids) for row in rows) // _ROUND_TO) * _ROUND_TO
        ids = np.full((len(rows), length), self._pad_id)
        branches = np.full((len(rows), length), _PADDING)
        positions = np.zeros((3, len(rows), length), np.int64)
        learn = np.zeros((len(rows), length), bool)
        points_to = np.full((len(rows), length), _NONE)
        from_layer = np.zeros((len(rows), length), np.int64)
        for i, row in enumerate(rows):
            end = len(row.ids)
            ids[i, :end], branches[i, :end], learn[i, :end] = row.ids, row.branches, row.learn
            positions[:, i, :end] = np.array(row.positions).T
            points_to[i, :end], from_layer[i, :end] = row.points_to, row.from_layer
        return Batch(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            branches=torch.from_numpy(branches),
            learn=torch.from_numpy(learn),
            points_to=torch.from_numpy(points_to),
            from_layer=torch.from_numpy(from_layer),
            knowers=torch.tensor([(i, *place) for i, row in enumerate(rows) for place in row.known]).view(-1, 3),
            known=torch.stack([_even(facts) for row in rows for facts in row.known.values()] or [_even(())]),
            scenes=scenes,
            questions=questions,
        )


def _even(facts: Sequence[int]) -> Tensor:
    shares = torch.zeros(NUM_FACTS)
    shares[list(facts)] = 1 / max(1, len(facts))
    return shares
