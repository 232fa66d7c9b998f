"""Files that people write: what is refused, in which words, and that a file is there whole or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from triptych.errors import ConfigError
from triptych.planning import files
from triptych.planning.quantities import MOST, Bytes, PerSecond, Quantity, Seconds


class Slo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ttft: Seconds
    tpot: Seconds | None = None
    attainment: Annotated[float, Meta(gt=0, le=1)] = 0.9

    def __post_init__(self) -> None:
        if self.ttft == 0:
            raise ValueError("ttft: 0 s, which nothing can meet; above 0 s is needed")


class Steady(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="steady"):
    rate: PerSecond


class Bursty(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="bursty"):
    rate: PerSecond
    cv: float = 1.0


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    slo: Slo
    arrivals: Steady | Bursty = Steady(rate=PerSecond(1))
    memory: dict[str, Bytes] = {}
    levels: list[Slo] = []
    size: tuple[int, int] = (1, 2)
    color: Literal["red", "green"] | None = None
    count: Annotated[int, Meta(ge=1)] | None = None
    weight: float = 1.0


GOOD: dict[str, Any] = {"slo": {"ttft": "1 s"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def refused(path: Path, text: str) -> str:
    """What the user is told, less the path."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        files.read(path, Plan)
    told, _, reason = str(caught.value).partition(": ")
    assert told == str(path)
    return reason


def refused_with(path: Path, **values: Any) -> str:
    return refused(path, json.dumps(GOOD | values))


def test_a_good_file_is_read(path: Path) -> None:
    path.write_text(
        '{"slo": {"ttft": "250 ms"}, "memory": {"e": "80 GB"}, "arrivals": {"kind": "bursty", "rate": "3 req/s"}}'
    )
    plan = files.read(path, Plan)
    assert plan == Plan(slo=Slo(ttft=Seconds(0.25)), memory={"e": Bytes(80e9)}, arrivals=Bursty(rate=PerSecond(3)))
    assert type(plan.slo.ttft) is Seconds


def test_an_unknown_key_is_named_with_the_one_that_was_meant(path: Path) -> None:
    told = "slo.tttf: unknown key; did you mean 'ttft'? known are ttft, tpot, attainment"
    assert refused_with(path, slo={"tttf": "1 s"}) == told
    assert refused_with(path, colour="red").startswith("colour: unknown key; did you mean 'color'? known are slo,")
    assert "did you mean" not in refused_with(path, zzzz=1)


def test_an_unknown_key_of_one_of_several_kinds_is_compared_with_the_keys_of_that_kind(path: Path) -> None:
    told = refused_with(path, arrivals={"kind": "bursty", "rate": "1 req/s", "vc": 2})
    assert told == "arrivals.vc: unknown key; did you mean 'cv'? known are rate, cv, kind"


def test_an_unknown_kind_is_named_with_the_known_ones(path: Path) -> None:
    told = refused_with(path, arrivals={"kind": "burst", "rate": "1 req/s"})
    assert told == "arrivals.kind: \"burst\" is not valid; did you mean 'bursty'? known are steady, bursty"
    assert refused_with(path, arrivals={"rate": "1 req/s"}) == "arrivals.kind: is missing; one of steady, bursty"
    assert refused_with(path, color="rde") == "color: \"rde\" is not valid; did you mean 'red'? known are red, green"


def test_a_missing_key_is_named_with_the_units_that_it_needs(path: Path) -> None:
    assert refused(path, '{"slo": {}}') == "slo.ttft: is missing; a number with its unit: h, min, s, ms, us or ns"
    assert refused(path, "{}") == "slo: is missing"


def test_a_missing_unit_is_told_with_the_known_ones(path: Path) -> None:
    assert refused(path, '{"slo": {"ttft": 2}}') == "slo.ttft: 2 has no unit; use h, min, s, ms, us or ns"
    assert refused(path, '{"slo": {"ttft": "2"}}') == "slo.ttft: '2' has no unit; use h, min, s, ms, us or ns"


def test_a_wrong_unit_is_told_with_the_known_ones(path: Path) -> None:
    assert refused(path, '{"slo": {"ttft": "2 GB"}}').startswith("slo.ttft: '2 GB' has the unit 'GB'; use h, min,")


@pytest.mark.parametrize("number", ["-1", "nan", "inf", "1e400"])
def test_a_quantity_out_of_range_is_refused(path: Path, number: str) -> None:
    told = refused_with(path, slo={"ttft": f"{number} s"})
    assert told == f"slo.ttft: '{number} s' is out of range; a finite number of at least 0 is needed, at most 1e+30"


@pytest.mark.parametrize(("number", "shown"), [("NaN", "nan"), ("-Infinity", "-inf"), ("1e999", "inf")])
def test_a_bare_number_that_is_not_finite_is_refused_wherever_it_stands(path: Path, number: str, shown: str) -> None:
    told = f"{shown} is not a finite number; only finite numbers are valid"
    assert refused(path, f'{{"slo": 1, "weight": {number}}}') == f"weight: {told}"
    assert refused(path, f'{{"levels": [1, {{"ttft": {number}}}]}}') == f"levels[1].ttft: {told}"


def test_a_number_out_of_its_bounds_is_told_with_the_whole_range(path: Path) -> None:
    told = "slo.attainment: 1.5 is not valid; a number above 0 and at most 1 is needed"
    assert refused_with(path, slo={"ttft": "1 s", "attainment": 1.5}) == told
    assert refused_with(path, count=-3) == "count: -3 is not valid; a whole number of at least 1 is needed"
    assert refused_with(path, weight=10**400).endswith("is out of range; only finite numbers are valid")


def test_what_only_the_struct_knows_to_be_impossible_is_told_in_its_words(path: Path) -> None:
    told = "slo.ttft: 0 s, which nothing can meet; above 0 s is needed"
    assert refused_with(path, slo={"ttft": "0 s"}) == told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"slo": []}, "slo: expected object, got []"),
        ({"weight": "x"}, 'weight: expected float, got "x"'),
        ({"count": "x"}, 'count: expected int | null, got "x"; a whole number of at least 1 is needed'),
        ({"size": [1, "x"]}, 'size[1]: expected int, got "x"'),
        ({"size": [1, 2, 3]}, "size: expected array of length 2, got [1, 2, 3]"),
        ({"arrivals": "steady"}, 'arrivals: expected object, got "steady"'),
        ({"memory": {"e": "1 B", "p": 3}}, "memory.p: 3 has no unit; use TB, GB, MB, kB, B, TiB, GiB, MiB or KiB"),
        ({"levels": [{"ttft": "1 s"}, {"ttft": 1}]}, "levels[1].ttft: 1 has no unit; use h, min, s, ms, us or ns"),
    ],
)
def test_a_wrong_type_is_told_with_its_place(path: Path, values: dict[str, Any], told: str) -> None:
    assert refused_with(path, **values) == told


def test_what_is_no_json_is_told_with_line_and_column(path: Path) -> None:
    assert refused(path, '{"slo":\n  oops}') == "is not JSON: Expecting value (line 2, column 3)"
    assert refused(path, "[1]") == "expected object, got [1]"
    assert refused(path, "") == "is not JSON: Expecting value (line 1, column 1)"
    assert refused(path, "[" * 100_000) == "is nested too deeply"


def test_a_key_that_is_there_twice_is_refused(path: Path) -> None:
    assert refused(path, '{"slo": {"ttft": "1 s", "ttft": "2 s"}}') == "the key 'ttft' is there twice in one object"


def test_what_is_no_readable_file_is_refused(path: Path) -> None:
    for bad, told in [(path, "No such file or directory"), (path.parent, "Is a directory")]:
        with pytest.raises(ConfigError, match=f"{bad}: cannot be read: {told}"):
            files.read(bad, Plan)
    path.write_bytes(b'{"\xff": 1}')
    with pytest.raises(ConfigError, match="is not JSON: not UTF-8 text"):
        files.read(path, Plan)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["1 s", "steady"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*Plan.__struct_fields__, "ttft", "kind", "rate", "x", "` - at `$"]), inner)
    ),
    max_leaves=12,
)


@given(value=st.dictionaries(st.sampled_from([*Plan.__struct_fields__, "x"]), JSON) | JSON)
def test_whatever_stands_in_it_a_file_is_read_or_refused_by_name(value: Any) -> None:
    """A `ValidationError` would be msgspec's own words."""
    with contextlib.suppress(ValueError):
        files.convert(value, Plan)
        return
    with pytest.raises(ValueError, match=r".") as caught:
        files.convert(value, Plan)
    assert type(caught.value) is ValueError


# ---- writing

FINITE = st.floats(min_value=0, max_value=MOST)


@given(data=st.data())
def test_what_was_written_is_read_as_exactly_the_same(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.json"
    slo = st.builds(Slo, ttft=FINITE.filter(bool).map(Seconds), tpot=st.none() | FINITE.map(Seconds))
    rates = FINITE.filter(bool).map(PerSecond)
    arrivals = st.builds(Steady, rate=rates) | st.builds(Bursty, rate=rates, cv=FINITE)
    memory = st.dictionaries(st.text(max_size=5), FINITE.map(Bytes), max_size=3)
    plan = data.draw(
        st.builds(Plan, slo=slo, arrivals=arrivals, memory=memory, levels=st.lists(slo, max_size=2), weight=FINITE)
    )
    files.write(path, plan)
    assert files.read(path, Plan) == plan


def test_quantities_are_written_with_their_units(path: Path) -> None:
    files.write(path, Plan(slo=Slo(ttft=Seconds(0.05)), memory={"e": Bytes(80e9)}))
    written = json.loads(path.read_text())
    assert written["slo"]["ttft"] == "50 ms"
    assert written["memory"] == {"e": "80 GB"}
    assert written["arrivals"] == {"kind": "steady", "rate": "1 req/s"}


def test_a_file_that_cannot_be_written_is_told_and_nothing_is_left(path: Path) -> None:
    path.mkdir()
    (path / "something").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        files.write(path, Plan(slo=Slo(ttft=Seconds(1))))
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        files.write(path.parent / "nowhere" / "plan.json", Plan(slo=Slo(ttft=Seconds(1))))
    assert os.listdir(path.parent) == ["plan.json"]


def test_a_number_that_is_not_finite_is_never_written(path: Path) -> None:
    path.write_text("what was there")
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write(path, Plan(slo=Slo(ttft=Seconds(1)), weight=float("nan")))
    assert path.read_text() == "what was there"
    assert os.listdir(path.parent) == ["plan.json"]


def test_a_written_file_has_the_permissions_that_the_user_gives_to_new_files(path: Path) -> None:
    files.write(path, Plan(slo=Slo(ttft=Seconds(1))))
    other = path.parent / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_what_a_link_names_is_written_and_the_link_stays(path: Path) -> None:
    link = path.with_name("link.json")
    path.write_text("old")
    link.symlink_to(path.name)
    files.write_bytes(link, b"new")
    assert link.is_symlink() and path.read_bytes() == b"new"


def test_a_pipe_is_written_to_and_stays_one(path: Path) -> None:
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write_bytes(path, b"through it")
        assert os.read(reader, 100) == b"through it"
    finally:
        os.close(reader)
    assert path.is_fifo()


def test_every_quantity_can_be_a_field() -> None:
    for kind in Quantity.__subclasses__():
        struct = msgspec.defstruct("Any", [("value", kind)])
        one = struct(value=kind(3))
        assert files.convert(json.loads(files.dumped(one)), struct) == one
