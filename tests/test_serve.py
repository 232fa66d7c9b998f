"""How the cores and the devices of a host are shared out among the instances of a placement."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.flows.servers import options
from triptych.config import InstanceConfig
from triptych.serve import ENCODE_NICENESS, SHARED_DECODE_INTERVAL_MS, instance_configs


def configs(monkeypatch: pytest.MonkeyPatch, placement: str, cores: int, **changes: Any) -> list[InstanceConfig]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    return instance_configs(options(Path("model"), placement, threads=changes.pop("threads", None), **changes), Path())


def test_cores_are_shared_out_and_prefill_may_use_those_that_encoders_leave_idle(monkeypatch: pytest.MonkeyPatch):
    e0, e1, pd = configs(monkeypatch, "2e1pd", cores=2)
    assert [config.threads for config in (e0, e1, pd)] == [1, 1, 2]
    assert pd.threads_beside_encoders == 1


def test_a_number_of_threads_that_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch):
    for config in configs(monkeypatch, "2e1pd", cores=8, threads=3):
        assert config.threads == config.threads_beside_encoders == 3


def test_only_instances_that_do_nothing_but_encode_yield_and_only_on_cpu(monkeypatch: pytest.MonkeyPatch):
    assert [c.niceness for c in configs(monkeypatch, "1e1ep1pd", cores=4)] == [ENCODE_NICENESS, 0, 0]
    assert [c.niceness for c in configs(monkeypatch, "1e1pd", cores=4, device="cuda:0")] == [0, 0]


@pytest.mark.parametrize(("cores", "interval_ms"), [(2, SHARED_DECODE_INTERVAL_MS), (3, None), (8, None)])
def test_answers_keep_a_pace_only_where_there_are_more_threads_than_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, interval_ms: float | None
):
    for config in configs(monkeypatch, "2e1pd", cores=cores):
        assert config.scheduling.decode_interval_ms == interval_ms


def test_an_interval_that_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch):
    for config in configs(monkeypatch, "2e1pd", cores=2, decode_interval_ms=7.0):
        assert config.scheduling.decode_interval_ms == 7.0


def test_every_instance_is_an_incarnation_of_its_own(monkeypatch: pytest.MonkeyPatch):
    found = configs(monkeypatch, "2e2p2d", cores=2)
    assert len({config.epoch for config in found}) == len({config.id for config in found}) == 6
    assert msgspec.structs.asdict(found[0])["role"] == "e"
