"""How many sequences may be with the instances at once."""

EVERY_S = 0.25  # between two corrections
MEMORY = 0.97  # of what was seen before, at each of them: about the last eight seconds count
AIMS = (0.7, 0.95)  # parts of the objective that the mean time per token is to stay below; the second if need be
LESS, MORE = 0.85, 1.0  # times the number, to see what fewer do; and on top of it
LEAST_SPREAD = 0.05  # of the number of sequences, that tells what one more costs
LEAST_SHARE = 0.1  # of the time per token that comes from how many there are: with less of it, fewer help nobody


class Slots:
    """As many as decode together, and a few that are prefilled: one more would get its first token and then wait.

    Fewer where answers miss an objective for the time per token and fewer would help: it is learned how that time grows
    with the number of sequences, a straight line with forgetting, and the number is where the line meets the objective.
    Where even one sequence misses it, or the line is flat, there is no bound: waiting would only add to the harm.
    """

    def __init__(self, per_decode: int, slo_tpot_s: float | None = None) -> None:
        """`per_decode`: sequences that one instance decodes together."""
        self.has_objective = slo_tpot_s is not None  # else nobody needs to observe anything
        self._per_decode = per_decode
        self._slo_tpot_s = slo_tpot_s
        self._most: float | None = None  # None: no bound is needed, or none would help
        self._line = _Line()
        self._num_gaps = 0
        self._gaps_s = self._outs = 0.0  # their sum, and that of the sequences that were there, since the last time
        self._corrected_at = 0.0

    def observe(self, gap_s: float, num_out: int, now: float, times: int = 1) -> None:
        """The time between two tokens of an answer, so many times, while so many sequences are with the instances."""
        if self._slo_tpot_s is None:
            return
        self._num_gaps += times
        self._gaps_s += times * gap_s
        self._outs += times * num_out
        if now - self._corrected_at >= EVERY_S:
            self._corrected_at = now
            self._correct(self._gaps_s / self._num_gaps, self._outs / self._num_gaps, self._slo_tpot_s)
            self._num_gaps, self._gaps_s, self._outs = 0, 0.0, 0.0

    def number(self, num_decode: int, few: int) -> int:
        """With so many instances that decode, and so `few` sequences that prefill always has, to batch them."""
        capacity = self._per_decode * num_decode + few
        return capacity if self._most is None else max(min(capacity, int(self._most)), few)

    def _correct(self, gap_s: float, num_out: float, slo_s: float) -> None:
        self._line.add(num_out, gap_s)
        if gap_s <= AIMS[0] * slo_s:
            if self._most is not None and num_out >= self._most - 1:
                self._most += MORE
        elif self._most is None or num_out <= self._most + 1:  # else what was decided before has yet to come about
            self._most = self._bound(gap_s, num_out, slo_s)

    def _bound(self, gap_s: float, num_out: float, slo_s: float) -> float | None:
        known = self._line.known
        if known is None:
            return LESS * num_out
        alone_s, each_s = known
        if each_s * num_out < LEAST_SHARE * gap_s:
            return None
        return next((bound for aim in AIMS if (bound := (aim * slo_s - alone_s) / each_s) >= 1), None)


class _Line:
    """The time per token over the number of sequences: least squares in which what is old counts less and less."""

    def __init__(self) -> None:
        self.known: tuple[float, float] | None = None  # at no sequence, and for each; as of when they last differed
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def add(self, num: float, time_s: float) -> None:
        self._weight = MEMORY * self._weight + 1.0
        self._n = MEMORY * self._n + num
        self._t = MEMORY * self._t + time_s
        self._nn = MEMORY * self._nn + num * num
        self._nt = MEMORY * self._nt + num * time_s
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - mean_n * mean_n
        if spread > (LEAST_SPREAD * mean_n) ** 2 and spread > 0.5:
            each_s = max((self._nt / self._weight - mean_n * mean_t) / spread, 0.0)
            self.known = mean_t - each_s * mean_n, each_s
