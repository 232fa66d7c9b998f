"""From a configuration to an engine: what is needed for its role, and the sockets."""

import zmq

from triptych.config import InstanceConfig
from triptych.engine.black_box import BlackBox
from triptych.engine.engine import Engine
from triptych.engine.fitting import Fitter
from triptych.engine.sockets import Inbox, Post


def build(config: InstanceConfig, context: zmq.Context[zmq.Socket[bytes]]) -> Engine:
    """The engine of this instance.

    Raises ConfigError where the checkpoint, the device or the memory cannot serve the role.
    """
    fitter = Fitter(config)
    equipment = fitter.fit(config)
    return Engine(
        fitter.near,
        equipment,
        Inbox(context, config.inbox),
        Post(context),
        black_box=None if config.black_box is None else BlackBox(config.black_box),
        refit=fitter.fit,
    )
