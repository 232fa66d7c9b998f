"""CPU threads of one instance: how many a step uses, and what they are worth beside those of others."""

import logging
import os
from collections.abc import Callable

import torch

from triptych.config import InstanceConfig

logger = logging.getLogger(__name__)

INHERITED_NICENESS = os.getpriority(os.PRIO_PROCESS, 0)  # of all processes of this server, unless they change it


def thread_setter(config: InstanceConfig) -> Callable[[bool], None]:
    """Sets the threads of the next step, where their number changes at all."""

    def set_threads(beside_encoders: bool) -> None:
        wanted = fewer if beside_encoders else config.threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    fewer = config.threads_beside_encoders or config.threads
    set_threads(beside_encoders=False)
    return set_threads


def set_niceness(niceness: int) -> None:
    """Of all threads of this process. To become more important again takes a right that not every user has."""
    for thread in map(int, os.listdir("/proc/self/task")):
        try:
            if os.getpriority(os.PRIO_PROCESS, thread) != niceness:
                os.setpriority(os.PRIO_PROCESS, thread, niceness)
        except ProcessLookupError:  # it ended meanwhile
            continue
        except PermissionError:
            _say_that_it_stays(os.getpriority(os.PRIO_PROCESS, thread))
            return


def _say_that_it_stays(niceness: int) -> None:
    if niceness <= INHERITED_NICENESS:
        logger.info("the niceness of this instance stays at %d", niceness)
        return
    logger.warning(
        "the niceness of this instance stays at %d, because to lower it takes a right that this user does not have: "
        "until it is started again, it comes behind instances with %d wherever they share cores",
        niceness,
        INHERITED_NICENESS,
    )
