"""Whether a profile is of a model: profiles are files, and one of a small model would make a large one fast."""

from pathlib import Path

from triptych.planning.costs.profile import Profile
from triptych.planning.costs.shapes import CHECKPOINTS
from triptych.planning.model.shape import ModelShape

TOLERANCE = 1.25  # of encoder to language weights: engines keep copies of matrices, and of tables none
NUMBER_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # bytes of a number here over those there


def is_of(profile: Profile, shape: ModelShape) -> bool:
    """By name, or by the sizes that no two models share, whatever their numbers are stored in."""
    names = {shape.name, CHECKPOINTS.get(shape.name, shape.name)}
    return bool(names & {profile.model, Path(profile.model).name}) or _is_alike(profile, shape)


def _is_alike(profile: Profile, shape: ModelShape) -> bool:
    memory = profile.memory
    copies = max(1, profile.tensor_parallel // shape.language.kv_heads)  # of a head of KV
    kv = memory.kv_token / (shape.kv_token_bytes * copies)
    row = memory.embedding_row / shape.row_bytes
    encoder = memory.encoder_weights * shape.language_parameters
    language = memory.language_weights * shape.encoder_parameters
    return kv == row in NUMBER_SIZES and language <= TOLERANCE * encoder and encoder <= TOLERANCE * language
