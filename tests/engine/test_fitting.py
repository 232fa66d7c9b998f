"""Fitting an instance for a role: what is loaded, what is kept, what is given back, and what a failure leaves."""

from itertools import permutations
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.builders import make_config
from tests.checkpoints import make_checkpoint
from triptych.config import InstanceConfig, MemoryConfig, ModelConfig
from triptych.core import Role, Stage
from triptych.engine import fitting
from triptych.engine.equipment import Equipment
from triptych.engine.fitting import Fitter
from triptych.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2_vl", tmp_path_factory.mktemp("checkpoint"))


def config_of(folder: Path, role: Role) -> InstanceConfig:
    model = ModelConfig(path=str(folder), name="tiny", max_model_len=256)
    memory = MemoryConfig(kv_cache_bytes=4 << 20, embedding_cache_bytes=1 << 20)
    return replace(make_config("i0", role), model=model, memory=memory)


def assert_serves(equipment: Equipment, role: Role) -> None:
    """Exactly what the role needs, and nothing else."""
    stages, runners, pools = equipment.stages, equipment.runners, equipment.pools
    assert (stages.encode is not None) == (Stage.ENCODE in role.stages) == (runners.encode is not None)
    assert (stages.prefill is not None) == (Stage.PREFILL in role.stages)
    assert (stages.decode is not None) == (Stage.DECODE in role.stages)
    assert (runners.language is not None) == role.has_language_model == (pools.kv is not None)
    assert (pools.embeddings is not None) == (Stage.ENCODE in role.stages or Stage.PREFILL in role.stages)
    regions = {"kv"} if role.has_language_model else set()
    regions |= {"embedding"} if pools.embeddings is not None else set()
    assert equipment.transfers.describe().regions.keys() == regions


def test_an_instance_can_go_from_any_role_to_any_other(folder: Path) -> None:
    fitter = Fitter(config_of(folder, Role.E))
    for old, new in permutations(Role, 2):
        fitter.fit(config_of(folder, old))
        assert_serves(fitter.fit(config_of(folder, new)), new)


def test_weights_that_are_there_are_kept_and_the_others_are_dropped(folder: Path) -> None:
    fitter = Fitter(config_of(folder, Role.P))
    fitter.fit(config_of(folder, Role.P))
    language = fitter._weights.language
    fitter.fit(config_of(folder, Role.EPD))
    assert fitter._weights.language is language
    fitter.fit(config_of(folder, Role.D))
    assert fitter._weights.language is language
    assert fitter._weights.encode is None
    fitter.fit(config_of(folder, Role.E))
    assert fitter._weights.language is None
    assert fitter._weights.encode is not None


def test_every_carving_has_an_epoch_of_its_own(folder: Path) -> None:
    fitter = Fitter(config_of(folder, Role.E))
    slabs = {id(fitter.fit(config_of(folder, role)).transfers) for role in (Role.E, Role.P, Role.D)}
    assert len(slabs) == 1
    assert fitter.near.epoch == "epoch-i0.3"


def test_a_role_that_does_not_fit_into_the_slab_gets_a_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "available_bytes", lambda: 0)  # as on CUDA: the slab is made for the role alone
    fitter = Fitter(config_of(folder, Role.E))
    before = fitter.fit(config_of(folder, Role.E)).transfers
    after = fitter.fit(config_of(folder, Role.P)).transfers
    assert after is not before
    assert after.describe().regions.keys() == {"kv", "embedding"}
    assert fitter.fit(config_of(folder, Role.D)).transfers is after


def test_a_role_that_cannot_be_served_is_refused_and_the_old_one_can_be_fitted_again(folder: Path) -> None:
    fitter = Fitter(config_of(folder, Role.E))
    fitter.fit(config_of(folder, Role.E))
    small = replace(config_of(folder, Role.P), memory=MemoryConfig(kv_cache_bytes=1000))
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        fitter.fit(small)
    assert_serves(fitter.fit(config_of(folder, Role.E)), Role.E)
