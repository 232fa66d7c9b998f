"""Towers that take squares of one size, or patches of one frame: CLIP and its kin, Pixtral, InternViT, Ovis2."""

from triptych.planning.model.configs import Fields
from triptych.planning.model.tower import Tower, linear, mlp


def clip(vision: Fields) -> Tower:
    hidden, patch = vision.integer("hidden_size"), vision.square("patch_size")
    positions = (vision.square("image_size") // patch) ** 2 + 1
    outside = hidden + 3 * patch * patch * hidden + positions * hidden + 4 * hidden
    return _encoder(vision, outside, class_positions=1)


def siglip(vision: Fields) -> Tower:
    hidden, patch = vision.integer("hidden_size"), vision.square("patch_size")
    positions = (vision.square("image_size") // patch) ** 2
    outside = linear(3 * patch * patch, hidden) + positions * hidden + 2 * hidden
    if vision.flag("vision_use_head"):
        outside += hidden + linear(hidden, 3 * hidden) + linear(hidden, hidden) + 2 * hidden
        outside += mlp(hidden, vision.integer("intermediate_size"))
    return _encoder(vision, outside)


def _encoder(vision: Fields, outside: int, *, class_positions: int = 0) -> Tower:
    """Layers of CLIP and its kin, with biases everywhere."""
    hidden, width, patch = _sizes(vision)
    layers, heads = _counts(vision)
    each = 4 * linear(hidden, hidden) + 4 * hidden + mlp(hidden, width)
    return Tower(
        parameters=outside + layers * each,
        layers=layers,
        hidden=hidden,
        intermediate=width,
        heads=heads,
        head_dim=hidden // heads,
        inputs=3 * patch * patch,
        class_positions=class_positions,
    )


def pixtral(vision: Fields) -> Tower:
    hidden, width, patch = _sizes(vision)
    layers, heads = _counts(vision)
    each = 4 * hidden * hidden + 3 * hidden * width + 2 * hidden
    return Tower(
        parameters=3 * patch * patch * hidden + hidden + layers * each,
        layers=layers,
        hidden=hidden,
        intermediate=width,
        gated=True,
        heads=heads,
        head_dim=hidden // heads,
        inputs=3 * patch * patch,
    )


def internvit(vision: Fields) -> Tower:
    """Both spellings of it: transformers' own, and that of the checkpoints that bring their code."""
    hidden, width, patch = _sizes(vision)
    layers, heads = _counts(vision)
    positions = (vision.square("image_size") // patch) ** 2 + 1
    norm = hidden if vision.text("norm_type") == "rms_norm" else 2 * hidden
    bias = vision.flag("attention_bias") or vision.flag("qkv_bias")
    heads_norms = 2 * hidden if vision.flag("use_qk_norm") or vision.flag("qk_normalization") else 0
    attention = linear(hidden, 3 * hidden, bias) + linear(hidden, hidden) + heads_norms
    each = attention + 2 * norm + 2 * hidden + mlp(hidden, width)
    outside = hidden + positions * hidden + linear(3 * patch * patch, hidden)
    outside += hidden if vision.flag("use_mask_token") else 0
    if vision.is_given("use_mean_pooling") and not vision.flag("use_mean_pooling"):
        outside += 2 * hidden
    return Tower(
        parameters=outside + layers * each,
        layers=layers,
        hidden=hidden,
        intermediate=width,
        heads=heads,
        head_dim=hidden // heads,
        inputs=3 * patch * patch,
        class_positions=1,
    )


def ovis2(vision: Fields) -> Tower:
    hidden, width, patch = _sizes(vision)
    layers, heads = _counts(vision)
    attention = 4 * linear(hidden, hidden, vision.flag("qkv_bias"))
    bias = vision.flag("mlp_bias")
    each = attention + 2 * linear(hidden, width, bias) + linear(width, hidden, bias) + 2 * hidden
    positions = (vision.square("image_size") // patch) ** 2
    outside = linear(3 * patch * patch, hidden) + positions * hidden + 2 * hidden
    words = vision.integer("vocab_size") - vision.integer("num_visual_indicator_tokens")
    return Tower(
        parameters=outside + layers * each,
        projector=hidden * vision.integer("hidden_stride") ** 2 * words + 2 * words,
        layers=layers,
        hidden=hidden,
        intermediate=width,
        gated=True,
        heads=heads,
        head_dim=hidden // heads,
        inputs=3 * patch * patch,
    )


def _sizes(vision: Fields) -> tuple[int, int, int]:
    """Width of the layers, and within an MLP; pixels of the side of a patch."""
    return vision.integer("hidden_size"), vision.integer("intermediate_size"), vision.square("patch_size")


def _counts(vision: Fields) -> tuple[int, int]:
    """Layers, and heads of each."""
    return vision.integer("num_hidden_layers"), vision.integer("num_attention_heads")
