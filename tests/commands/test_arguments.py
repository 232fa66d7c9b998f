"""MODEL and --profile, as several commands take them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from triptych.commands.arguments import BUILT_IN, find_checkpoint, find_model, load_profile, served_names
from triptych.demo import checkpoint_path
from triptych.errors import ConfigError
from triptych.planning.costs.analytic import analytic_profile
from triptych.planning.costs.hardware import find_device
from triptych.planning.costs.profile import Profile
from triptych.planning.model.shapes import CHECKPOINTS, PRESETS, preset
from triptych.planning.quantities import Bytes

H200 = find_device("H200")


# ---- MODEL


@pytest.mark.parametrize("model", [None, str(checkpoint_path()), str(checkpoint_path() / "config.json")])
def test_the_built_in_model_has_its_name_however_it_is_given(model: str | None) -> None:
    assert find_model(model).name == BUILT_IN
    assert find_model(model) == find_model(None)


def test_other_models_keep_theirs(tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint_path(), tmp_path / "mine")
    assert find_model(str(folder)).name == find_model(str(folder / "config.json")).name == "mine"
    assert find_model("qwen2.5-vl-7b") == preset("qwen2.5-vl-7b")


def test_the_built_in_model_is_served_under_its_name_and_the_one_that_was_given() -> None:
    assert served_names(None) == [BUILT_IN]
    assert served_names(str(checkpoint_path())) == [str(checkpoint_path()), BUILT_IN]
    assert served_names("./other") == ["./other"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_that_only_the_planner_knows_is_refused_with_the_checkpoint(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model '{name}': .* simulate and plan call {CHECKPOINTS[name]}; give that"):
        find_checkpoint(name, "")


def test_a_checkpoint_is_a_folder_or_built_in(tmp_path: Path) -> None:
    assert find_checkpoint(None, "") == checkpoint_path()
    assert find_checkpoint(str(tmp_path), "") == tmp_path


# ---- profiles


def saved(folder: Path, described: str | None, **changes: object) -> Path:
    profile = structs.replace(analytic_profile(find_model(described), H200), **changes)
    profile.save(folder / "profile.json")
    return folder / "profile.json"


def measured(profile: Profile) -> dict[str, Bytes]:
    """Memory as a CPU engine has it that computes in 32 bits: twice the size, and a second copy of each matrix."""
    memory = structs.asdict(profile.memory)
    factors = {"encoder_weights": 4.0, "language_weights": 3.4, "kv_token": 2.0, "embedding_row": 2.0}
    return {name: Bytes(memory[name] * factor) for name, factor in factors.items()}


def test_a_profile_is_of_its_model_and_of_no_other(tmp_path: Path) -> None:
    for model in PRESETS:
        path = saved(tmp_path, model, model="somewhere/else")
        for other in PRESETS:
            if other == model:
                assert load_profile(path, preset(other)).model == "somewhere/else"
            else:
                with pytest.raises(ConfigError, match=rf"profile\.json is of the model .*else, and not of {other}"):
                    load_profile(path, preset(other))


def test_a_profile_of_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    path = saved(tmp_path, None)
    assert load_profile(path, find_model(None)).model == BUILT_IN
    with pytest.raises(ConfigError) as refused:
        load_profile(path, preset("qwen2.5-vl-7b"))
    assert str(refused.value) == f"--profile: {path} is of the model triptych-demo, and not of qwen2.5-vl-7b"


def test_a_profile_knows_its_model_in_any_precision_and_under_any_path(tmp_path: Path) -> None:
    shape = preset("qwen2.5-vl-7b")
    memory = analytic_profile(shape, H200).memory
    wide = structs.replace(memory, **measured(analytic_profile(shape, H200)))
    for name in ("./checkpoints/qwen", "Qwen/Qwen2.5-VL-7B-Instruct"):
        load_profile(saved(tmp_path, "qwen2.5-vl-7b", model=name, memory=wide), shape)
    short = structs.replace(wide, context_len=2048)
    load_profile(saved(tmp_path, "qwen2.5-vl-7b", model="./qwen", memory=short), shape)


def test_a_profile_of_several_gpus_is_of_the_same_model(tmp_path: Path) -> None:
    shape = preset("qwen2.5-vl-7b")  # 28 heads, 4 of KV
    for degree in (2, 4, 28):
        profile = structs.replace(analytic_profile(shape, H200, tensor_parallel=degree), model="other")
        profile.save(tmp_path / "profile.json")
        assert load_profile(tmp_path / "profile.json", shape).tensor_parallel == degree


def test_a_name_alone_makes_no_profile_that_of_another_model(tmp_path: Path) -> None:
    """Folders are often called the same."""
    path, large = saved(tmp_path, None, model="/runs/a/checkpoint"), replace(preset("internvl2-26b"), name="checkpoint")
    with pytest.raises(ConfigError, match=r"is of the model /runs/a/checkpoint, and not of checkpoint"):
        load_profile(path, large)
    assert load_profile(path, replace(find_model(None), name="checkpoint"))


def test_a_profile_of_the_same_name_may_have_a_copy_of_every_matrix_of_one_half_only(tmp_path: Path) -> None:
    shape, memory = replace(find_model(None), name="mine"), analytic_profile(find_model(None), H200).memory
    copied = structs.replace(memory, encoder_weights=Bytes(2 * memory.encoder_weights))
    assert load_profile(saved(tmp_path, None, model="./mine", memory=copied), shape)
    with pytest.raises(ConfigError, match=r"is of the model \./other, and not of mine"):
        load_profile(saved(tmp_path, None, model="./other", memory=copied), shape)
    larger = structs.replace(memory, encoder_weights=Bytes(3 * memory.encoder_weights))
    with pytest.raises(ConfigError, match=r"is of the model \./mine, and not of mine"):
        load_profile(saved(tmp_path, None, model="./mine", memory=larger), shape)
