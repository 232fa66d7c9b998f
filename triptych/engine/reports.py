"""What an instance says about itself."""

from triptych.engine.pace import Pace
from triptych.memory.pools import Pools
from triptych.messages import Load
from triptych.stages.base import Surroundings
from triptych.stages.group import StageGroup


def load_of(near: Surroundings, stages: StageGroup, pools: Pools, pace: Pace, counters: dict[str, float]) -> Load:
    """Its queues, pools and predicted seconds of work, and running totals, which are the caller's."""
    served = stages.by_stage
    pace_s = {stage.value: pace.of(stage) for stage in served}
    by_region = {"kv": pools.kv, "embedding": pools.embeddings}
    return Load(
        instance=near.instance,
        queues={name: n for machine in served.values() for name, n in machine.queues.items()}
        | {"leases": len(pools.leases)},
        pools={name: pool.usage() for name, pool in by_region.items() if pool is not None},
        work_s={stage.value: machine.queued_tokens * pace_s[stage.value] for stage, machine in served.items()},
        counters=counters,
        pace_s=pace_s,
        epoch=near.epoch,
    )
