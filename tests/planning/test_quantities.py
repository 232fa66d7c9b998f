"""Numbers with units: what text means, what is refused, and that nothing is lost on the way to text and back."""

import math
import pickle
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from triptych.planning.quantities import (
    MOST,
    Bytes,
    BytesPerSecond,
    DollarsPerHour,
    FlopPerSecond,
    PerSecond,
    PositiveSeconds,
    Quantity,
    Seconds,
)

KINDS: list[type[Quantity]] = [
    Seconds,
    PositiveSeconds,
    Bytes,
    PerSecond,
    BytesPerSecond,
    FlopPerSecond,
    DollarsPerHour,
]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Seconds, "50 ms", 0.05),
        (Seconds, "2s", 2.0),
        (Seconds, " 1.5 min ", 90.0),
        (Seconds, "0.5 h", 1800.0),
        (Seconds, "3e2 us", 0.0003),
        (Seconds, ".5 ns", 0.5e-9),
        (Bytes, "80 GB", 80e9),
        (Bytes, "2 GiB", 2 * 2**30),
        (PerSecond, "3 req/s", 3.0),
        (PerSecond, "90 req/min", 1.5),
        (PerSecond, "36 req/h", 0.01),
        (BytesPerSecond, "2039 GB/s", 2.039e12),
        (BytesPerSecond, "1 KiB/s", 1024.0),
        (FlopPerSecond, "312 TFLOP/s", 312e12),
        (DollarsPerHour, "1.29 USD/h", 1.29),
    ],
)
def test_text_is_read_in_its_unit(kind: type[Quantity], text: str, value: float) -> None:
    assert kind.parse(text) == value
    assert type(kind.parse(text)) is kind


@pytest.mark.parametrize("value", [2, 2.5, 0, "2", " 7e3 "])
def test_a_bare_number_is_refused_with_the_units(value: object) -> None:
    with pytest.raises(ValueError, match="has no unit; use h, min, s, ms, us or ns"):
        Seconds.parse(value)


@pytest.mark.parametrize(
    "value", ["", "fast", "s", "two s", "1,5 s", "\u0661 s", "1_000 s", "0x2 s", None, True, [], {}]
)
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"is not a number with its unit; use h, min|has the unit"):
        Seconds.parse(value)


@pytest.mark.parametrize(
    ("kind", "text", "hint"),
    [
        (Seconds, "5 GB", r"has the unit 'GB'; use h, min, s, ms, us or ns$"),
        (Seconds, "5 MS", r"did you mean ms\?"),
        (Bytes, "80 gb", r"did you mean GB\?"),
        (PerSecond, "3 req/sec", r"did you mean req/s\?"),
        (FlopPerSecond, "312 TFLOPS", r"did you mean TFLOP/s\?"),
        (DollarsPerHour, "2 EUR", r"use USD/h$"),
    ],
)
def test_another_unit_is_refused_with_the_one_that_was_meant(kind: type[Quantity], text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        kind.parse(text)


@pytest.mark.parametrize("text", ["-1 s", "-0.001 ms", "nan s", "inf s", "-Infinity h", "1e400 s", "1e999999999999 s"])
def test_negative_and_infinite_numbers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is out of range; a finite number of at least 0 is needed"):
        Seconds.parse(text)


@pytest.mark.parametrize("kind", [PositiveSeconds, PerSecond, BytesPerSecond, FlopPerSecond])
def test_a_time_in_which_nothing_can_happen_and_a_rate_at_which_nothing_comes_are_refused(kind: type[Quantity]) -> None:
    unit = kind.base_unit()
    for text in (f"0 {unit}", f"-2 {unit}", f"nan {unit}", f"1e-999 {unit}"):
        with pytest.raises(ValueError, match=f"^'{text}' is out of range; a finite number above 0 is needed"):
            kind.parse(text)
    with pytest.raises(ValueError, match=f"0.0 {unit} is out of range; a finite number above 0 is needed"):
        kind(0)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_may_be_0_is_read_and_written_as_0(kind: type[Quantity]) -> None:
    if kind.has_zero:
        assert kind.parse(str(kind(0))) == 0


def test_messages_have_three_digits_and_files_all_of_them() -> None:
    assert Bytes(25_340_307_046.4).short() == "25.3 GB"
    assert str(Bytes(25_340_307_046.4)) == "25.3403070464 GB"
    assert [Seconds(0).short(), Seconds(0.9996).short(), Bytes(999_700).short()] == ["0 s", "1 s", "1 MB"]


def test_a_number_that_only_the_unit_makes_infinite_is_refused() -> None:
    with pytest.raises(ValueError, match="out of range"):
        Seconds.parse("1e308 h")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_no_quantity_holds_what_no_file_may_say(value: float) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Bytes(value)


@pytest.mark.parametrize("kind", KINDS)
@given(value=st.floats(min_value=0, max_value=MOST, exclude_min=True))
@example(value=5e-324)
@example(value=MOST)
def test_text_gives_exactly_the_same_number_back(kind: type[Quantity], value: float) -> None:
    assert kind.parse(str(kind(value))) == value


@pytest.mark.parametrize("kind", KINDS)
def test_every_unit_is_exactly_as_many_of_the_base_unit_as_it_says(kind: type[Quantity]) -> None:
    for unit, factor in kind.units.items():
        assert kind.parse(f"3 {unit}") == pytest.approx(float(3 * Fraction(factor)), rel=1e-15)


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (Seconds(0.05), "50 ms"),
        (Seconds(2), "2 s"),
        (Seconds(0), "0 s"),
        (Seconds(7200), "7200 s"),
        (Seconds(1.25e-10), "1.25e-10 s"),
        (Bytes(80e9), "80 GB"),
        (Bytes(57_344), "57.344 kB"),
        (BytesPerSecond(2.039e12), "2.039 TB/s"),
        (PerSecond(0.08), "0.08 req/s"),
        (FlopPerSecond(312e12), "312 TFLOP/s"),
    ],
)
def test_a_number_is_written_in_a_unit_that_people_can_read(quantity: Quantity, text: str) -> None:
    assert str(quantity) == text == f"{quantity}"


def test_a_quantity_is_a_float_for_everybody_who_computes() -> None:
    assert Seconds(2) + 1 == 3.0
    assert f"{Seconds(2):.1f}" == "2.0"
    assert repr(Seconds(2)) == "Seconds(2.0)"
    assert pickle.loads(pickle.dumps(Seconds(2))) == Seconds(2)
