"""How many sequences may be with the instances at once."""

AIM = 0.7  # part of the objective that the mean time per token is kept below: single answers are slower than the mean
WEIGHT = 0.02  # of the newest gap in the moving average: about the last fifty
EVERY_S = 0.25  # between two corrections
LESS, MORE = 0.85, 1.0  # times the number, and on top of it


class Slots:
    """As many as decode together, and a few that are prefilled: one more would get its first token and then wait.

    Fewer while answers miss their objective for the time per token: what is sent slows down all that decode. Like a
    congestion window it shrinks by a part and grows one by one.
    """

    def __init__(self, per_decode: int, slo_tpot_s: float | None = None) -> None:
        """`per_decode`: sequences that one instance decodes together."""
        self._per_decode = per_decode
        self._slo_tpot_s = slo_tpot_s
        self._gap_s: float | None = None
        self._most: float | None = None  # None: no correction was needed so far
        self._corrected_at = 0.0

    def observe(self, gap_s: float, num_out: int, now: float) -> None:
        """The time between two tokens of an answer, while so many sequences are with the instances."""
        if self._slo_tpot_s is None:
            return
        self._gap_s = gap_s if self._gap_s is None else self._gap_s + WEIGHT * (gap_s - self._gap_s)
        if now - self._corrected_at >= EVERY_S:
            self._corrected_at = now
            self._correct(self._gap_s > AIM * self._slo_tpot_s, num_out)

    def number(self, num_decode: int, few: int) -> int:
        """With so many instances that decode, and so `few` sequences that prefill always has, to batch them."""
        capacity = self._per_decode * num_decode + few
        return capacity if self._most is None else max(min(capacity, int(self._most)), few)

    def _correct(self, is_slow: bool, num_out: int) -> None:
        if is_slow:
            self._most = LESS * (num_out if self._most is None else min(self._most, num_out))
        elif self._most is not None and num_out >= self._most - 1:
            self._most += MORE
