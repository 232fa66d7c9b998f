"""The answer of a plan: confirmed rows, what is said of them, and the texts of the files that are made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triptych.planning.search.export import Engine, can_export, export
from triptych.planning.search.goals import Goal
from triptych.planning.search.plan import Curve, Question, Row, reaches
from triptych.planning.search.rivals import Rival
from triptych.planning.search.search import Outcome
from triptych.planning.search.space import Candidate
from triptych.planning.search.verdict import certainties, verdict
from triptych.planning.search.written import as_json, config_text, is_servable, serve_config, serve_line, simulate_line


@dataclass(frozen=True, slots=True)
class Text:
    """Of a file. `note` is what to say of it: that it is not of the first row."""

    content: str
    candidate: Candidate
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    question: Question
    goal: Goal
    outcome: Outcome
    rows: list[Row]  # in order
    curves: list[Curve]
    limit: str | None  # what is said where the SLO leaves hardly any rate
    rival: Rival | None  # who does as well as the first row by luck

    @property
    def suffices(self) -> bool:
        return bool(self.rows) and reaches(self.rows[0], self.goal)

    @property
    def verdict(self) -> str:
        return verdict(self.rows, self.goal, self.question, self.outcome.num_placements, self.limit, self.rival)

    def said(self, repeat: str | None, served: Mapping[str, Any]) -> list[str]:
        """What stands under the rows; `repeat` is the command that repeats the first, `served` what `triptych serve` is
        told of the model."""
        if not self.rows:
            return [self.verdict]
        lines = [self.verdict, *certainties(self.rows, self.question, self.rival)]
        if repeat is not None:
            lines.append(f"The first row again: {repeat}")
        best = self.rows[0]
        return [*lines, serve_line(serve_config(best, self.question, served))] if is_servable(best.candidate) else lines

    def simulate_lines(self, asked: Sequence[str]) -> list[str | None]:
        """Of every row."""
        return [simulate_line(row, self.question, asked) for row in self.rows]

    def texts(self, served: Mapping[str, Any], engine: Engine | None, model: str, title: str) -> dict[str, Text]:
        """`serve`, and `export` where it is asked for, of the first row that can be served, or exported, where there is
        one. `served` is what `triptych serve` is told of the model, `model` what other engines are."""
        texts = {}
        row = next((row for row in self.rows if is_servable(row.candidate)), None)
        if row is not None:
            comments = [
                f"{title}: {row.candidate} kept the SLO at {row.rate:.3g} req/s, as simulated.",
                "Made by `triptych plan` for `triptych serve --config`.",
            ]
            content = config_text(serve_config(row, self.question, served), comments)
            texts["serve"] = Text(content, row.candidate, self._instead(row, "triptych serve runs no"))
        row = next((row for row in self.rows if can_export(row.candidate)), None)
        if engine is not None and row is not None:
            note = self._instead(row, f"{engine} has no equivalent of")
            texts["export"] = Text(export(engine, row.candidate, model, note), row.candidate, note)
        return texts

    def as_json(self, lines: Sequence[str | None], texts: Mapping[str, Text]) -> str:
        files = {name: text.content for name, text in texts.items()}
        return as_json(self.outcome, self.rows, self.question, self.verdict, lines, files)

    def _instead(self, row: Row, cannot: str) -> str | None:
        """What is lost where a row is not the first."""
        best = self.rows[0]
        if row is best:
            return None
        less = f", {1 - row.rate / best.rate:.0%} less than {best.rate:.3g}" if row.rate < best.rate else ""
        return (
            f"{cannot} {best.candidate}: written is {row.candidate}, which keeps the SLO at {row.rate:.3g} req/s{less}."
        )
