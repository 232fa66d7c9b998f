"""How much is asked of the server and how fast it answers, in a few numbers: for whoever sets roles of instances."""

from collections.abc import Mapping
from dataclasses import dataclass

from triptych.config import AdmissionConfig
from triptych.core import Stage
from triptych.router.waiting import Kind

_TTFT_WEIGHT = 0.1  # of the newest in a moving average: about the last ten answers
_GAP_WEIGHT = 0.005  # about the last two hundred tokens


@dataclass(frozen=True, slots=True)
class Pressure:
    """A snapshot. What instances have been given already is in their `Load`s, except for the decodes of what is not
    prefilled yet: whoever will do them has not heard of them."""

    queued_s: Mapping[Stage, float]  # predicted seconds of one instance's work that wait at the frontend
    decode_ahead_s: float  # the same, of decodes of what is being encoded or prefilled
    waiting: Mapping[Kind, int]  # sequences
    predicted_wait_s: Mapping[Kind, float]
    ttft_s: float | None  # recent mean; None before the first answer
    tpot_s: float | None
    ttft_slack_s: float | None  # objective less mean: negative where it is missed; None without either of them
    tpot_slack_s: float | None


class AnswerTimes:
    """Moving averages of the time to first token and of the time per token after it."""

    def __init__(self) -> None:
        self.ttft_s: float | None = None
        self.tpot_s: float | None = None

    def first(self, after_s: float) -> None:
        self.ttft_s = after_s if self.ttft_s is None else self.ttft_s + _TTFT_WEIGHT * (after_s - self.ttft_s)

    def next(self, gap_s: float, times: int = 1) -> None:
        """So many tokens with that time between two of them."""
        weight = _GAP_WEIGHT if times == 1 else 1.0 - (1.0 - _GAP_WEIGHT) ** times
        self.tpot_s = gap_s if self.tpot_s is None else self.tpot_s + weight * (gap_s - self.tpot_s)

    def slack_s(self, admission: AdmissionConfig) -> tuple[float | None, float | None]:
        return _slack_s(admission.slo_ttft_ms, self.ttft_s), _slack_s(admission.slo_tpot_ms, self.tpot_s)


def _slack_s(objective_ms: float | None, mean_s: float | None) -> float | None:
    return None if objective_ms is None or mean_s is None else objective_ms / 1000 - mean_s
