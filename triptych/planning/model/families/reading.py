"""What readers of several families share: the text model, the arguments of processors, common projectors."""

from collections.abc import Mapping
from typing import Any

from triptych.errors import ConfigError
from triptych.planning.model import language as texts
from triptych.planning.model.configs import Fields
from triptych.planning.model.language import Language
from triptych.planning.model.tower import Tower, linear

NAMELESS = ""  # `shape_of` gives the name


def read_language(
    config: Fields,
    usual: str,
    *,
    tied: bool = False,
    key: str = "text_config",
    absent: Mapping[str, Any] | None = None,
) -> Language:
    """`usual`: the family's type of text model. Where the config has no object for its text model, `absent` holds in
    it, and `tied` whether its head is the embedding; else that is as in its type, unless either of them says it.

    Older checkpoints write the text model's keys beside the others.
    """
    text = config.part(key) if config.is_given(key) else config
    kind = text.text("model_type") if config.is_given(key) else usual
    kind = (kind or usual).replace("internlm2_chat", "internlm2")
    if f"{kind}_text" in texts.DEFAULTS:
        kind = f"{kind}_text"
    if kind not in texts.DEFAULTS:
        known = ", ".join(sorted(texts.DEFAULTS))
        raise ConfigError(f"{text.path('model_type')}: {kind!r} is not known; known are {known}")
    if config.is_given(key):
        tied = kind in texts.TIED
    for said in (config, text):
        if said.is_given("tie_word_embeddings"):
            tied = said.flag("tie_word_embeddings")
            break
    defaults = dict(texts.DEFAULTS[kind]) | dict(absent if absent and not config.is_given(key) else {})
    return texts.read_language(Fields(text.given, defaults, name=text.name), kind=kind, tied=tied)


def patches_of(vision: Fields) -> int:
    """Up and across the tower's square."""
    image, patch = vision.square("image_size"), vision.square("patch_size")
    if image < patch:
        raise ConfigError(f"{vision.path('image_size')}: {image} is less than the patch_size, {patch}")
    return image // patch


def images_of(processor: Fields, defaults: Mapping[str, Any] | None = None) -> Fields:
    """Arguments of the image processor: an object of its own in newer checkpoints."""
    given = processor.part("image_processor").given or processor.given
    return Fields(given, defaults, name=processor.name)


def pixel_bounds(arguments: Fields, least: int, most: int) -> tuple[int, int]:
    """Those of `size`, or of the two keys that older checkpoints have."""
    size = arguments.part("size")
    low = arguments.integer("min_pixels", size.integer("shortest_edge", least))
    return low, arguments.integer("max_pixels", size.integer("longest_edge", most))


def square_of(vision: Fields) -> tuple[int, int]:
    """Pixels of the side of a row, and its positions."""
    merge = vision.integer("spatial_merge_size")
    return vision.integer("patch_size") * merge, merge**2


def two_layers(config: Fields, tower: Tower, language: Language) -> int:
    """Of features of one layer, or of several side by side."""
    layers = config.get("vision_feature_layer")
    width = tower.hidden * (len(layers) if isinstance(layers, list) else 1)
    bias = config.flag("multimodal_projector_bias") or not config.is_given("multimodal_projector_bias")
    return linear(width, language.hidden, bias) + linear(language.hidden, language.hidden, bias)
