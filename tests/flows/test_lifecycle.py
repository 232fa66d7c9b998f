"""The command from start to end: what it prints, how it refuses, how it stops, what it leaves behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.flows.servers import running
from triptych.cli import main
from triptych.errors import ConfigError

STOP_S = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2_vl", tmp_path_factory.mktemp("checkpoint"))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "triptych.cli", *map(str, arguments)]


def refused(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a server that does not start."""
    done = subprocess.run(command("serve", *arguments), capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


@contextlib.contextmanager
def served(folder: Path, placement: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of `triptych serve` and its address, once it is ready."""
    arguments = (folder, "--placement", placement, "--port", 0, "--kv-cache-gib", 0.05, "--max-model-len", 512)
    process = subprocess.Popen(command("serve", *arguments), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("Triptych ready on http://127.0.0.1:"), f"said {line!r}"
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def left_behind() -> set[str]:
    """Shared memory and socket folders of all servers of this user."""
    shared = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
    folders = {
        str(path) for path in Path(tempfile.gettempdir()).glob("triptych-*") if path.is_socket() or path.is_dir()
    }
    return shared | folders


def gone(pids: set[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_leaves_nothing_behind(folder: Path, number: signal.Signals) -> None:
    before = left_behind()
    with served(folder, "1e1p1d") as (process, url):
        assert httpx.get(f"{url}/health").status_code == 200
        children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        assert {i["pid"] for i in httpx.get(f"{url}/cluster").json()["instances"]} <= children
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(STOP_S) == 0
        assert gone(children, STOP_S - (time.monotonic() - began))
    assert left_behind() <= before


def test_a_killed_server_takes_its_workers_with_it(folder: Path) -> None:
    with served(folder, "1ep1d") as (process, _):
        children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        process.kill()
        process.wait()
        assert gone(children, STOP_S)


def test_a_dead_instance_turns_health_to_503(folder: Path) -> None:
    with served(folder, "1e1pd") as (_, url):
        victim = next(i for i in httpx.get(f"{url}/cluster").json()["instances"] if i["role"] == "pd")
        os.kill(victim["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 2
        while httpx.get(f"{url}/health").status_code != 503:
            assert time.monotonic() < deadline, "health is still 200"
            time.sleep(0.02)
        assert [i["state"] for i in httpx.get(f"{url}/cluster").json()["instances"]] == ["active", "dead"]


def test_a_placement_without_a_stage_is_refused() -> None:
    code, said = refused("--placement", "2e1p")
    assert code == 2
    assert "no instance serves decode" in said


def test_an_unknown_choice_is_refused_with_the_valid_ones(folder: Path) -> None:
    code, said = refused(folder, "--dtype", "int3")
    assert code == 2
    assert "dtype: 'int3' is none of auto, float32, bfloat16, float16" in said


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--kv-cache-gib", "nan", "--kv-cache-gib: nan is not a finite number above 0"),
        ("--gpu-memory-utilization", "nan", "gpu_memory_utilization"),
        ("--media-fetch-timeout-s", "-1", "media_fetch_timeout_s"),
        ("--port", "70000", "port"),
    ],
)
def test_a_number_outside_its_range_is_refused_by_name(
    flag: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["triptych", "serve", flag, value])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    code, said = refused(tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in said


def test_a_checkpoint_with_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("qwen2_vl", tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "mlp.down_proj" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(ConfigError, match=r"tensors missing from the checkpoint: .*down_proj"),
        running(folder, "1e1pd"),
    ):
        pass


def test_a_port_in_use_is_refused(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, said = refused(folder, "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot listen" in said


def test_pools_that_cannot_hold_one_request_are_refused_with_both_numbers(folder: Path) -> None:
    message = r"kv_cache_bytes: \d+ needed for one request of max_model_len=2048 tokens, 10000 given"
    with pytest.raises(ConfigError, match=message), running(folder, "1e1pd", kv_cache_bytes=10_000):
        pass
