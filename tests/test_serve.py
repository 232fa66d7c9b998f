"""How the cores and the devices of a host are shared out among the instances of a placement."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.flows.servers import options
from triptych.config import ENCODE_NICENESS, SHARED_DECODE_INTERVAL_MS, InstanceConfig
from triptych.core import InstanceId, Role
from triptych.serve import instance_config


def configs(monkeypatch: pytest.MonkeyPatch, placement: str, cores: int, **changes: Any) -> list[InstanceConfig]:
    """One for each instance of a placement."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    asked = options(Path("model"), placement, threads=changes.pop("threads", None), **changes)
    roles = asked.placement.roles
    return [
        instance_config(asked, Path("/run"), InstanceId(f"i{slot}"), slot, role, roles)
        for slot, role in enumerate(roles)
    ]


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


@pytest.mark.parametrize(("cores", "interval_ms"), [(2, SHARED_DECODE_INTERVAL_MS), (3, 0.0), (8, 0.0)])
def test_answers_keep_a_pace_only_where_there_are_more_threads_than_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, interval_ms: float
):
    for config in configs(monkeypatch, "2e1pd", cores=cores):
        assert config.scheduling.decode_interval_ms == interval_ms


def test_threads_that_were_asked_for_count_where_answers_keep_a_pace(monkeypatch: pytest.MonkeyPatch):
    for threads, interval_ms in ((2, 0.0), (3, SHARED_DECODE_INTERVAL_MS)):
        for config in configs(monkeypatch, "2e1pd", cores=8, threads=threads):
            assert config.scheduling.decode_interval_ms == interval_ms


def test_an_interval_that_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch):
    for config in configs(monkeypatch, "2e1pd", cores=2, decode_interval_ms=7.0):
        assert config.scheduling.decode_interval_ms == 7.0


def test_an_instance_that_changes_its_role_changes_its_share(monkeypatch: pytest.MonkeyPatch):
    e0, e1, _ = configs(monkeypatch, "2e1pd", cores=4)
    _, p1, _ = configs(monkeypatch, "1e1p1pd", cores=4)
    assert (e0.threads, e1.threads, p1.threads) == (1, 1, 2)
    assert (e1.niceness, p1.niceness) == (ENCODE_NICENESS, 0)


def test_devices_are_given_out_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = configs(monkeypatch, "1e1p1d", cores=4, device="cuda")
    assert [config.model.device for config in found] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [config.model.device for config in configs(monkeypatch, "1epd", cores=4, device="cuda:1")] == ["cuda:1"]


def test_every_process_is_an_incarnation_of_its_own(monkeypatch: pytest.MonkeyPatch):
    found = [config for _ in range(2) for config in configs(monkeypatch, "2e2p2d", cores=2)]
    assert {config.id for config in found} == {f"i{number}" for number in range(6)}
    for field in ("epoch", "inbox", "black_box"):
        assert len({getattr(config, field) for config in found}) == 12, field
    assert found[0].role is Role.E
    assert found[0].inbox == f"ipc:///run/i0-{found[0].epoch}"
