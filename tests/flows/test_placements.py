"""Every family on every placement answers exactly what plain transformers answers. Real processes, float32."""

import asyncio
from pathlib import Path

import pytest

from tests.checkpoints import FAMILIES, make_checkpoint
from tests.flows.questions import ask_all, differences, mixed_questions, references
from tests.flows.servers import running, wait_until_idle

PLACEMENTS = ("1e1p1d", "1e1pd", "1ep1d", "1ed1p", "1epd", "2e2p2d")
CONCURRENT = 32


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_generate(family: str, placement: str, checkpoints: Path) -> None:
    folder = checkpoints / family
    if not folder.exists():
        make_checkpoint(family, folder)
    expected = references(folder, CONCURRENT, seed=1)
    with running(folder, placement) as url:
        answers = asyncio.run(ask_all(url, mixed_questions(CONCURRENT, seed=1)))
        assert not differences(folder, answers, expected)
        wait_until_idle(url, timeout_s=2)
