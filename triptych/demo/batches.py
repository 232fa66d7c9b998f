"""Rows of equal length as tensors, and who may attend to whom in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triptych.demo.facts import NUM_FACTS
from triptych.demo.questions import Question
from triptych.demo.rows import NONE, Row, Scene

_ROUND_TO = 32  # lengths are rounded up so that few different shapes occur


@dataclass(slots=True)
class Batch:
    ids: Tensor  # [rows, length]
    positions: Tensor  # [3, rows, length]
    branches: Tensor  # [rows, length], 0 for what all branches see, NONE after the end
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


def collate(rows: Sequence[Row], scenes: list[Scene], questions: list[list[Question]], pad_id: int) -> Batch:
    length = -(-max(len(row.ids) for row in rows) // _ROUND_TO) * _ROUND_TO
    ids = np.full((len(rows), length), pad_id)
    branches = np.full((len(rows), length), NONE)
    positions = np.zeros((3, len(rows), length), np.int64)
    learn = np.zeros((len(rows), length), bool)
    points_to = np.full((len(rows), length), NONE)
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
