"""Whether a profile is of a model: profiles are files, and one of a small model would make a large one fast."""

from pathlib import Path

from triptych.planning.costs.profile import Profile
from triptych.planning.model.shape import ModelShape
from triptych.planning.model.shapes import CHECKPOINTS

TOLERANCE = 1.25  # of encoder to language weights: engines keep copies of matrices, and of tables none
TOLERANCE_BY_NAME = 2 * TOLERANCE  # where one half may be all matrices, and the other all tables
NUMBER_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # bytes of a number here over those there


def is_of(profile: Profile, shape: ModelShape) -> bool:
    """By the sizes that no two models share, whatever their numbers are stored in. A name alone says little, as folders
    of different models are often called the same: it only lets the weights be further apart."""
    names = {shape.name, CHECKPOINTS.get(shape.name, shape.name)}
    has_its_name = bool(names & {profile.model, Path(profile.model).name})
    tolerance = TOLERANCE_BY_NAME if has_its_name else TOLERANCE
    return _has_its_rows(profile, shape) and _weigh_alike(profile, shape, tolerance)


def _has_its_rows(profile: Profile, shape: ModelShape) -> bool:
    """Of KV and of embeddings."""
    copies = max(1, profile.tensor_parallel // shape.language.kv_heads)  # of a head of KV
    kv = profile.memory.kv_token / (shape.kv_token_bytes * copies)
    row = profile.memory.embedding_row / shape.row_bytes
    return kv == row and row in NUMBER_SIZES


def _weigh_alike(profile: Profile, shape: ModelShape, tolerance: float) -> bool:
    encoder = profile.memory.encoder_weights * shape.language_parameters
    language = profile.memory.language_weights * shape.encoder_parameters
    return language <= tolerance * encoder and encoder <= tolerance * language
