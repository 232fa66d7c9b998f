"""Every family on every placement answers exactly what plain transformers answers. Real processes, float32."""

import asyncio
from pathlib import Path

import pytest

from tests.checkpoints import IMAGE_FAMILIES
from tests.flows.questions import (
    ask_all,
    differences,
    encoded_units,
    lone_picture,
    mixed_questions,
    references,
    wait_until,
)
from tests.flows.servers import running, wait_until_idle
from tests.model.builders import checkpoint
from tests.reference import reference

EVERYWHERE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava", "gemma3", "idefics3", "smolvlm")
PLACEMENTS = ("1e1p1d", "1e1pd", "1ep1d", "1ed1p", "1epd", "2e2p2d")
OTHERS = tuple(family for family in IMAGE_FAMILIES if family not in EVERYWHERE)
TILED = ("internvl", "idefics3", "smolvlm", "llava_next", "llava_onevision", "aya_vision", "ovis2")


def assert_answers_equal_generate(url: str, folder: Path, num_requests: int) -> None:
    answers = asyncio.run(ask_all(url, mixed_questions(num_requests, seed=1)))
    assert not differences(folder, answers, references(folder, num_requests, seed=1))
    wait_until_idle(url, timeout_s=2)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", EVERYWHERE)
def test_greedy_answers_equal_generate(family: str, placement: str) -> None:
    with running(checkpoint(family), placement) as url:
        assert_answers_equal_generate(url, checkpoint(family), num_requests=32)


@pytest.mark.parametrize("placement", ["2e1p1d", "1epd"])
@pytest.mark.parametrize("family", OTHERS)
def test_so_do_those_of_the_other_families_on_two_placements(family: str, placement: str) -> None:
    with running(checkpoint(family), placement) as url:
        assert_answers_equal_generate(url, checkpoint(family), num_requests=12)


@pytest.mark.parametrize("family", TILED)
def test_tiles_of_one_picture_are_encoded_on_all_encode_instances(family: str) -> None:
    """On a server that has encoded nothing yet."""
    folder, question = checkpoint(family), lone_picture(160, 45, seed=2)
    with running(folder, "2e1p1d") as url:
        (answer,) = asyncio.run(ask_all(url, [question]))
        assert not differences(folder, [answer], [reference(folder, question.messages, question.max_tokens)])
        assert wait_until(lambda: all(encoded_units(url).values())), encoded_units(url)
