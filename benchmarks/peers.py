"""Starting vLLM's CPU build beside Triptych: as one server on all cores, or as its own encoder + language split."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil

START_TIMEOUT_S = 300.0
SERVED_NAME = "peer"
CONNECTOR = (
    '{{"ec_connector": "ECExampleConnector", "ec_role": "{role}",'
    ' "ec_connector_extra_config": {{"shared_storage_path": "{folder}"}}}}'
)


@contextmanager
def vllm_server(
    venv: Path, checkpoint: str, dtype: str, cores: str, preload: list[Path], *arguments: str
) -> Iterator[tuple[str, int]]:
    """Base URL and process id of `vllm serve` with one OpenMP thread on each of `cores` ("0-1"), and nowhere else."""
    port = _free_port()
    command = ["taskset", "-c", cores, venv / "bin" / "vllm", "serve", checkpoint, "--served-model-name", SERVED_NAME]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", dtype, "--enforce-eager", "--max-model-len", 8192]
    command += ["--max-num-seqs", 32, "--max-num-batched-tokens", 4096, "--generation-config", "vllm"]
    command += ["--limit-mm-per-prompt", '{"image": 16, "video": 0}', *arguments]
    libraries = [*preload, *[path for path in [venv / "lib" / "libiomp5.so"] if path.is_file()]]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_HOST_IP": "127.0.0.1",
    }
    with _running(list(map(str, command)), environment) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_healthy(url, process)
        yield url, process.pid


@contextmanager
def vllm_split(
    venv: Path, checkpoint: str, dtype: str, cores: tuple[str, str], preload: list[Path]
) -> Iterator[tuple[str, list[int]]]:
    """Base URL of vLLM's encoder on one core and its language model on the other, behind a proxy, and all process ids.

    Embeddings go through files in a folder of their own, as vLLM's example connector does it.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        producer, consumer = (CONNECTOR.format(role=f"ec_{role}", folder=folder) for role in ("producer", "consumer"))
        encoder, encoder_pid = stack.enter_context(
            vllm_server(
                *(venv, checkpoint, dtype, cores[0], preload),
                *("--no-enable-prefix-caching", "--ec-transfer-config", producer),
            )
        )
        language, language_pid = stack.enter_context(
            vllm_server(venv, checkpoint, dtype, cores[1], preload, "--ec-transfer-config", consumer)
        )
        port = _free_port()
        proxy = Path(__file__).with_name("vllm_epd_proxy.py")
        command = [venv / "bin" / "python", proxy, "--port", port, "--encoder", encoder, "--language", language]
        process = stack.enter_context(_running(list(map(str, command)), dict(os.environ)))
        url = f"http://127.0.0.1:{port}"
        _wait_healthy(url, process)
        yield url, [encoder_pid, language_pid, process.pid]


@contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, its output in a file that is shown if it dies; at the end it and its children are stopped."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield process
        except BaseException:
            log.seek(max(0, log.tell() - 4000))
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in psutil.wait_procs(family, timeout=10)[1]:
        child.kill()


def _wait_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the peer ended with exit code {process.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the peer was not ready within {START_TIMEOUT_S:g} s")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
