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
        frontend=config.frontend,
        max_num_batched_tokens=config.scheduling.max_num_batched_tokens,
        max_encode_tokens=config.scheduling.max_encode_tokens,
        heartbeat_s=config.heartbeat_s,
        decode_interval_s=(config.scheduling.decode_interval_ms or 0.0) / 1e3,
        black_box=None if config.black_box is None else BlackBox(config.black_box),
        refit=fitter.fit,
    )
