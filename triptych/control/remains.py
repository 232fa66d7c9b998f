"""What a process that is gone has left behind: how it ended, what it was working on, files."""

import signal
from pathlib import Path

from triptych.config import InstanceConfig
from triptych.control.instances import Worker
from triptych.core import RequestId
from triptych.engine import black_box

IPC = "ipc://"


def cause_of_death(worker: Worker) -> str:
    """How the process ended, and the last line of what it said."""
    code, said = worker.exit_code, (worker.failure or "").strip()
    how = f"exit code {code}"
    if code is not None and -code in signal.valid_signals():
        how = f"killed by {signal.Signals(-code).name}"
    return f"{how}: {said.splitlines()[-1]}" if said else how


def suspects(config: InstanceConfig) -> list[RequestId]:
    """The requests of the step that it did not finish."""
    return [] if config.black_box is None else black_box.read(config.black_box)


def remove_files(config: InstanceConfig) -> None:
    """Its socket and its black box."""
    if config.inbox.startswith(IPC):
        Path(config.inbox.removeprefix(IPC)).unlink(missing_ok=True)
    if config.black_box is not None:
        Path(config.black_box).unlink(missing_ok=True)
