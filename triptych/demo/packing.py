"""Packs conversations into training rows.

A row is one conversation's pictures followed by several questions ("branches") that share them: a branch sees the
pictures and itself, and its positions start right after the pictures, so each is exactly a one-question prompt.
Some rows are real conversations of several turns instead. Does not know where picture features come from.

    branch     0 0 0 0 0 0 0 0   1 1 1 1 1 1   2 2 2 2 2
    tokens     Picture 1:<image> What ... red  How ... 3
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerFast

from triptych.demo.batches import Batch, collate
from triptych.demo.questions import KIND_SHARES, Question, ask
from triptych.demo.rows import Row, Scene
from triptych.demo.tokenizer import IMAGE
from triptych.demo.wordings import SYSTEMS

_TURNS_SHARE, _TEXT_FIRST_SHARE, _SYSTEM_SHARE = 0.15, 0.1, 0.15


class Packer:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, shares: Mapping[str, float] = KIND_SHARES) -> None:
        """`shares`: how often each kind of question is asked."""
        self._tokenizer, self._shares = tokenizer, shares
        self._pad_id = int(tokenizer.pad_token_id)
        self._image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))
        self._encoded: dict[str, list[int]] = {}

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
        scenes_in_order = [scene for scenes in conversations for scene in scenes]
        return collate(rows, scenes_in_order, questions, self._pad_id)

    def _row(
        self, scenes: Sequence[Scene], num_questions: int, rng: random.Random, held_out: bool, only_branches: bool
    ) -> tuple[Row, list[Question]]:
        row = Row()
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

    def _add_branches(self, row: Row, scenes: Sequence[Scene], questions: Sequence[Question]) -> None:
        self._text(row, "<|im_start|>user\n")
        self._pictures(row, scenes, 0)
        fork = row.next_position
        for branch, question in enumerate(questions, start=1):
            row.next_position = fork
            self._text(row, question.text, branch)
            self._answer(row, question, branch)

    def _add_turns(self, row: Row, scenes: Sequence[Scene], rng: random.Random) -> list[Question]:
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

    def _pictures(self, row: Row, scenes: Sequence[Scene], first: int) -> None:
        for number, scene in enumerate(scenes, start=first):
            self._text(row, f"Picture {number + 1}:<|vision_start|>")
            row.add_picture(scene.grid, self._image_id, number)
            self._text(row, "<|vision_end|>")

    def _answer(self, row: Row, question: Question, branch: int) -> None:
        self._text(row, "<|im_end|>\n<|im_start|>assistant\n", branch)
        row.hint(question)
        row.add_text(self._encode(question.answer + "<|im_end|>"), branch, learn=True)

    def _text(self, row: Row, text: str, branch: int = 0) -> None:
        row.add_text(self._encode(text), branch)

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            if len(self._encoded) > 300_000:
                self._encoded.clear()
            self._encoded[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._encoded[text]
