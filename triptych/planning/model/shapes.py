"""What a model's config says without loading anything: parameters, rows of media, KV of a token, work.

`shape_of` takes the config (and the processor's arguments) as read from their files; `find_shape` takes what a user
names: a checkpoint's folder, a config file, or one of the models described in `data/models`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from triptych.errors import ConfigError
from triptych.planning import files
from triptych.planning.model.configs import Fields
from triptych.planning.model.families import FAMILIES
from triptych.planning.model.shape import ModelShape

__all__ = ["CHECKPOINTS", "PRESETS", "ModelShape", "find_shape", "preset", "shape_of"]

CHECKPOINTS = {  # of models that are known by name, on the Hugging Face hub
    "minicpm-v-2.6": "openbmb/MiniCPM-V-2_6",
    "internvl2-8b": "OpenGVLab/InternVL2-8B",
    "internvl2-26b": "OpenGVLab/InternVL2-26B",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
}
PRESETS = tuple(CHECKPOINTS)
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def shape_of(config: Mapping[str, Any], processor: Mapping[str, Any] | None = None) -> ModelShape:
    """Of a config.json as it is. `processor`: what its preprocessor_config.json and processor_config.json say together;
    without it the defaults of the family's class.

    Raises ConfigError for a type that is not known (naming those that are), and for a key that is missing or no size.
    """
    fields = Fields(config)
    if fields.text("model_type") == "qwen2_5_omni":
        fields = fields.part("thinker_config", {"model_type": "qwen2_5_omni_thinker"})
    kind, tower = fields.text("model_type"), fields.part("vision_config").text("model_type")
    read = FAMILIES.get(f"{kind}/{tower}") or FAMILIES.get(kind)
    if read is None:
        known = ", ".join(sorted(name for name in FAMILIES if "/" not in name))
        raise ConfigError(f"model_type: {kind!r} is not known; known are {known}")
    shape = read(fields, Fields(processor or {}, name="processor"))
    return replace(shape, name=kind, weight_bytes=_weight_bytes(fields))


def _weight_bytes(config: Fields) -> int:
    """Two where nobody says anything."""
    parts = (config, config.part("text_config"), config.part("llm_config"))
    names = (part.text(key) for part in parts for key in ("dtype", "torch_dtype"))
    name = next(filter(None, names), "bfloat16")
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype: {name!r} is not known; known are {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


def find_shape(model: str) -> ModelShape:
    """Of a checkpoint's folder, a config file, or one of PRESETS, also by its name on the hub. A config.json is that of
    its folder, and what the processor is told stands beside it; a config under any other name stands alone.

    Raises ConfigError naming what there is.
    """
    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):  # unlike those of Path these take any text
        return _read(path / "config.json", path.resolve().name, _processor(path))
    if os.path.isfile(path) and path.name == "config.json":
        return _read(path, path.resolve().parent.name, _processor(path.parent))
    if os.path.isfile(path):
        return _read(path, path.stem, None)
    names = {of: name for name, of in CHECKPOINTS.items()}
    if model in PRESETS or model in names:
        return preset(names.get(model, model))
    raise ConfigError(f"model {model!r}: neither a folder, nor a config file, nor one of {', '.join(PRESETS)}")


def preset(name: str) -> ModelShape:
    """One of PRESETS."""
    file = resources.files("triptych.planning").joinpath(f"data/models/{name}.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    return replace(shape_of(found["config"], found.get("processor")), name=name)


def _processor(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found |= files.load_object(folder / name)
    if (folder / "video_preprocessor_config.json").is_file():
        found["video_processor"] = files.load_object(folder / "video_preprocessor_config.json")
    return found


def _read(file: Path, name: str, processor: Mapping[str, Any] | None) -> ModelShape:
    config = files.load_object(file)
    try:
        return replace(shape_of(config, processor), name=name)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
