"""The best candidates of a space: Bayesian search (optuna's TPE), or all of them where they are few.

A trial is first held against a bound that costs nothing, then against the others with a short load, and simulated with
the whole load only if it may be among the best. All decisions are made here, batch by batch, from the results in the
order of the questions: so the outcome depends on the seed, and not on how many processes simulate.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from triptych.core import Placement
from triptych.errors import ConfigError
from triptych.planning.search.evaluation import Evaluator
from triptych.planning.search.goals import Goal
from triptych.planning.search.space import Candidate, Degrees, Space

if TYPE_CHECKING:
    import optuna

BATCH = 8  # trials that are decided on together
FIRST = 64  # trials that begin the search, at most: what work by stages lets expect to be good
FULL_BATCH = 4  # of them are simulated with the whole load before what they reached is the measure for others
PROMISING = 0.9  # of the best, as a short load lets expect, from which on the whole load is worth it
NEAR = 0.9  # of the best rate: what is below is not known exactly
BETTER = 1.005  # than the best, for another setting of a placement that is known
WORTH_RANKING = 0.4  # of the best rate with a short load: what is below is only known to be

Held = TypeVar("Held")
Held_co = TypeVar("Held_co", covariant=True)
Answer = TypeVar("Answer")
Question = TypeVar("Question")
_Rejected = dict[str, set[tuple[Placement, Degrees]]]  # placements that cannot be, by the reason


@dataclass(frozen=True, slots=True)
class Found:
    """A candidate that was simulated with the whole load."""

    candidate: Candidate
    rate: float  # requests a second; 0.0 if it is none, or far from the best
    cost: float  # per hour, in USD or GPUs
    score: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a search. `rejected`: why placements cannot be, with their number."""

    best: list[Found]  # best first
    rejected: dict[str, int]
    num_skipped: int  # by their bound
    num_short: int  # with a short load
    num_full: int
    num_placements: int = 0  # that were looked at, in one way or another, whatever their settings

    def aggregated(self) -> Found | None:
        """The best that does everything on every instance."""
        return next((found for found in self.best if found.candidate.is_aggregated), None)


class Asking(Protocol[Held_co]):
    """Asks what is held, an evaluator for example, about each of these, and gives the answers in their order."""

    def __call__(self, ask: Callable[[Held_co, Question], Answer], about: Iterable[Question], /) -> list[Answer]: ...


@contextmanager
def processes(held: Held, number: int) -> Iterator[Asking[Held]]:
    """Each holds a copy. With one, it is this process."""
    if number == 1:
        yield lambda ask, about: [ask(held, one) for one in about]
        return
    # Not forked: this process may have threads, and draws a progress bar.
    pool = ProcessPoolExecutor(number, get_context("spawn"), _hold, (held,))
    try:
        yield lambda ask, about: list(pool.map(partial(_answer, ask), about))
    finally:
        pool.shutdown(cancel_futures=True)


_held: list[Any] = []  # of a process of the pool


def _hold(held: object) -> None:
    _held.append(held)


def _answer(ask: Callable[[Any, Question], Answer], about: Question) -> Answer:
    return ask(_held[0], about)


# ---- questions


@dataclass(frozen=True, slots=True)
class Trial:
    """The rate of a candidate is asked for, as exactly as it matters."""

    candidate: Candidate
    most: float
    least: float = 0.0
    guess: float | None = None
    short: bool = False


def _kept_rate(evaluator: Evaluator, trial: Trial) -> float:
    return evaluator.kept_rate(
        trial.candidate, short=trial.short, guess=trial.guess, least=trial.least, most=trial.most
    )


# ---- all of them


def enumerate_all(
    space: Space,
    evaluator: Evaluator,
    goal: Goal,
    ask: Asking[Evaluator],
    *,
    advance: Callable[[], None] = lambda: None,
) -> Outcome:
    """Every candidate with the whole load: what a search is measured by. Raises ConfigError where none fits."""
    rejected: _Rejected = {}
    fitting = [one for one in space.candidates() if _fits(evaluator, one, rejected)]
    _require_some(fitting, rejected)
    found: list[Found] = []
    for batch in _batches(fitting, BATCH):
        rates = ask(_kept_rate, [Trial(one, goal.most) for one in batch])
        found += [_found(evaluator, goal, *pair) for pair in zip(batch, rates, strict=True)]
        for _ in batch:
            advance()
    return Outcome(_ranked(found), _numbers(rejected), 0, 0, len(found), _num_placements(fitting))


# ---- the better ones


def search(
    space: Space,
    evaluator: Evaluator,
    goal: Goal,
    ask: Asking[Evaluator],
    *,
    trials: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Outcome:
    """Raises ConfigError where nothing fits. `advance` is called once per trial."""
    return _Search(space, evaluator, goal, ask, trials, seed, advance).run()


@dataclass(slots=True)
class _Search:
    space: Space
    evaluator: Evaluator
    goal: Goal
    ask: Asking[Evaluator]
    num_trials: int
    seed: int
    advance: Callable[[], None]
    short: dict[Candidate, float] = field(default_factory=dict)  # rates with a short load
    full: dict[Candidate, Found] = field(default_factory=dict)
    rejected: _Rejected = field(default_factory=dict)
    skipped: set[Candidate] = field(default_factory=set)
    rest: list[Candidate] = field(default_factory=list)  # all placements, the best guess first
    told: set[Candidate] = field(default_factory=set)  # that the study has been told to try

    def run(self) -> Outcome:
        study = self._study()
        fitting = [one for one in self.space.bases() if _fits(self.evaluator, one, self.rejected)]
        _require_some(fitting, self.rejected)
        self.rest = sorted(fitting, key=lambda one: -self._guessed_score(one))
        first = self._first(fitting)
        self._suggest(study, first)
        done = 0
        while done < self.num_trials:
            number = min(BATCH, self.num_trials - done)
            if done >= len(first) and self.full:
                self._suggest(study, islice(self._beside_the_best(), number // 2))
            self._batch(study, number)
            done += number
        numbers = len(self.skipped), len(self.short), len(self.full)
        return Outcome(
            _ranked(self.full.values()),
            _numbers(self.rejected),
            *numbers,
            _num_placements([*self.skipped, *self.short]),
        )

    def _study(self) -> "optuna.Study":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.seed, multivariate=True, n_startup_trials=BATCH)
        return optuna.create_study(direction="maximize", sampler=sampler)

    def _suggest(self, study: "optuna.Study", candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            self.told.add(candidate)
            study.enqueue_trial(self.space.point(candidate))

    def _first(self, fitting: Sequence[Candidate]) -> list[Candidate]:
        """Where nothing is known yet: the best guess of each family, aggregated instances before all, and the best of
        the others."""
        guessed = sorted(fitting, key=lambda one: -self._guessed_score(one))  # stable: earlier ones first
        heads = sorted(
            {one.family: one for one in reversed(guessed)}.values(),
            key=lambda one: (not one.is_aggregated, -self._guessed_score(one)),
        )
        return list(dict.fromkeys([*heads, *guessed]))[: min(FIRST, self.num_trials // 2)]

    def _beside_the_best(self) -> Iterator[Candidate]:
        """Not tried yet, next to the best of all and to the best aggregated one; best guess first."""
        best = _ranked(self.full.values())
        for found in [*best[:1], *[one for one in best if one.candidate.is_aggregated][:1], *best[1:3]]:
            near = sorted(self.space.neighbours(found.candidate), key=lambda one: -self._guessed_score(one))
            for candidate in near:
                if candidate not in self.told and candidate not in self.short and not self._is_hopeless(candidate):
                    yield candidate

    def _batch(self, study: "optuna.Study", number: int) -> None:
        asked = [study.ask(self._distributions()) for _ in range(number)]
        candidates = [self.space.at(trial.params) for trial in asked]
        fresh = [one for one in dict.fromkeys(candidates) if one is not None and self._is_fresh(one)]
        spare = number - len(fresh)  # proposed again, or hopeless: others have a chance
        fresh += islice((one for one in self.rest if one not in fresh and self._is_fresh(one)), spare)
        self._run_short(fresh)
        self._run_full(fresh)
        for trial, candidate in zip(asked, candidates, strict=True):
            self._tell(study, trial, candidate)
            self.advance()

    def _is_fresh(self, candidate: Candidate) -> bool:
        """Whether a simulation may tell something new."""
        if candidate in self.short or not _fits(self.evaluator, candidate, self.rejected):
            return False
        if self._is_hopeless(candidate):
            self.skipped.add(candidate)
            return False
        return True

    def _is_hopeless(self, candidate: Candidate) -> bool:
        """Even its bound does not reach the best."""
        rivals = self._rivals(candidate)
        return bool(rivals) and self._bound_score(candidate) <= max(one.score for one in rivals)

    def _rivals(self, candidate: Candidate) -> list[Found]:
        """Those that it must beat: an aggregated one the others like it, so that their best is known."""
        return [one for one in self.full.values() if one.candidate.is_aggregated or not candidate.is_aggregated]

    def _run_short(self, candidates: Sequence[Candidate]) -> None:
        trials = [self._short_trial(one) for one in candidates]
        self.short |= dict(zip(candidates, self.ask(_kept_rate, trials), strict=True))

    def _short_trial(self, candidate: Candidate) -> Trial:
        rivals = [rate for one, rate in self.short.items() if one.is_aggregated or not candidate.is_aggregated]
        best = max(rivals, default=0.0)
        return Trial(candidate, self.goal.most, WORTH_RANKING * best, best or None, short=True)

    def _run_full(self, candidates: Sequence[Candidate]) -> None:
        """Those that may be among the best, a few at a time: what these reach is the measure for the others."""
        in_order = sorted(candidates, key=lambda one: -self._short_score(one))
        for some in _batches(in_order, FULL_BATCH):
            promising = [one for one in some if self._is_promising(one)]
            trials = [self._full_trial(one) for one in promising]
            for candidate, rate in zip(promising, self.ask(_kept_rate, trials), strict=True):
                self.full[candidate] = _found(self.evaluator, self.goal, candidate, rate)

    def _full_trial(self, candidate: Candidate) -> Trial:
        """Of another setting of a known placement only what is better matters."""
        needed = self._needed(candidate)
        if not needed:
            return Trial(candidate, self.goal.most)
        is_known = any(one.placement == candidate.placement and one.degrees == candidate.degrees for one in self.full)
        least = min(self.goal.most, needed * (BETTER if is_known else NEAR))
        return Trial(candidate, self.goal.most, least, needed)

    def _needed(self, candidate: Candidate) -> float:
        """The rate with which it is as good as the best; infinite if none is enough."""
        rivals = self._rivals(candidate)
        if not rivals:
            return 0.0
        return self.goal.needed(max(one.score for one in rivals), self.evaluator.cost(candidate))

    def _is_promising(self, candidate: Candidate) -> bool:
        expected = self.short[candidate] * self._usual_ratio()
        return 0 < expected >= PROMISING * self._needed(candidate) and not self._makes_no_difference(candidate)

    def _usual_ratio(self) -> float:
        """Of rates with the whole load to those with a short one, where both are known."""
        ratios = [one.rate / self.short[one.candidate] for one in self.full.values() if one.rate > 0]
        return max(ratios, default=1.0)

    def _makes_no_difference(self, candidate: Candidate) -> bool:
        """Another setting of a known placement with which a short load went exactly as well."""
        return any(
            one.placement == candidate.placement
            and one.degrees == candidate.degrees
            and self.short[one] == self.short[candidate]
            for one in self.full
        )

    def _tell(self, study: "optuna.Study", trial: "optuna.Trial", candidate: Candidate | None) -> None:
        """The score with a short load, or what the bound lets expect."""
        from optuna.trial import TrialState

        if candidate is not None and candidate in self.short:
            study.tell(trial, self._short_score(candidate))
        elif candidate is not None and candidate in self.skipped:
            expected = self.evaluator.bound(candidate) * self._usual_share()
            study.tell(trial, self._score(candidate, expected))
        else:
            study.tell(trial, state=TrialState.PRUNED)

    def _usual_share(self) -> float:
        """Of their bounds that the best reach."""
        best = _ranked(self.full.values())[:3]
        shares = [one.rate / self.evaluator.bound(one.candidate) for one in best]
        return sum(shares) / len(shares) if shares else 1.0

    def _short_score(self, candidate: Candidate) -> float:
        return self._score(candidate, self.short[candidate])

    def _bound_score(self, candidate: Candidate) -> float:
        return self._score(candidate, self.evaluator.bound(candidate))

    def _guessed_score(self, candidate: Candidate) -> float:
        return self._score(candidate, self.evaluator.guess(candidate))

    def _score(self, candidate: Candidate, rate: float) -> float:
        return self.goal.score(min(rate, self.goal.most), self.evaluator.cost(candidate))

    def _distributions(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        space = self.space
        found: dict[str, Any] = {"family": CategoricalDistribution(range(len(space.families)))}
        found["gpus"] = IntDistribution(1, space.num_gpus)
        found |= {f"degree_{stage}": CategoricalDistribution(space.degrees) for stage in "epd"}
        found |= {f"split_{index}": FloatDistribution(0.0, 1.0) for index in range(space.most_roles - 1)}
        return found | {name: CategoricalDistribution(values) for name, values in space.options.items()}


def _fits(evaluator: Evaluator, candidate: Candidate, rejected: _Rejected) -> bool:
    """If not, it is noted with the reason."""
    reason = evaluator.misfit(candidate)
    if reason is not None:
        rejected.setdefault(reason, set()).add((candidate.placement, candidate.degrees))
    return reason is None


def _require_some(fitting: Sequence[Candidate], rejected: _Rejected) -> None:
    if not fitting:
        reasons = sorted(rejected, key=lambda reason: -len(rejected[reason]))
        raise ConfigError("nothing fits: " + reasons[0] if reasons else "--gpus: too few for any placement")


def _numbers(rejected: _Rejected) -> dict[str, int]:
    return {reason: len(placements) for reason, placements in rejected.items()}


def _found(evaluator: Evaluator, goal: Goal, candidate: Candidate, rate: float) -> Found:
    cost = evaluator.cost(candidate)
    return Found(candidate, rate, cost, goal.score(rate, cost))


def _ranked(found: Iterable[Found]) -> list[Found]:
    """Best first; of equal ones the cheapest, then the one that was found first."""
    return sorted(found, key=lambda one: (-one.score, one.cost))


def _num_placements(candidates: Iterable[Candidate]) -> int:
    return len({(one.placement, one.degrees) for one in candidates})


def _batches(items: Sequence[Candidate], size: int) -> Iterator[Sequence[Candidate]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
