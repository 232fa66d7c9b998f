"""Makes the process of an instance on a thread of its own, so that a fork server that hangs holds nobody up."""

import asyncio
import threading
from concurrent.futures import Future

from triptych.config import InstanceConfig
from triptych.control.instances import Cluster, Worker


async def launch(cluster: Cluster, config: InstanceConfig) -> Worker:
    """Raises what `cluster.start` raises, and what the start of a thread raises.

    A process that comes when nobody waits for it any more is killed. The thread is a daemon: one of an executor would
    be waited for at the end of the server.
    """
    making: Future[Worker] = Future()

    def make() -> None:
        try:
            worker = cluster.start(config)
        except Exception as error:  # the boundary of a thread: whoever waits gets it
            if making.set_running_or_notify_cancel():
                making.set_exception(error)
            return
        if making.set_running_or_notify_cancel():
            making.set_result(worker)
        else:
            worker.kill()

    threading.Thread(target=make, name=f"launch-{config.id}", daemon=True).start()
    try:
        return await asyncio.wrap_future(making)
    except asyncio.CancelledError:
        making.add_done_callback(_discard)  # it may have come just now
        raise


def _discard(making: Future[Worker]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().kill()
