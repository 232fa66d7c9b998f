"""Rows of media against the processors of checkpoints, for any size; and configs that say anything at all."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import FAMILIES
from tests.planning.described import checkpoint, modalities, shape
from tests.recipes import RECIPES
from triptych.errors import ConfigError
from triptych.model.headers import AudioHeader, ImageHeader, VideoHeader
from triptych.planning.model.shapes import shape_of

SIDES = st.integers(1, 700)


@pytest.mark.parametrize("family", [family for family in FAMILIES if RECIPES[family].image_processor])
def test_rows_of_a_picture_are_those_of_the_checkpoints_own_processor(family: str) -> None:
    rule = modalities(family)["image"]

    @settings(max_examples=60, deadline=None)
    @given(SIDES, SIDES, st.integers(1, 3))
    def check(width: int, height: int, num_images: int) -> None:
        if max(width, height) > 20 * min(width, height):
            return  # some families refuse what others take
        expected = rule.lay_out(ImageHeader(width, height), num_images)
        assert shape(family).image(width, height, num_images) == expected.units

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_video_are_those_of_the_checkpoints_own_processor(family: str) -> None:
    rule = modalities(family).get("video")
    if rule is None:
        return

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 40), st.integers(20, 400), st.integers(20, 400))
    def check(frames: int, width: int, height: int) -> None:
        header = VideoHeader(width, height, tuple(range(frames)), frames, 24.0)
        assert shape(family).video(frames, width, height) == rule.lay_out(header, 1).units

    check()


@pytest.mark.parametrize("family", [family for family in FAMILIES if RECIPES[family].feature_extractor])
def test_rows_of_a_clip_are_those_of_the_checkpoints_own_processor(family: str) -> None:
    rule = modalities(family)["audio"]

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1600, 80_000))
    def check(num_samples: int) -> None:
        header = AudioHeader(num_samples, 16_000)
        assert shape(family).audio(num_samples / 16_000) == rule.lay_out(header, 1).units

    check()


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 9), max_size=3),
    st.lists(st.lists(st.integers(-2, 99), max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_config_says_gives_a_shape_or_an_error_that_says_why(family: str) -> None:
    folder = checkpoint(family)
    said = json.loads((folder / "config.json").read_text())
    file = folder / "preprocessor_config.json"
    processor = json.loads(file.read_text()) if file.is_file() else {}
    places = [said, processor, *(value for value in (*said.values(), *processor.values()) if isinstance(value, dict))]
    keys = [(number, key) for number, place in enumerate(places) for key in place]

    @settings(max_examples=80, deadline=None)
    @given(st.sampled_from(keys), ANYTHING)
    def check(place_and_key: tuple[int, str], value: object) -> None:
        number, key = place_and_key
        place = places[number]
        kept, place[key] = place[key], value
        with contextlib.suppress(ConfigError):
            found = shape_of(said, processor)
            if found.pictures is not None:
                assert sum(found.image(100, 70)) >= 0
            if found.sounds is not None:
                assert sum(found.audio(1.5)) >= 0
        place[key] = kept

    check()
