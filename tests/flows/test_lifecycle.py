"""The command from start to end: what it prints, how it refuses, how it stops, what it leaves behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.flows.servers import running, wait_until_idle
from triptych.cli import main
from triptych.errors import ConfigError

STOP_S = 5.0
RESTART_S = 10.0


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
def served(folder: Path, placement: str, *more: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of `triptych serve` and its address, once it is ready."""
    arguments = (folder, "--placement", placement, "--port", 0, "--kv-cache-gib", 0.05, "--max-model-len", 512)
    environment = os.environ | {"TMPDIR": str(temporary(folder))}
    process = subprocess.Popen(
        command("serve", *arguments, *more),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # a process group of its own, as under systemd
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("Triptych ready on http://127.0.0.1:"), f"said {line!r}"
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def temporary(folder: Path) -> Path:
    """Where the servers of this module, and nobody else's, put their files."""
    path = folder.parent / "temporary"
    path.mkdir(exist_ok=True)
    return path


# Of whatever else runs on the machine: OpenMP's runtime has one for each process, and multiprocessing's semaphores, of
# which no server has any, are named while they are in use.
OTHERS = ("__KMP_REGISTERED_LIB_", "sem.mp-")


def left_behind(where: Path | None = None) -> set[str]:
    """Shared memory of all servers of this user, and socket folders of those that put them there: by default of all."""
    shared = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if not name.startswith(OTHERS)}
    paths = (where or Path(tempfile.gettempdir())).glob("triptych-*")
    return shared | {str(path) for path in paths if path.is_socket() or path.is_dir()}


def gone(pids: set[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_leaves_nothing_behind(folder: Path, number: signal.Signals) -> None:
    before = left_behind(temporary(folder))
    with served(folder, "1e1p1d") as (process, url):
        assert httpx.get(f"{url}/health").status_code == 200
        children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        assert {i["pid"] for i in httpx.get(f"{url}/cluster").json()["instances"]} <= children
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(STOP_S) == 0
        assert gone(children, STOP_S - (time.monotonic() - began))
    assert left_behind(temporary(folder)) <= before


def test_a_killed_server_takes_its_workers_with_it(folder: Path) -> None:
    with served(folder, "1ep1d") as (process, _):
        children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        process.kill()
        process.wait()
        assert gone(children, STOP_S)


# ---- instances that are lost


def by_id(url: str) -> dict[str, dict[str, Any]]:
    return {instance["id"]: instance for instance in httpx.get(f"{url}/cluster").json()["instances"]}


def wait_until(condition: Callable[[], object], within_s: float, what: str) -> float:
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"{what}: not within {within_s} s"
        time.sleep(0.005)
    return time.monotonic() - began


def is_out(url: str, id: str, pid: int) -> bool:
    """Whether that process is not relied on any more."""
    instance = by_id(url)[id]
    return instance["pid"] != pid or instance["state"] not in ("active", "leaving")


def is_back(url: str, id: str, restarts: int) -> bool:
    instance = by_id(url)[id]
    healthy = httpx.get(f"{url}/health").status_code == 200
    return bool(healthy and instance["state"] == "active" and instance["restarts"] == restarts)


@pytest.mark.parametrize(("number", "found_s"), [(signal.SIGKILL, 2.0), (signal.SIGSTOP, 4.0)])
def test_a_lost_instance_is_found_and_replaced_and_the_others_go_on(
    folder: Path, number: signal.Signals, found_s: float
) -> None:
    """Within milliseconds and within 1.5 s, of which a machine that has little time for the controller makes more."""
    with running(folder, "1e1p1d") as url:
        before = by_id(url)
        for id, victim in before.items():
            os.kill(victim["pid"], number)
            wait_until(lambda id=id, pid=victim["pid"]: is_out(url, id, pid), found_s, f"{id} out of the table")
            wait_until(lambda id=id: is_back(url, id, restarts=1), RESTART_S, f"{id} back")
            assert not psutil.pid_exists(victim["pid"])
        after = by_id(url)
        assert [i["restarts"] for i in after.values()] == [1, 1, 1], "each was lost once, and took nobody along"
        assert {i["epoch"] for i in after.values()}.isdisjoint(i["epoch"] for i in before.values())
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 3}).status_code == 200
        files = {path.name for path in run_folder(after.values()).iterdir()}
        expected = {f"{id}-{i['epoch']}{end}" for id, i in after.items() for end in ("", ".box")}
        assert files == expected | {"frontend"}, "files of incarnations that are gone are gone too"


def run_folder(instances: Iterable[dict[str, Any]]) -> Path:
    """Where the sockets of these instances are."""
    some = next(iter(instances))
    (found,) = Path(tempfile.gettempdir()).glob(f"triptych-*/{some['id']}-{some['epoch']}")
    return found.parent


def test_a_server_leaves_nothing_behind_of_instances_that_were_replaced(folder: Path) -> None:
    before = left_behind(temporary(folder))
    with served(folder, "1e1pd") as (process, url):
        os.kill(by_id(url)["i1"]["pid"], signal.SIGKILL)
        wait_until(lambda: is_back(url, "i1", restarts=1), RESTART_S, "back")
        os.kill(by_id(url)["i0"]["pid"], signal.SIGSTOP)  # hangs, and nobody knows yet
        children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
        assert gone(children, STOP_S)
    assert left_behind(temporary(folder)) <= before


# ---- changes


def test_roles_and_placements_change_while_answers_run(folder: Path) -> None:
    request = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with running(folder, "1e2p1d") as url, ThreadPoolExecutor(2) as clients, httpx.Client(base_url=url) as operator:
        expected = httpx.post(f"{url}/v1/completions", json=request).json()["choices"]
        over = threading.Event()

        def ask_on() -> list[Any]:
            answers = []
            while not over.is_set():
                answers.append(httpx.post(f"{url}/v1/completions", json=request, timeout=60).json().get("choices"))
            return answers

        asking = [clients.submit(ask_on) for _ in range(2)]
        try:
            switched = operator.post("/cluster/instances/i1/role", json={"role": "d"}, timeout=60)
            assert switched.status_code == 200, switched.text
            assert switched.json()["steps_s"].keys() >= {"drain", "weights", "pools", "warm_up", "total"}
            for placement in ("1e1p1d", "2e2pd", "1epd", "1e1p1d"):
                placed = operator.post("/cluster/placement", json={"placement": placement}, timeout=60)
                assert placed.status_code == 200, placed.text
                assert operator.get("/cluster").json()["placement"] == placed.json()["placement"] == placement
        finally:
            over.set()
        answers = [answer for task in asking for answer in task.result()]
        assert answers
        assert all(answer == expected for answer in answers)
        wait_until_idle(url, 5)
        switches = [event for event in operator.get("/cluster").json()["events"] if event["what"] == "switched"]
        assert switches[0]["instance"] == "i1"


def test_roles_follow_the_load_where_that_was_asked_for(folder: Path) -> None:
    with running(folder, "1e1p1d", adaptive=True) as url:
        wait_until(lambda: httpx.get(f"{url}/cluster").json()["decision"], 10, "a decision")
        decision = httpx.get(f"{url}/cluster").json()["decision"]
        assert decision["switch"] is None
        assert decision["reason"]
        assert decision["estimate"]["stages"].keys() == {"e", "p", "d"}
    with running(folder, "1e1p1d") as url:
        assert httpx.get(f"{url}/cluster").json()["decision"] is None


# ---- the end


@contextlib.contextmanager
def streaming(url: str, max_tokens: int) -> Iterator[Iterator[str]]:
    """The lines of an answer that has begun."""
    request = {"prompt": "Hi", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    request |= {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


LONG = ("--max-model-len", 4096)


def test_what_runs_is_finished_before_the_server_ends_and_nothing_new_begins(folder: Path) -> None:
    with served(folder, "1e1pd", *LONG) as (process, url), streaming(url, max_tokens=1200) as lines:
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503, 2, "health is 503")
        assert httpx.get(f"{url}/cluster").json()["draining"] is True
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.post(f"{url}/cluster/placement", json={"placement": "1epd"}).status_code == 503
        said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert json.loads(said[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 1200
        assert process.wait(STOP_S) == 0


def test_a_signal_to_the_whole_process_group_lets_what_runs_finish_too(folder: Path) -> None:
    before = left_behind(temporary(folder))
    with served(folder, "1e1p1d", *LONG) as (process, url), streaming(url, max_tokens=1200) as lines:
        children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        os.killpg(process.pid, signal.SIGTERM)
        said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert json.loads(said[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 1200
        assert process.wait(STOP_S) == 0
        assert gone(children, STOP_S)
    assert left_behind(temporary(folder)) <= before


@pytest.mark.parametrize("again", [True, False], ids=["a second signal", "the timeout"])
def test_what_takes_too_long_is_not_waited_for(folder: Path, again: bool) -> None:
    timeout = () if again else ("--drain-timeout-s", 0.5)
    with served(folder, "1e1pd", *LONG, *timeout) as (process, url), streaming(url, max_tokens=4000) as lines:
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503, 2, "health is 503")
        if again:
            process.send_signal(signal.SIGTERM)
        said = [line for line in lines if line]
        assert "shutting down" in said[-1]
        assert process.wait(STOP_S) == 0


# ---- what is refused


def test_a_placement_without_a_stage_is_refused() -> None:
    code, said = refused("--placement", "2e1p")
    assert code == 2
    assert "no instance serves decode" in said


def test_an_unknown_choice_is_refused_with_the_valid_ones(folder: Path) -> None:
    code, said = refused(folder, "--dtype", "int3")
    assert code == 2
    assert "--dtype: 'int3' is none of auto, float32, bfloat16, float16\n" in said


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--kv-cache-gib", "nan", "--kv-cache-gib: nan is not a finite number above 0"),
        ("--gpu-memory-utilization", "nan", "--gpu-memory-utilization: nan is not valid; a number above 0"),
        ("--media-fetch-timeout-s", "-1", "--media-fetch-timeout-s: -1.0 is not valid; a number above 0 is needed"),
        ("--port", "70000", "--port: 70000 is not valid; a whole number"),
        ("--schedule", "lifo", "--schedule: 'lifo' is none of fcfs, sjf, slo"),
        ("--max-queue-s", "0", "--max-queue-s: 0 is not a finite number above 0"),
        ("--slo-ttft-ms", "-5", "--slo-ttft-ms: -5 is not a finite number above 0"),
        ("--slo-tpot-ms", "0", "--slo-tpot-ms: 0 is not a finite number above 0"),
        ("--slo-ttft-ms", "inf", "--slo-ttft-ms: inf is not a finite number above 0"),
        ("--slo-tpot-ms", "nan", "--slo-tpot-ms: nan is not a finite number above 0"),
        ("--placement", "9999999e1p1d", "10000001 instances, at most 1024"),
        ("--recovery-timeout-s", "-1", "--recovery-timeout-s: -1 is not a finite number above 0"),
        ("--max-media-held-mib", "0", "--max-media-held-mib: 0 is not a whole number above 0"),
        ("--switch-timeout-s", "inf", "--switch-timeout-s: inf is not a finite number above 0"),
        ("--drain-timeout-s", "nan", "--drain-timeout-s: nan is not a finite number above 0"),
        ("--drain-timeout-s", "0", "--drain-timeout-s: 0 is not a finite number above 0"),
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
    assert "--host, --port: cannot listen" in said and "take another port" in said


def test_pools_that_cannot_hold_one_request_are_refused_with_both_numbers(folder: Path) -> None:
    message = r"kv_cache_bytes: \d+ needed for one request of max_model_len=2048 tokens, 10000 given"
    with pytest.raises(ConfigError, match=message), running(folder, "1e1pd", kv_cache_bytes=10_000):
        pass
