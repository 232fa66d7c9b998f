"""How much is fuzzed, and where a run begins: every case is a function of the seed and of its own number.

`TRIPTYCH_FUZZ=10000` asks for the long form, `TRIPTYCH_FUZZ_SEED` for other cases. A failure names its case: with
`TRIPTYCH_FUZZ_FIRST` at its number (and `TRIPTYCH_FUZZ=1` for it alone) the run begins there.
"""

import os
import random

LONG = int(os.environ.get("TRIPTYCH_FUZZ", "0"))
SEED = int(os.environ.get("TRIPTYCH_FUZZ_SEED", "0"))
FIRST = int(os.environ.get("TRIPTYCH_FUZZ_FIRST", "0"))


def numbers(short: int, share: float = 1.0) -> range:
    """Numbers of the cases to try: `short` of them, or in the long form this share of what was asked for."""
    return range(FIRST, FIRST + (max(1, round(LONG * share)) if LONG else short))


def randomness(kind: str, number: int) -> random.Random:
    return random.Random(f"{SEED}/{kind}/{number}")
