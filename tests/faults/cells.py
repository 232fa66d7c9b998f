"""The kill matrix: which moments exist for which role, and a placement in which an instance of it gets there."""

from dataclasses import dataclass

from tests.faults.points import Fault, Moment

# Placement, the role that fails in it, and the moments that it can be at. Some have a second instance of that role,
# some have not, so that requests must wait until it is back.
GROUNDS: dict[str, dict[str, tuple[Moment, ...]]] = {
    "2e1p2d": {
        "e": (Moment.QUEUED, Moment.ENCODING, Moment.EMBEDDING),
        "p": (
            Moment.QUEUED,
            Moment.EMBEDDING,
            Moment.PREFILLING,
            Moment.BETWEEN,
            Moment.KV,
            Moment.FINISHING,
            Moment.FINISHED,
        ),
        "d": (Moment.QUEUED, Moment.KV, Moment.DECODING, Moment.FINISHING, Moment.FINISHED),
    },
    "1e2p1d": {
        "e": (Moment.QUEUED, Moment.ENCODING, Moment.EMBEDDING),
        "p": (Moment.QUEUED, Moment.EMBEDDING, Moment.PREFILLING, Moment.BETWEEN, Moment.KV),
        "d": (Moment.QUEUED, Moment.KV, Moment.DECODING, Moment.FINISHING, Moment.FINISHED),
    },
    "1e1pd1d": {
        "pd": (
            Moment.QUEUED,
            Moment.EMBEDDING,
            Moment.PREFILLING,
            Moment.BETWEEN,
            Moment.KV,
            Moment.DECODING,
            Moment.FINISHING,
            Moment.FINISHED,
        ),
    },
    "1e1p1pd": {"pd": (Moment.QUEUED, Moment.KV, Moment.DECODING)},
    "2epd": {
        "epd": (
            Moment.QUEUED,
            Moment.ENCODING,
            Moment.PREFILLING,
            Moment.BETWEEN,
            Moment.DECODING,
            Moment.FINISHING,
            Moment.FINISHED,
        ),
    },
    "1epd": {"epd": (Moment.QUEUED, Moment.ENCODING, Moment.PREFILLING, Moment.DECODING, Moment.FINISHING)},
}


@dataclass(frozen=True)
class Cell:
    role: str
    moment: Moment
    fault: Fault
    stream: bool

    def __str__(self) -> str:
        return f"{self.role}-{self.moment}-{self.fault}-{'stream' if self.stream else 'whole'}"


def cells(placement: str, faults: tuple[Fault, ...], *, both: bool) -> list[Cell]:
    """All of them, with streams and without; else every second one with, the others without."""
    found = [
        Cell(role, moment, fault, stream)
        for role, moments in GROUNDS[placement].items()
        for moment in moments
        for fault in faults
        for stream in (True, False)
    ]
    return found if both else [found[2 * index + index % 2] for index in range(len(found) // 2)]
