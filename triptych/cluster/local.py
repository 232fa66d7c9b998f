"""Starts, watches and stops worker processes on this host. Knows no role and no message."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from triptych.config import InstanceConfig
from triptych.engine.worker import work

PRELOAD = ["triptych.cluster.preload"]  # imported once by the fork server: an instance then starts without that cost


class LocalWorker:
    """One worker process. `exit_code` is None while it lives; `failure` is what it said before it died, if anything."""

    def __init__(self, process: ForkServerProcess, failures: Connection) -> None:
        self._process = process
        self._failures = failures
        assert process.pid is not None
        self.pid: int = process.pid
        self._pidfd = _open_process(self.pid)
        self.failure: str | None = None
        self.exit_code: int | None = None
        self.exited = asyncio.Event()

    def watch(self, on_exit: Callable[[], None]) -> None:
        """Calls `on_exit` on the event loop within milliseconds of the process's end."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self._process.sentinel)
            self._process.join()
            self.exit_code = self._process.exitcode
            self.kill()  # it lives still, but unwatched, if it was the fork server that ended
            self._close()
            self.failure = self._read_failure()
            self.exited.set()
            on_exit()

        loop.add_reader(self._process.sentinel, ended)

    def kill(self) -> None:
        """Idempotent; never meets another process that got the same number."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self, seconds: float) -> bool:
        """Whether the process ended within that time."""
        try:
            await asyncio.wait_for(self.exited.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self._process.close()

    def _read_failure(self) -> str | None:
        try:
            return str(self._failures.recv()) if self._failures.poll() else None
        except EOFError:  # it died without a word: killed, or out of memory
            return None
        finally:
            self._failures.close()


def _open_process(pid: int) -> int | None:
    """A handle on the process, None if it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


Entry = Callable[[InstanceConfig, Connection], None]

ENVIRONMENT = {
    # Threads of one step wait for each other by spinning, a fraction of a millisecond at most. Without a bound a
    # process that needs the core made a step up to 100 times slower; without spinning a quiet one took 1.5 to 3 times.
    "GOMP_SPINCOUNT": "10000",
}


class LocalCluster:
    """Processes from a fork server that has the heavy libraries imported already.

    The first one in a process starts the fork server, which takes its environment from this process at that moment.
    """

    def __init__(self, entry: Entry = work) -> None:
        """`entry` is what a process runs; one that can be imported by its name."""
        self._entry = entry
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def start(self, config: InstanceConfig) -> LocalWorker:
        failures, child_end = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=self._entry, args=(config, child_end), name=f"triptych-{config.id}", daemon=True
        )
        process.start()
        child_end.close()
        return LocalWorker(process, failures)
