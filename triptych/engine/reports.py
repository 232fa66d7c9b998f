"""What an instance says about itself."""

from triptych.engine.pace import Pace
from triptych.memory.pools import Pools
from triptych.messages import Load
from triptych.stages.base import Surroundings
from triptych.stages.group import StageGroup


def load_of(near: Surroundings, stages: StageGroup, pools: Pools, pace: Pace, counters: dict[str, float]) -> Load:
    """Its queues, pools and predicted seconds of work, and running totals, which are the caller's."""
    queues: dict[str, int] = {}
    work_s: dict[str, float] = {}
    pace_s: dict[str, float] = {}
    for stage, machine in stages.by_stage.items():
        queues |= machine.queues
        pace_s[stage] = token_s = pace.of(stage)
        work_s[stage] = machine.queued_tokens * token_s
    queues["leases"] = len(pools.leases)
    return Load(
        instance=near.instance,
        queues=queues,
        pools=pools.usage(),
        work_s=work_s,
        counters=counters,
        pace_s=pace_s,
        epoch=near.epoch,
    )
