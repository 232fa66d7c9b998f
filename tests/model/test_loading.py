"""A role loads its own tensors and nothing else; what cannot be served exactly is refused with the reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.checkpoints import FAMILIES
from tests.model.builders import checkpoint, model_config
from triptych.errors import ConfigError
from triptych.model.loading import (
    Half,
    full_class,
    load_config,
    load_half,
    resolve_checkpoint,
    resolve_dtype,
    resolve_max_model_len,
    weight_bytes,
)
from triptych.model.probe import embedding_layout, kv_layout
from triptych.model.tuning import tune

torch.set_num_threads(1)
LANGUAGE_KEYS = ("language_model", "text_model", "lm_head", "model.layers", "model.norm", "model.embed_tokens")


def without_tensors(source: Path, target: Path, drop: Any) -> Path:
    """A copy of a checkpoint that lacks the tensors for whose name `drop` is true."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not drop(name)}
    assert len(kept) < len(tensors)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def changed_config(source: Path, target: Path, **text_changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"] |= text_changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def is_language(name: str) -> bool:
    return any(key in name for key in LANGUAGE_KEYS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_halves_of_a_model_weigh_as_much_as_the_whole(family: str) -> None:
    config = model_config(checkpoint(family))
    encode, language = (weight_bytes(load_half(config, half)) for half in Half)
    whole = full_class(load_config(config.path)).from_pretrained(config.path, dtype=torch.float32)
    tune(whole)
    assert encode > 0
    assert language > 0
    assert encode + language == pytest.approx(weight_bytes(whole), rel=1e-3)


def test_an_encode_instance_reads_no_language_tensor_and_the_reverse(tmp_path: Path) -> None:
    source = checkpoint("qwen2_5_vl")
    vision_only = without_tensors(source, tmp_path / "vision", is_language)
    language_only = without_tensors(source, tmp_path / "language", lambda name: not is_language(name))
    load_half(model_config(vision_only), Half.ENCODE)
    load_half(model_config(language_only), Half.LANGUAGE)
    with pytest.raises(ConfigError, match="missing"):
        load_half(model_config(vision_only), Half.LANGUAGE)
    with pytest.raises(ConfigError, match="missing"):
        load_half(model_config(language_only), Half.ENCODE)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    gone = "layers.1.mlp.up_proj.weight"
    folder = without_tensors(checkpoint("llava"), tmp_path / "m", lambda name: name.endswith(gone))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_half(model_config(folder), Half.LANGUAGE)


def test_a_tensor_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    folder = changed_config(checkpoint("llava"), tmp_path / "m", intermediate_size=96)
    with pytest.raises(ConfigError, match="mismatch"):
        load_half(model_config(folder), Half.LANGUAGE)


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llava"), tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=str(folder)):
        load_half(model_config(folder), Half.LANGUAGE)


def test_an_unknown_class_is_refused_by_name(tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llava"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["NoSuchModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="NoSuchModel"):
        load_half(model_config(folder), Half.ENCODE)


def test_a_text_model_is_refused() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=32
    )
    config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(ConfigError, match="multimodal"):
        kv_layout(config, torch.float32)


@pytest.mark.parametrize("half", Half)
def test_dummy_weights_need_only_a_config_and_repeat(half: Half, tmp_path: Path) -> None:
    shutil.copy(checkpoint("qwen3_vl") / "config.json", tmp_path)
    config = model_config(tmp_path, load_format="dummy", seed=3)
    first, second = (dict(load_half(config, half).named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(parameter.isfinite().all() for parameter in first.values())
    other = dict(load_half(model_config(tmp_path, load_format="dummy", seed=4), half).named_parameters())
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_have_the_type_that_was_asked(dtype: str) -> None:
    for half in Half:
        model = load_half(model_config(checkpoint("qwen2_vl"), dtype=dtype), half)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_auto_is_the_type_of_the_checkpoint() -> None:
    folder = checkpoint("qwen2_vl")
    assert resolve_dtype(model_config(folder, dtype="auto"), load_config(folder)) == torch.float32
    assert resolve_dtype(model_config(folder, dtype="bfloat16"), load_config(folder)) == torch.bfloat16


def test_the_length_limit_is_the_models_unless_a_smaller_one_is_asked() -> None:
    folder = checkpoint("qwen2_vl")
    config = load_config(folder)
    assert resolve_max_model_len(model_config(folder), config) == 4096
    assert resolve_max_model_len(model_config(folder, max_model_len=100), config) == 100
    for wrong in (0, 4097):
        with pytest.raises(ConfigError, match="max_model_len"):
            resolve_max_model_len(model_config(folder, max_model_len=wrong), config)


def test_a_folder_that_does_not_exist_and_one_without_a_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_checkpoint(str(tmp_path / "gone"))
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_config(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_layouts_follow_from_the_config_alone(family: str) -> None:
    config = AutoConfig.from_pretrained(checkpoint(family))
    kv, rows = kv_layout(config, torch.bfloat16), embedding_layout(config, torch.bfloat16)
    assert (kv.num_layers, kv.kv_heads, kv.head_dim, kv.dtype) == (len(kv.slots), 2, 16, torch.bfloat16)
    assert sorted({*kv.slots, *(state.layer for state in kv.states)}) == [0, 1, 2]
    assert rows.row_width == 64 * (3 if family.startswith("qwen3_vl") else 1)
    assert config._attn_implementation_internal in (None, "sdpa", "eager"), "the config of the caller was changed"


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "soft-capped"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "soft-capped"),
    ],
)
def test_attention_that_would_be_computed_inexactly_is_refused(
    family: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(checkpoint(family))
    for name, value in change.items():
        setattr(config.get_text_config(), name, value)
    with pytest.raises(ConfigError, match=reason):
        kv_layout(config, torch.float32)
