"""What an instance says about itself."""

from triptych.core import Stage
from triptych.engine.equipment import Equipment
from triptych.engine.pace import Pace
from triptych.messages import Load
from triptych.stages.base import Surroundings

UNIT_SOURCES = ("cached", "transferred", "prefix")  # of units that were not encoded for the request that needed them


def load_of(equipment: Equipment, near: Surroundings, pace: Pace, num_steps: int) -> Load:
    """Its queues, pools, predicted seconds of work, and running totals."""
    stages, pools = equipment.stages, {"kv": equipment.pools.kv, "embedding": equipment.pools.embeddings}
    by_stage = {Stage.ENCODE: stages.encode, Stage.PREFILL: stages.prefill, Stage.DECODE: stages.decode}
    served = {stage: machine for stage, machine in by_stage.items() if machine is not None}
    return Load(
        instance=near.instance,
        queues={name: n for machine in served.values() for name, n in machine.queues.items()}
        | {"leases": len(equipment.pools.leases)},
        pools={name: pool.usage() for name, pool in pools.items() if pool is not None},
        work_s={stage.value: machine.queued_tokens * pace.of(stage) for stage, machine in served.items()},
        counters=_counters(equipment) | pace.counters | {"steps": float(num_steps)},
        pace_s={stage.value: pace.of(stage) for stage in served},
        epoch=near.epoch,
    )


def _counters(equipment: Equipment) -> dict[str, float]:
    stages = equipment.stages
    counters = {f"transfer_{name}": float(n) for name, n in equipment.transfers.counters.items()}
    if stages.encode is not None:
        counters["encode_units_computed"] = float(stages.encode.num_computed)
    if stages.prefill is not None:
        counters |= {f"encode_units_{source}": float(stages.prefill.num_units[source]) for source in UNIT_SOURCES}
        counters["prefix_queries"] = float(stages.prefill.num_prompt_tokens)
        counters["prefix_hits"] = float(stages.prefill.num_cached_tokens)
    if equipment.pools.embeddings is not None:
        counters["embedding_hits"] = float(equipment.pools.embeddings.num_hits)
        counters["embeddings_evicted"] = float(equipment.pools.embeddings.num_evicted)
    if stages.decode is not None:
        counters["decode_offloads"] = float(stages.decode.num_offloads)
    return counters
