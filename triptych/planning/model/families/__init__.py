"""Which reader each model type has: how a config.json becomes a `ModelShape`.

Beside the families that are served it knows two that the paper measured, MiniCPM-V and InternVL2 with the code of their
checkpoints, so that capacity and plans can be compared with published numbers.
"""

from collections.abc import Callable, Mapping

from triptych.planning.model.configs import Fields
from triptych.planning.model.families import patches, sounds, squares, tiles
from triptych.planning.model.shape import ModelShape

Reader = Callable[[Fields, Fields], ModelShape]

FAMILIES: Mapping[str, Reader] = {
    "audioflamingo3": sounds.audioflamingo3,
    "aya_vision": tiles.aya_vision,
    "gemma3": squares.gemma3,
    "glm4v": patches.glm4v,
    "glm4v_moe": patches.glm4v,
    "idefics3": tiles.idefics3,
    "internvl": tiles.internvl,
    "internvl_chat": tiles.internvl_chat,
    "llava": squares.llava,
    "llava/pixtral": patches.pixtral,
    "llava_next": squares.llava_next,
    "llava_onevision": squares.llava_onevision,
    "minicpmv": tiles.minicpm_v,
    "mistral3": patches.pixtral,
    "ovis2": tiles.ovis2,
    "qwen2_5_omni_thinker": sounds.qwen2_5_omni,
    "qwen2_5_vl": patches.qwen_vl,
    "qwen2_audio": sounds.qwen2_audio,
    "qwen2_vl": patches.qwen_vl,
    "qwen3_5": patches.qwen_vl,
    "qwen3_5_moe": patches.qwen_vl,
    "qwen3_vl": patches.qwen_vl,
    "qwen3_vl_moe": patches.qwen_vl,
    "smolvlm": tiles.idefics3,
    "voxtral": sounds.voxtral,
}
