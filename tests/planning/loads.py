"""Loads, observations and estimates with defaults that stay out of the way."""

from collections.abc import Mapping

from triptych.core import InstanceId, Role, Stage
from triptych.messages import Load, PoolUsage
from triptych.planning.estimator import Estimate, Observation, StageEstimate


def make_roles(**counts: int) -> dict[InstanceId, Role]:
    """`make_roles(e=2, pd=1)`."""
    return {InstanceId(f"{role}{i}"): Role(role) for role, count in counts.items() for i in range(count)}


def make_load(
    name: str,
    stage: Stage,
    *,
    queued: float = 0.0,
    done: float = 0.0,
    pace_s: float = 0.01,
    epoch: str = "1",
    num_steps: float = 0.0,
    running: int = 0,
    used: int = 0,
    total: int = 100,
) -> Load:
    """Of one that serves one stage: `queued` and `done` are tokens, `done` since the start."""
    word = stage.name.lower()
    return Load(
        instance=InstanceId(name),
        queues={f"{word}_waiting": 0, f"{word}_running": running},
        pools={"kv": PoolUsage(total=total, free=total - used, used=used, cached=0)},
        work_s={stage.value: queued * pace_s},
        counters={f"{word}_tokens": done, f"{word}_busy_s": done * pace_s, f"{word}_steps": num_steps},
        pace_s={stage.value: pace_s},
        epoch=epoch,
    )


def make_observation(at_s: float, *loads: Load, **extra: object) -> Observation:
    roles = {load.instance: Role(next(iter(load.work_s))) for load in loads}
    return Observation(at_s, roles, {load.instance: load for load in loads}, **extra)


def make_estimate(
    demand: Mapping[str, float] | None = None,
    *,
    noise: Mapping[str, float] | None = None,
    queued: Mapping[str, float] | None = None,
    held: Mapping[str, float] | None = None,
    slack: Mapping[str, float] | None = None,
    num_samples: int = 100,
    memory_pressure: float = 0.0,
) -> Estimate:
    """In seconds of work, by letter of the stage."""
    stages = {
        stage: StageEstimate(
            demand=(demand or {}).get(stage, 0.0),
            noise=(noise or {}).get(stage, 0.0),
            queued_s=(queued or {}).get(stage, 0.0),
            held_s=(held or {}).get(stage, 0.0),
            slack=(slack or {}).get(stage),
        )
        for stage in Stage
    }
    return Estimate(
        stages=stages,
        memory_pressure=memory_pressure,
        full_batch=64.0,
        decode_step_s=0.01,
        decode_sequence_s=0.001,
        num_samples=num_samples,
    )
