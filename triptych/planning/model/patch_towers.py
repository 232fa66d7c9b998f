"""Towers that take pictures of any size in patches of several frames: those of Qwen and of GLM."""

from typing import Any

from triptych.planning.model.configs import Fields
from triptych.planning.model.tower import Tower, linear, mlp


def qwen2_vl(vision: Fields) -> Tower:
    hidden, out = vision.integer("embed_dim"), vision.integer("hidden_size")
    width = int(hidden * vision.number("mlp_ratio"))
    each = 4 * hidden + linear(hidden, 3 * hidden) + linear(hidden, hidden) + mlp(hidden, width)
    return _patches(vision, hidden, width, each, outside=0, projector=_merger(vision, hidden, out, 2 * hidden))


def qwen2_5_vl(vision: Fields) -> Tower:
    hidden, out, width = _sizes(vision)
    gated_mlp = 2 * linear(hidden, width) + linear(width, hidden)
    each = 2 * hidden + linear(hidden, 3 * hidden) + linear(hidden, hidden) + gated_mlp
    window = (vision.integer("window_size") // vision.integer("patch_size")) ** 2
    return _patches(
        vision,
        hidden,
        width,
        each,
        outside=0,
        projector=_merger(vision, hidden, out, hidden),
        gated=True,
        window=window,
        full_layers=len(vision.items("fullatt_block_indexes")),
    )


def qwen3_vl(vision: Fields) -> Tower:
    hidden, out, width = _sizes(vision)
    each = 4 * hidden + linear(hidden, 3 * hidden) + linear(hidden, hidden) + mlp(hidden, width)
    outside = hidden + vision.integer("num_position_embeddings") * hidden
    merged = hidden * vision.integer("spatial_merge_size") ** 2
    projector = _merger(vision, hidden, out, 2 * hidden)
    projector += len(vision.items("deepstack_visual_indexes")) * _merger(vision, hidden, out, 2 * merged)
    return _patches(vision, hidden, width, each, outside=outside, projector=projector)


def glm4v(vision: Fields) -> Tower:
    hidden, out, inner = _sizes(vision)
    bias = vision.flag("attention_bias")
    each = 2 * hidden + linear(hidden, 3 * hidden, bias) + linear(hidden, hidden, False) + 3 * hidden * out
    positions = (vision.square("image_size") // vision.integer("patch_size")) ** 2
    projector = linear(hidden * vision.integer("spatial_merge_size") ** 2, out)
    projector += out * out + 2 * out + 3 * out * inner
    outside = hidden + positions * hidden + 2 * hidden
    return _patches(vision, hidden, out, each, outside=outside, projector=projector, gated=True)


def _sizes(vision: Fields) -> tuple[int, int, int]:
    """Width of the layers, of the rows, and within an MLP."""
    return vision.integer("hidden_size"), vision.integer("out_hidden_size"), vision.integer("intermediate_size")


def _merger(vision: Fields, hidden: int, out: int, norm: int) -> int:
    merged = hidden * vision.integer("spatial_merge_size") ** 2
    return norm + linear(merged, merged) + linear(merged, out)


def _patches(vision: Fields, hidden: int, width: int, each: int, *, outside: int, projector: int, **more: Any) -> Tower:
    """Towers that take pictures of any size, in patches of several frames."""
    layers, heads = vision.integer("depth"), vision.integer("num_heads")
    inputs = 3 * vision.integer("temporal_patch_size") * vision.integer("patch_size") ** 2
    return Tower(
        parameters=inputs * hidden + outside + layers * each,
        projector=projector,
        layers=layers,
        hidden=hidden,
        intermediate=width,
        heads=heads,
        head_dim=hidden // heads,
        inputs=inputs,
        **more,
    )
