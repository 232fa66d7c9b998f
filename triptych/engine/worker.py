"""The entry of a worker process: build the instance, say that it is ready, run until told to stop, or die loudly."""

import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

import torch

from triptych.config import InstanceConfig
from triptych.engine.build import build
from triptych.engine.engine import Engine
from triptych.engine.heap import keep_large_blocks
from triptych.engine.sockets import Post, make_context
from triptych.errors import EXIT_FAILED, EXIT_REFUSED, ConfigError
from triptych.messages import Alive, Ready
from triptych.telemetry import set_up_logging

logger = logging.getLogger(__name__)

MAX_SAID = 32_000  # characters: less than a pipe holds, because the parent reads only when this process has ended
SWITCH_INTERVAL_S = 0.0005  # a pull waits for the engine thread that long at most; Python's own value is 5 ms


def work(config: InstanceConfig, failures: Connection) -> None:
    """Runs one instance. What ends it early goes through `failures` as text; the exit code tells which kind it was."""
    began = time.monotonic()
    _die_with(config.server_pid)
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach the whole group; the controller decides
        signal.signal(number, signal.SIG_IGN)
    set_up_logging(config.log_level, process=config.id)
    keep_large_blocks()
    torch.set_num_threads(config.threads)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        _run(config, began)
    except ConfigError as error:
        failures.send(str(error)[:MAX_SAID])
        os._exit(EXIT_REFUSED)
    except Exception:
        text = traceback.format_exc()
        logger.error("instance %s ends:\n%s", config.id, text)
        failures.send(text[-MAX_SAID:])
        os._exit(EXIT_FAILED)
    os._exit(0)  # tearing down an interpreter full of libraries takes a second; the kernel does it at once


def _run(config: InstanceConfig, began: float) -> None:
    alive = _Alive(config)
    context = make_context()
    engine = alive.engine = build(config, context)
    post = Post(context)
    post.send(config.frontend, Ready(engine.peer, time.monotonic() - began))
    logger.info("instance %s serves %s on %d thread(s)", config.id, config.role, config.threads)
    with torch.inference_mode():
        engine.run()
    engine.close()
    post.close()
    context.term()


class _Alive:
    """Says that it is, for as long as the process lives, whatever its engine is doing or whether there is one yet. On a
    daemon thread: the process does not wait for it."""

    def __init__(self, config: InstanceConfig) -> None:
        self.engine: Engine | None = None
        self._config = config
        threading.Thread(target=self._run, name="alive", daemon=True).start()

    def _run(self) -> None:
        config, post = self._config, Post(make_context())
        while True:
            turning_s = 0.0 if self.engine is None else time.monotonic() - self.engine.turn_began
            post.send(config.frontend, Alive(config.id, config.epoch, turning_s))
            time.sleep(config.alive_interval_s)


def _die_with(server_pid: int) -> None:
    """Ends this process, whatever it is doing, when the server process ends without having been able to stop it.

    A thread on a pidfd, because the parent of this process is the fork server, which outlives the server as long as
    one of its children lives.
    """
    try:
        server = os.pidfd_open(server_pid)
    except ProcessLookupError:
        os._exit(EXIT_FAILED)

    def wait() -> None:
        select.select([server], [], [])
        os._exit(EXIT_FAILED)

    threading.Thread(target=wait, name="server-watch", daemon=True).start()
