"""Exact match of a saved model on fresh pictures: `python -m triptych.demo.evaluate`.

Uses nothing but plain transformers to answer: picture -> AutoProcessor -> generate, greedy, one request at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor

from triptych.demo import checkpoint_path
from triptych.demo.drawing import draw
from triptych.demo.facts import MAX_PICTURES, random_facts
from triptych.demo.questions import Question, ask

_NO_PICTURE_SHARE = 0.03
_FIRST_SEED = 5_000_000  # far from the seeds of the training pool


@dataclass(frozen=True, slots=True)
class Result:
    num_pictures: int
    kind: str
    question: str
    expected: str
    answer: str

    @property
    def exact(self) -> bool:
        return self.answer == self.expected


class Subject:
    """The model under test."""

    def __init__(self, folder: Path) -> None:
        self._processor = AutoProcessor.from_pretrained(folder)
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, pictures: Sequence[Image.Image], question: str) -> str:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = self._processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = self._model.generate(**inputs, max_new_tokens=32, do_sample=False)
        new_ids = output[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.decode(new_ids, skip_special_tokens=True)).strip()


def fresh_question(seed: int, held_out_wording: bool) -> tuple[list[Image.Image], Question]:
    """Pictures and a question that no training seed produces; 1 to 8 pictures alike, seldom none."""
    rng = random.Random(_FIRST_SEED + seed)
    without = not held_out_wording and rng.random() < _NO_PICTURE_SHARE
    facts = [random_facts(rng) for _ in range(0 if without else rng.randint(1, MAX_PICTURES))]
    pictures = [draw(one, rng) for one in facts]
    return pictures, ask(facts, rng, held_out_wording)


def evaluate(folder: Path, num_questions: int, held_out_wording: bool, first_seed: int = 0) -> list[Result]:
    subject = Subject(folder)
    results = []
    for seed in track(range(first_seed, first_seed + num_questions), description="asking", transient=True):
        pictures, question = fresh_question(seed, held_out_wording)
        answer = subject.answer(pictures, question.text)
        results.append(Result(len(pictures), question.kind, question.text, question.answer, answer))
    return results


def shares(results: Sequence[Result], key: str) -> dict[str, dict[str, float]]:
    """Per value of a field: how many questions, and the percentage answered exactly."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        groups[str(getattr(result, key))].append(result.exact)
    return {
        name: {"questions": len(oks), "exact_percent": round(100 * sum(oks) / len(oks), 1)}
        for name, oks in sorted(groups.items())
    }


def summary(results: Sequence[Result], held_out_wording: bool) -> dict[str, Any]:
    return {
        "wordings": "never seen in training" if held_out_wording else "as in training",
        "questions": len(results),
        "exact_percent": round(100 * sum(result.exact for result in results) / len(results), 1),
        "by_kind": shares(results, "kind"),
        "by_number_of_pictures": shares(results, "num_pictures"),
        "errors": [asdict(result) for result in results if not result.exact],
    }


def _show(report: dict[str, Any]) -> None:
    console = Console()
    for field, title in (("by_kind", "question"), ("by_number_of_pictures", "pictures")):
        table = Table(title, "questions", "exact %")
        for name, row in report[field].items():
            table.add_row(name, str(row["questions"]), str(row["exact_percent"]))
        console.print(table)
    console.print(f"{report['questions']} questions, wordings {report['wordings']}: {report['exact_percent']}% exact")


def _machine(threads: int) -> str:
    cores = f"{os.cpu_count()} cores, {threads} in use"
    return f"{platform.machine()}, {cores}, torch {torch.__version__}, transformers {transformers.__version__}, float32"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m triptych.demo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=checkpoint_path(), help="Hugging Face folder")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--held-wordings", action="store_true", help="only wordings that training never used")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the report here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    results = evaluate(options.model, options.questions, options.held_wordings, options.first_seed)
    seconds = round(time.monotonic() - started, 1)
    report = summary(results, options.held_wordings)
    _show(report)
    if options.json:
        circumstances = {"date": date.today().isoformat(), "machine": _machine(options.threads), "seconds": seconds}
        options.json.write_text(json.dumps({**circumstances, **report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
