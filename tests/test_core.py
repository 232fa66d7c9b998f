"""Placements, roles, chunks."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import make_sampling
from triptych.core import MOST_INSTANCES, Chunk, Placement, RequestId, Role, Sequence, Stage
from triptych.errors import ConfigError


def test_a_placement_lists_its_roles_in_the_order_of_the_text():
    assert Placement.parse("2e1p1d").roles == (Role.E, Role.E, Role.P, Role.D)
    assert Placement.parse("1ed1p").roles == (Role.ED, Role.P)


@pytest.mark.parametrize("text", ["1e1p1d", "1e1pd", "1ep1d", "1ed1p", "2epd", "2e2p2d", "10e2pd"])
def test_a_placement_is_printed_as_it_was_written(text):
    assert str(Placement.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "epd", "1", "1x", "1pe1d", "1e 1p1d", "1e1p1d ", "-1epd", "1e,1p,1d", "1E1P1D", "1.5epd", "1e1p1d1", "1epde"],
)
def test_text_that_is_no_placement_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="expected counts and roles"):
        Placement.parse(text)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("1e", "prefill or decode"), ("1e1p", "decode"), ("1pd", "encode"), ("0e1p1d", "encode"), ("0epd", "encode")],
)
def test_a_placement_without_a_stage_names_the_stage(text, missing):
    with pytest.raises(ConfigError, match=f"no instance serves {missing}"):
        Placement.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("9999999e1p1d", f"10000001 instances, at most {MOST_INSTANCES}"),
        ("999999999999999999epd", f"at most {MOST_INSTANCES}"),
        ("1e1p1d" * 400, f"1200 instances, at most {MOST_INSTANCES}"),
        ("9" * 10_000 + "epd", "expected counts and roles"),
        ("9" * 60_000, "expected counts and roles"),
    ],
)
def test_an_absurd_placement_is_refused_before_anything_is_made_of_it(text, said):
    began = time.process_time()
    with pytest.raises(ConfigError, match=said) as refused:
        Placement.parse(text)
    assert time.process_time() - began < 0.2
    assert len(str(refused.value)) < 300


def test_the_largest_placement_is_one():
    assert len(Placement.parse(f"{MOST_INSTANCES}epd").roles) == MOST_INSTANCES


def test_instances_that_are_there_are_spelled_in_the_order_of_the_data():
    assert str(Placement.of([Role.D, Role.PD, Role.E, Role.D])) == "1e2d1pd"
    assert str(Placement.of([])) == ""


@pytest.mark.parametrize(
    ("before", "after", "number"),
    [(Role.E, Role.P, 1), (Role.P, Role.D, 0), (Role.P, Role.EPD, 1), (Role.EPD, Role.E, 0), (Role.E, Role.E, 0)],
)
def test_only_the_half_of_the_model_that_is_missing_has_to_be_loaded(before, after, number):
    assert before.num_halves_to_load(after) == number


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(Role)), min_size=1, max_size=5))
def test_every_complete_placement_survives_printing_and_parsing(parts):
    text = "".join(f"{n}{role}" for n, role in parts)
    if {stage for _, role in parts for stage in role.stages} != set(Stage):
        with pytest.raises(ConfigError):
            Placement.parse(text)
        return
    placement = Placement.parse(text)
    assert sorted(Placement.parse(str(placement)).roles) == sorted(placement.roles)
    assert len(placement.roles) == sum(n for n, _ in parts)


def test_a_role_is_spelled_by_its_stages_in_the_order_of_the_data():
    assert Role.EPD.stages == (Stage.ENCODE, Stage.PREFILL, Stage.DECODE)
    assert all("".join(role.stages) == role for role in Role)
    assert [role for role in Role if role.encodes] == [Role.E, Role.EP, Role.ED, Role.EPD]
    assert [role for role in Role if not role.has_language_model] == [Role.E]


def test_a_chunk_samples_only_if_it_ends_at_the_last_token():
    sequence = Sequence(RequestId("r"), list(range(10)), 10, make_sampling())
    assert not Chunk(sequence, 0, 9).samples
    assert Chunk(sequence, 4, 6).samples


def test_output_tokens_of_a_resubmitted_request_count_from_the_prompt_on():
    assert Sequence(RequestId("r"), list(range(10)), 7, make_sampling()).num_output_tokens == 3


def test_a_misspelt_attribute_of_a_sequence_raises():
    sequence = Sequence(RequestId("r"), [1], 1, make_sampling())
    with pytest.raises(AttributeError):
        sequence.num_compute = 1
