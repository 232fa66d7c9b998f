"""One server for all that torments it: if somebody did it harm, the next one finds out."""

from collections.abc import Iterator

import pytest

from tests.checkpoints import make_checkpoint
from tests.fuzz.victim import Victim, victim


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """Of a model that takes pictures, videos and sounds."""
    folder = make_checkpoint("qwen2_5_omni", tmp_path_factory.mktemp("checkpoint"))
    with victim(folder, "1e1p1d", tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.fixture
def target(server: Victim, request: pytest.FixtureRequest) -> Iterator[Victim]:
    """Says afterwards what it answered and how it is."""
    server.statuses, server.slowest = {}, (0.0, "")
    yield server
    if server.statuses:
        request.config.get_terminal_writer().line(f"\n{request.node.name}\n{server.report()}")
