"""What a plan writes: a file for `triptych serve --config`, the line that repeats a row, and all of it for machines."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from triptych.config import GIB
from triptych.planning.costs.profile import Profile
from triptych.planning.search.evaluation import MAX_QUEUE_S
from triptych.planning.search.plan import Question, Row
from triptych.planning.search.search import Outcome
from triptych.planning.search.space import Candidate

FLAGS = {  # of `triptych simulate`, by the name of the option
    "max_num_seqs": "max-num-seqs",
    "max_num_batched_tokens": "max-num-batched-tokens",
    "max_encode_tokens": "max-encode-tokens",
    "parallel_encode": "irp",
    "streamed_prefill": "streamed-prefill",
    "schedule": "schedule",
}


def is_servable(candidate: Candidate) -> bool:
    """`triptych serve`, and `triptych simulate`, run instances of one GPU."""
    return set(candidate.degrees) == {1}


def settings(candidate: Candidate) -> str:
    """The flags of a candidate."""
    flags = []
    for name, flag in FLAGS.items():
        value = getattr(candidate, name)
        flags.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return f"--placement {candidate.placement} {' '.join(flags)}"


def serve_line(config: Mapping[str, Any]) -> str:
    """The command for what `serve_config` gives."""
    words = ["triptych", "serve", *([config["model"]] if "model" in config else [])]
    for name, value in config.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        elif name != "model":
            values = value if isinstance(value, list) else [value]
            words += [word for one in values for word in (f"--{flag}", str(one))]
    return shlex.join(words)


def simulate_line(row: Row, question: Question, asked: Sequence[str]) -> str | None:
    """The command that repeats the figures of a row; `asked` are its arguments as far as `triptych plan` was given the
    same. None where there is none: for instances of several GPUs."""
    if not is_servable(row.candidate):
        return None
    workload, runs = question.runs.workload, question.runs
    requests = [] if workload.phases else ["--requests", str(workload.num_requests)]
    load = ["--rate", f"{row.rate:g}", *requests, "--seed", str(runs.seeds[0]), "--max-queue-s", f"{MAX_QUEUE_S:g}"]
    return f"triptych simulate {shlex.join([*asked, *load])} {settings(row.candidate)}"


def serve_config(row: Row, question: Question, model: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of `triptych serve` for a candidate, by their names with underscores; those of the `model` as given."""
    candidate, machines, objectives = row.candidate, question.machines, question.evaluator.objectives
    profile = machines.profiles[1]
    config: dict[str, Any] = {
        **model,
        "placement": str(candidate.placement),
        "device": "cpu" if profile.made.device == "cpu" else "cuda",
        "max_num_seqs": candidate.max_num_seqs,
        "max_num_batched_tokens": candidate.max_num_batched_tokens,
        "max_encode_tokens": candidate.max_encode_tokens,
        "irp": candidate.parallel_encode,
        "streamed_prefill": candidate.streamed_prefill,
        "schedule": candidate.schedule,
        "embedding_cache_gib": math.ceil(100 * machines.embedding_bytes() / GIB) / 100,
    }
    config |= _threads(profile)
    contexts = [machines.context_len(role, candidate) for role in candidate.family if role.has_language_model]
    if min(contexts) < profile.memory.context_len:
        config["max_model_len"] = min(contexts)
    limits = {"slo_ttft_ms": objectives.ttft_ms, "slo_tpot_ms": objectives.tpot_ms}
    return config | {name: limit for name, limit in limits.items() if limit is not None}


def _threads(profile: Profile) -> dict[str, int]:
    """Of an instance, where steps take what they take because of it: a server that is not told shares out all cores."""
    return {"threads": profile.made.threads} if profile.made.device == "cpu" and profile.made.threads else {}


def config_text(config: dict[str, Any], comments: Sequence[str]) -> str:
    """YAML: JSON's scalars are YAML's."""
    lines = [f"# {comment}" for comment in comments]
    return "\n".join([*lines, *(f"{key}: {json.dumps(value)}" for key, value in config.items())]) + "\n"


def as_json(
    outcome: Outcome,
    best: Sequence[Row],
    question: Question,
    said: str,
    lines: Sequence[str | None],
    files: dict[str, str],
) -> str:
    """For machines. Numbers that are not known are null. `lines`: what repeats each row."""
    runs = question.runs
    found = {
        "verdict": said,
        "best": [
            {
                "placement": str(row.candidate.placement),
                "gpus": row.candidate.num_gpus,
                "settings": msgspec.structs.asdict(row.candidate) | {"placement": str(row.candidate.placement)},
                "kept_rate": row.rate,
                "figures": row.figures,
                "attained": dict(zip(map(str, runs.seeds), row.attained, strict=True)),
                "simulate": line,
            }
            for row, line in zip(best, lines, strict=True)
        ],
        "files": files,
        "rejected": outcome.rejected,
        "simulated": {
            "placements": outcome.num_placements,
            "skipped": outcome.num_skipped,
            "short": outcome.num_short,
            "full": outcome.num_full,
            "requests": len(question.load.demands),
            "confirming_requests": runs.workload.num_requests,
            "usual_confirming_requests": question.usual_requests,
        },
    }
    return json.dumps(msgspec.to_builtins(found), indent=2)
