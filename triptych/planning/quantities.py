"""Numbers with a dimension, as files and flags spell them: "50 ms", "80 GB", "2039 GB/s". In the code they are floats.

Text to number and back is decimal arithmetic, so that what was written is read as exactly the same float.
"""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, ClassVar, Self

NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[+-]?(?:nan|inf(?:inity)?)\b)\s*", re.I)
LEAST_SHOWN, MOST_SHOWN = 1, 1000  # a number is written in the unit that brings it between these
MOST = 1e30  # of any base unit: more is a mistake, and a product of some such numbers is still finite


class Quantity(float):
    """A number of at least 0 in the base unit of its class: the one whose factor is 1. Subclasses say which there are.

    Raises ValueError where it is negative, above `MOST` or not a number, and 0 where the class has none. `str` gives
    the exact text for files, `short` one for messages.
    """

    units: ClassVar[Mapping[str, Decimal]]  # how many of the base unit each is
    written: ClassVar[tuple[str, ...]]  # the units that text is written in, largest first: powers of ten of each other
    has_zero: ClassVar[bool] = True  # whether 0 is one of them
    __slots__ = ()

    def __new__(cls, value: float) -> Self:
        if not cls._is_valid(value):
            raise ValueError(f"{float(value)!r} {cls.base_unit()} is out of range; {cls._valid_range()}")
        return super().__new__(cls, value)

    @classmethod
    def _is_valid(cls, value: float) -> bool:
        return value <= MOST and (value >= 0 if cls.has_zero else value > 0)

    @classmethod
    def _valid_range(cls) -> str:
        return f"a finite number {'of at least 0' if cls.has_zero else 'above 0'} is needed, at most {MOST:g}"

    @classmethod
    def base_unit(cls) -> str:
        return next(unit for unit, factor in cls.units.items() if factor == 1)

    @classmethod
    def known_units(cls) -> str:
        *others, last = cls.units
        return f"{', '.join(others)} or {last}" if others else last

    @classmethod
    def parse(cls, value: Any) -> Self:
        """What a file or a flag says. Raises ValueError that names the units."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            raise ValueError(f"{value!r} has no unit; use {cls.known_units()}")
        found = NUMBER.match(value) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"{value!r} is not a number with its unit; use {cls.known_units()}")
        number, unit = found[1], value[found.end() :].strip()
        if not unit:
            raise ValueError(f"{value!r} has no unit; use {cls.known_units()}")
        if unit not in cls.units:
            raise ValueError(f"{value!r} has the unit {unit!r}; use {cls.known_units()}{_meant(unit, cls.units)}")
        if not math.isfinite(float(number)) or not cls._is_valid(float(Decimal(number) * cls.units[unit])):
            raise ValueError(f"{value!r} is out of range; {cls._valid_range()}")
        return cls(float(Decimal(number) * cls.units[unit]))

    def __str__(self) -> str:
        """In the unit that gives the number at most three digits before the point. `parse` gives the same back."""
        exact = Decimal(float.__repr__(self))
        scaled = {unit: exact / self.units[unit] for unit in self.written}
        readable = (unit for unit, number in scaled.items() if LEAST_SHOWN <= number < MOST_SHOWN)
        unit = next(readable, self.base_unit())
        return f"{_plain(scaled[unit])} {unit}"

    def short(self) -> str:
        """With three significant digits."""
        return str(type(self)(float(f"{float(self):.3g}")))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({float.__repr__(self)})"


def _meant(unit: str, units: Mapping[str, Decimal]) -> str:
    """The known one that differs only in its letters' case, or hardly."""
    same = [known for known in units if known.lower() == unit.lower()]
    close = same or get_close_matches(unit, units, n=1, cutoff=0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _plain(number: Decimal) -> str:
    number = number.normalize()
    return f"{number:f}" if number == 0 or -6 <= number.adjusted() < 16 else f"{number:e}"


ONE = Decimal(1)
BYTES = {"TB": ONE.scaleb(12), "GB": ONE.scaleb(9), "MB": ONE.scaleb(6), "kB": ONE.scaleb(3), "B": ONE}
BINARY = {unit: Decimal(1024) ** power for unit, power in {"TiB": 4, "GiB": 3, "MiB": 2, "KiB": 1}.items()}


class Seconds(Quantity):
    units: ClassVar = {
        "h": Decimal(3600),
        "min": Decimal(60),
        "s": ONE,
        "ms": ONE.scaleb(-3),
        "us": ONE.scaleb(-6),
        "ns": ONE.scaleb(-9),
    }
    written = ("s", "ms", "us", "ns")
    __slots__ = ()


class PositiveSeconds(Seconds):
    """A time in which something is to happen."""

    has_zero = False
    __slots__ = ()


class Bytes(Quantity):
    units: ClassVar = BYTES | BINARY
    written = tuple(BYTES)
    __slots__ = ()


class PerSecond(Quantity):
    """Requests a second: at a rate of 0 none would ever come."""

    has_zero = False
    units: ClassVar = {"req/s": ONE, "req/min": 1 / Decimal(60), "req/h": 1 / Decimal(3600)}
    written = ("req/s",)
    __slots__ = ()


class BytesPerSecond(Quantity):
    has_zero = False
    units: ClassVar = {f"{unit}/s": factor for unit, factor in (BYTES | BINARY).items()}
    written = tuple(f"{unit}/s" for unit in BYTES)
    __slots__ = ()


class FlopPerSecond(Quantity):
    has_zero = False
    units: ClassVar = {
        "PFLOP/s": ONE.scaleb(15),
        "TFLOP/s": ONE.scaleb(12),
        "GFLOP/s": ONE.scaleb(9),
        "MFLOP/s": ONE.scaleb(6),
        "FLOP/s": ONE,
    }
    written = ("PFLOP/s", "TFLOP/s", "GFLOP/s", "MFLOP/s", "FLOP/s")
    __slots__ = ()


class DollarsPerHour(Quantity):
    units: ClassVar = {"USD/h": ONE}
    written = ("USD/h",)
    __slots__ = ()


def percent(share: float) -> str:
    """As exact as people give shares: 99.5%, which is not 100%."""
    return f"{100 * share:.4g}%"


PixelSize = str  # "WIDTHxHEIGHT". Whoever has one checks it: msgspec 0.22 may crash on patterns (its issue 717)


def parse_pixels(text: str) -> tuple[int, int]:
    """Width and height of "4032x3024". Raises ValueError."""
    found = re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if found is None:
        raise ValueError(f"{text!r} is no size in pixels; use WIDTHxHEIGHT such as 4032x3024, each from 1 to 99999")
    return int(found[1]), int(found[2])
