"""What several commands ask of their flags. Raises ConfigError that names the flag."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from triptych.config import require
from triptych.demo import checkpoint_path
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from triptych.planning.costs.profile import Profile
    from triptych.planning.model.shape import ModelShape
    from triptych.planning.quantities import Quantity
    from triptych.planning.workloads.workload import Slo, Workload

Unit = TypeVar("Unit", bound="Quantity")

BUILT_IN = "triptych-demo"  # what the built-in model is called
USUAL_GPU = "A100-80G"
KNOWN_GPUS = (
    "A100-40G, A100-80G, H100, H200, L40S, RTX-4090, MI300X, Ascend-910B, or a hardware file (FILE:NAME where it has "
    "several)."
)

DescribedModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Checkpoint folder, config.json, or one of minicpm-v-2.6, internvl2-8b, internvl2-26b, qwen2.5-vl-7b, "
        "qwen3-vl-8b; the built-in model if left out.",
    ),
]
DescribedGPU = Annotated[str | None, typer.Option(help=f"{KNOWN_GPUS} Not beside --profile.", show_default=USUAL_GPU)]


def check_range(flag: str, number: int | None, low: int, high: int) -> None:
    require(number is None or low <= number <= high, flag, f"{number} is not between {low} and {high}")


def check_alone(flag: str, others: Mapping[str, object]) -> None:
    """Of a flag that is given and says what these others would; None is one that is not."""
    for other, value in others.items():
        require(value is None, f"{other}, {flag}", f"{flag} says what {other} would; leave one of them out")


def check_folders(files: Mapping[str, Path | None]) -> None:
    """Of files by their flags, before anything is computed for them: whether each can be written."""
    for flag, path in files.items():
        if path is not None:
            require(path.parent.is_dir(), flag, f"{path}: there is no folder {path.parent}")
            require(not path.is_dir(), flag, f"{path} is a folder")
            require(os.access(path.parent, os.W_OK | os.X_OK), flag, f"{path}: nothing may be written to {path.parent}")


def slo(workload: "Workload", ttft: str | None, tpot: str | None, attainment: float | None) -> "Slo | None":
    """Of the workload, but for what --slo-ttft, --slo-tpot and --attainment say. None: nothing is bounded."""
    from msgspec.structs import asdict

    from triptych.planning.quantities import PositiveSeconds
    from triptych.planning.workloads.workload import Slo

    require(attainment is None or 0 < attainment <= 1, "--attainment", f"{attainment} is not above 0 and at most 1")
    fields = {} if workload.slo is None else asdict(workload.slo)
    given = {"ttft": ("--slo-ttft", ttft), "tpot": ("--slo-tpot", tpot)}
    fields |= {name: quantity(flag, PositiveSeconds, text) for name, (flag, text) in given.items() if text is not None}
    if not fields:
        said = "is the share that keeps an SLO, and there is none; give --slo-ttft or --slo-tpot"
        require(attainment is None, "--attainment", said)
        return None
    try:
        return Slo(**fields | ({} if attainment is None else {"attainment": attainment}))
    except ValueError as error:
        raise ConfigError(f"--slo-ttft, --slo-tpot: {error}") from None


def quantity(flag: str, kind: type[Unit], text: str) -> Unit:
    """A number with its unit."""
    try:
        return kind.parse(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from None


# ---- MODEL


def is_built_in(model: str | None) -> bool:
    """Left out, or its folder."""
    return model is None or os.path.realpath(os.path.expanduser(model)) == os.path.realpath(checkpoint_path())


def served_names(model: str | None) -> list[str]:
    """What clients may call a model that is served, the first in answers; they are told of the others too."""
    names = [] if model is None else [model]
    return [*names, BUILT_IN] if is_built_in(model) else names


def find_checkpoint(model: str | None, revision: str) -> Path:
    """A folder, or what the hub has under this name. Raises ConfigError, also for the names of presets."""
    from triptych.model.loading import resolve_checkpoint
    from triptych.planning.model.shapes import CHECKPOINTS

    if model is None:
        return checkpoint_path()
    if model in CHECKPOINTS and not Path(model).is_dir():
        raise ConfigError(
            f"model {model!r}: is what capacity, simulate and plan call {CHECKPOINTS[model]}; give that, or its folder"
        )
    return resolve_checkpoint(model, revision)


def find_model(model: str | None) -> "ModelShape":
    """What the config of a model says; the built-in one if left out."""
    from dataclasses import replace

    from triptych.planning.model.shapes import find_shape

    shape = find_shape(str(checkpoint_path()) if model is None else model)
    path = None if model is None else os.path.dirname(model) if os.path.isfile(model) else model
    return replace(shape, name=BUILT_IN) if is_built_in(path) else shape


def load_profile(path: Path, shape: "ModelShape") -> "Profile":
    """Raises ConfigError naming the file, also where it is of another model."""
    from triptych.planning.costs.profile import Profile
    from triptych.planning.costs.same_model import is_of

    profile = Profile.load(path)
    require(is_of(profile, shape), "--profile", f"{path} is of the model {profile.model}, and not of {shape.name}")
    return profile
