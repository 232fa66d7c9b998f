"""How long to wait before what failed is tried again. Knows no clock: callers say how long things went well."""

FIRST_S = 0.5
LONGEST_S = 30.0
HEALTHY_S = 60.0  # of service, after which earlier failures count no more


class BackOff:
    """0, 0.5, 1, 2, 4, 8, 16, 30, 30 ... seconds."""

    def __init__(self) -> None:
        self._num_failures = 0

    def next_s(self, served_s: float) -> float:
        """After one more failure of what had served for `served_s` before it."""
        if served_s >= HEALTHY_S:
            self._num_failures = 0
        self._num_failures += 1
        if self._num_failures == 1:
            return 0.0
        return float(min(LONGEST_S, FIRST_S * 2 ** min(self._num_failures - 2, 16)))
