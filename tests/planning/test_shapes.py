"""Shapes against what they describe: models of transformers without weights, and the processors of checkpoints."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoints import FAMILIES
from tests.planning.described import checkpoint, shape
from tests.recipes import RECIPES
from triptych.config import EMBEDDING_BLOCK_TOKENS, KV_BLOCK_TOKENS
from triptych.errors import ConfigError
from triptych.model.loading import Half, load_config, meta_half
from triptych.model.probe import embedding_layout, kv_layout
from triptych.planning.model.families import FAMILIES as KNOWN
from triptych.planning.model.shapes import PRESETS, find_shape, preset, shape_of


def num_parameters(config: Any, half: Half) -> int:
    """Tied ones once. The language half keeps the newline row of the LLaVAs beside it, which it never reads."""
    model = meta_half(config, half)
    named = [item for item in model.named_parameters() if half is Half.ENCODE or "image_newline" not in item[0]]
    return sum(parameter.numel() for _, parameter in named)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_both_halves_are_those_of_the_loaded_model(family: str) -> None:
    config = load_config(checkpoint(family))
    assert shape(family).encoder_parameters == num_parameters(config, Half.ENCODE)
    assert shape(family).language_parameters == num_parameters(config, Half.LANGUAGE)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_kv_of_rows_and_of_states_are_those_that_the_engine_finds_by_running_the_model(family: str) -> None:
    config = load_config(checkpoint(family))
    found = replace(shape(family), weight_bytes=2)
    kv = kv_layout(config, torch.bfloat16)
    assert found.kv_token_bytes * KV_BLOCK_TOKENS == kv.block_bytes
    assert found.row_bytes * EMBEDDING_BLOCK_TOKENS == embedding_layout(config, torch.bfloat16).block_bytes
    assert found.kv_sequence_bytes == sum(state.num_bytes for state in kv.states)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "aya_vision"])  # cannot be built
def test_defaults_for_keys_that_a_config_leaves_out_are_those_of_transformers(family: str) -> None:
    """The config's class without an argument, against a file that says its type only."""
    model_class = RECIPES[family].model_class
    config = getattr(transformers, model_class).config_class()
    config.architectures = [model_class]
    said: dict[str, Any] = {"model_type": config.model_type}
    found = shape_of(said)
    assert found.encoder_parameters == num_parameters(config, Half.ENCODE)
    assert found.language_parameters == num_parameters(config, Half.LANGUAGE)


def test_layers_without_experts_before_those_with_some_are_counted() -> None:
    config = transformers.Glm4vMoeConfig()
    config.architectures = ["Glm4vMoeForConditionalGeneration"]
    found = shape_of({"model_type": "glm4v_moe"})
    assert found.encoder_parameters == num_parameters(config, Half.ENCODE)
    assert found.language_parameters == num_parameters(config, Half.LANGUAGE)
    assert found.language.active < found.language.parameters / 5


PUBLIC = {  # parameters as the model cards on the Hugging Face hub say them, in billions
    "minicpm-v-2.6": 8.10,
    "internvl2-8b": 8.08,
    "internvl2-26b": 25.5,
    "qwen2.5-vl-7b": 8.29,
    "qwen3-vl-8b": 8.77,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_that_their_cards_say(name: str) -> None:
    assert preset(name).parameters == pytest.approx(PUBLIC[name] * 1e9, rel=0.01)
    assert find_shape(name) == preset(name)


QWEN3_EYES = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}
INTERN_EYES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
PUBLISHED: dict[
    str, tuple[float, dict[str, Any], dict[str, Any]]
] = {  # billions; text_config and vision_config, abridged
    "gemma3 (4b-it)": (
        4.30,
        {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False},
    ),
    "llava (1.5-7b)": (
        7.06,
        {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        INTERN_EYES | {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    ),
    "glm4v (GLM-4.1V-9B)": (
        10.29,
        {"model_type": "glm4v_text", "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40},
        {"model_type": "glm4v", "depth": 24, "hidden_size": 1536, "out_hidden_size": 4096},
    ),
    "qwen3_vl_moe (30B-A3B)": (
        31.07,
        {"model_type": "qwen3_vl_moe_text", "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 48}
        | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        QWEN3_EYES | {"model_type": "qwen3_vl_moe", "out_hidden_size": 2048},
    ),
    "mistral3 (Small 3.1 24B)": (
        24.01,
        {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40}
        | {"head_dim": 128, "vocab_size": 131072},
        INTERN_EYES | {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
    ),
    "internvl (3-8B)": (
        7.94,
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151674},
        INTERN_EYES | {"model_type": "internvl_vision", "attention_bias": True},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_checkpoints_have_the_parameters_that_their_cards_say(name: str) -> None:
    billions, text, vision = PUBLISHED[name]
    found = shape_of({"model_type": name.split()[0], "text_config": text, "vision_config": vision})
    assert found.parameters == pytest.approx(billions * 1e9, rel=0.002)


def test_configs_without_an_object_for_the_text_model_are_read() -> None:
    """As Qwen2-VL-7B-Instruct has it."""
    said = {"model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    said |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    said["vision_config"] = {"depth": 32, "embed_dim": 1280, "in_chans": 3, "hidden_size": 3584}
    assert shape_of(said).parameters == pytest.approx(8.291e9, rel=0.001)


def test_a_rope_that_is_stretched_in_the_positions_already_is_not_stretched_again() -> None:
    text = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    assert shape_of({"model_type": "gemma3", "text_config": text}).context == 131_072


@pytest.mark.parametrize(
    ("name", "size", "rows"),
    [
        # Patches of a picture in Table 3 of arXiv 2501.05460, of 64 and 256 rows.
        ("minicpm-v-2.6", (313, 234), [64] * 1),
        ("minicpm-v-2.6", (787, 444), [64] * 3),
        ("minicpm-v-2.6", (4032, 3024), [64] * 10),
        ("internvl2-8b", (313, 234), [256] * 13),
        ("internvl2-8b", (787, 444), [256] * 3),
        ("internvl2-26b", (4032, 3024), [256] * 13),
        # By hand: 644 x 476 pixels are 23 x 17 squares of 28; 640 x 480 are 20 x 15 of 32.
        ("qwen2.5-vl-7b", (644, 476), [23 * 17]),
        ("qwen3-vl-8b", (640, 480), [20 * 15]),
    ],
)
def test_presets_cut_pictures_as_published(name: str, size: tuple[int, int], rows: list[int]) -> None:
    assert preset(name).image(*size) == tuple(rows)


def test_presets_of_served_families_are_the_models_that_transformers_builds() -> None:
    for name, model_class in {
        "qwen2.5-vl-7b": "Qwen2_5_VLForConditionalGeneration",
        "qwen3-vl-8b": "Qwen3VLForConditionalGeneration",
    }.items():
        said = json.loads(Path(f"triptych/planning/data/models/{name}.json").read_text())["config"]
        config = getattr(transformers, model_class).config_class.from_dict(said)
        config.architectures = [model_class]
        assert preset(name).encoder_parameters == num_parameters(config, Half.ENCODE)
        assert preset(name).language_parameters == num_parameters(config, Half.LANGUAGE)


def test_a_stretched_rope_has_more_positions_than_the_config_says() -> None:
    assert preset("internvl2-8b").context == 65_536  # "dynamic" by a factor of 2
    assert preset("internvl2-26b").context == 98_304
    assert preset("minicpm-v-2.6").context == 32_768


def test_work_of_a_unit_grows_with_the_square_of_its_positions_only_in_attention() -> None:
    tower = preset("qwen3-vl-8b").vision
    assert tower is not None
    assert tower.flops_of_attention(2000) == 4 * tower.flops_of_attention(1000)
    windowed = preset("qwen2.5-vl-7b").vision
    assert windowed is not None
    assert windowed.flops_of_attention(8000) < 0.2 * tower.flops_of_attention(8000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "model_type: 'bert' is not known; known are audioflamingo3"),
        ({"model_type": None}, "model_type: '' is not known"),
        ({"dtype": "int3"}, "dtype: 'int3' is not known; known are float32"),
        ({"text_config": {"hidden_size": "wide"}}, "text_config.hidden_size: 'wide' is not a whole number"),
        ({"text_config": {"num_hidden_layers": 0}}, "text_config.num_hidden_layers: 0 is outside 1.."),
        (
            {"text_config": {"num_hidden_layers": 10**9}},
            "text_config.num_hidden_layers: 1000000000 is outside 1..10000",
        ),
        ({"text_config": {"num_key_value_heads": 5}}, "text_config.num_key_value_heads: 5 does not divide 32 heads"),
        ({"text_config": {"model_type": "gpt9"}}, "text_config.model_type: 'gpt9' is not known; known are"),
        ({"text_config": []}, ""),
        ({"text_config": [3]}, "text_config: [3] is no object"),
        ({"vision_config": {"model_type": "eye"}}, "vision_config.model_type: 'eye' is not known"),
        ({"vision_config": {"patch_size": float("nan")}}, "vision_config.patch_size: nan is not a whole number"),
        ({"vision_config": {"patch_size": float("inf")}}, "vision_config.patch_size: inf is not a whole number"),
        ({"vision_config": {"patch_size": -3}}, "vision_config.patch_size: -3 is outside 1.."),
    ],
)
def test_config_that_says_nothing_sensible_is_refused_by_its_key(change: dict[str, Any], words: str) -> None:
    said = {"model_type": "qwen3_vl", "text_config": {}, "vision_config": {}} | change
    if not words:
        assert shape_of(said).parameters
        return
    with pytest.raises(ConfigError) as refused:
        shape_of(said)
    assert words in str(refused.value)


def test_model_that_is_nowhere_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a folder, nor a config file, nor one of minicpm-v-2\.6"):
        find_shape("minicpm")
    with pytest.raises(ConfigError, match=r"config.json: cannot be read: No such file"):
        find_shape(str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text("[]")
    with pytest.raises(ConfigError, match="is no JSON object"):
        find_shape(str(file))
    file.write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"config.json: model_type: 'bert'"):
        find_shape(str(file))


def test_a_config_json_is_the_model_of_its_folder(tmp_path: Path) -> None:
    folder = shutil.copytree("triptych/demo/checkpoint", tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safet*"))
    whole = find_shape(str(folder))
    assert find_shape(str(folder / "config.json")) == whole
    assert whole.name == "tiny"
    (folder / "preprocessor_config.json").unlink()
    assert find_shape(str(folder / "config.json")).image(4032, 3024) != whole.image(4032, 3024)


def test_a_config_under_another_name_stands_alone(tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(f"triptych/demo/checkpoint/{name}", tmp_path)
    copied = shutil.copy(tmp_path / "config.json", tmp_path / "other.json")
    alone, whole = find_shape(str(copied)), find_shape(str(tmp_path))
    assert alone.name == "other"
    assert alone.image(4032, 3024) != whole.image(4032, 3024)


def test_a_model_that_no_file_can_be_called_is_refused_too(tmp_path: Path) -> None:
    for name in ("", "a" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match=r"neither a folder, nor a config file, nor one of minicpm-v-2\.6"):
            find_shape(name)
    file = tmp_path / "config.json"
    file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config\.json: is nested too deeply"):
        find_shape(str(file))


def test_a_picture_that_the_server_refuses_is_refused_for_every_model() -> None:
    for name in PRESETS:
        assert preset(name).image(30, 6000)
        with pytest.raises(ConfigError, match="30x6001: one side is more than 200 times the other"):
            preset(name).image(30, 6001)
        with pytest.raises(ConfigError, match="6001x30: one side"):
            preset(name).image(6001, 30)
    for name in ("qwen2.5-vl-7b", "qwen3-vl-8b"):
        with pytest.raises(ConfigError, match="6001x30: one side"):
            preset(name).video(8, 6001, 30)


def test_a_config_by_which_pictures_become_nothing_is_refused() -> None:
    found = json.loads(Path("triptych/planning/data/models/internvl2-8b.json").read_text(encoding="utf-8"))
    small = shape_of(found["config"] | {"force_image_size": 1}, found.get("processor"))
    with pytest.raises(ConfigError, match="a picture of 640x480 has a unit without rows by the sizes in its config"):
        small.image(640, 480)


def test_media_that_a_model_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="qwen3-vl-8b: takes no audio"):
        preset("qwen3-vl-8b").audio(3.0)
    with pytest.raises(ConfigError, match="width: 0 is not above 0"):
        preset("qwen3-vl-8b").image(0, 10)


def test_every_family_that_is_served_has_a_shape() -> None:
    from triptych.model.families import _FAMILIES as SERVED

    assert set(SERVED) <= set(KNOWN)
