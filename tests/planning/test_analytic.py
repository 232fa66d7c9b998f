"""Analytic profiles: rooflines that grow and shrink with the hardware."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from triptych.core import EncodeUnit, EncodeWork, Media, Role, UnitHash
from triptych.errors import ConfigError
from triptych.planning.costs.analytic import EFFICIENCY, analytic_profile
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.hardware import find_device, known_devices
from triptych.planning.costs.profile import Profile
from triptych.planning.model.shapes import PRESETS, preset, shape_of
from triptych.planning.quantities import FlopPerSecond

A100 = find_device("A100-80G")
AUDIO = {"model_type": "qwen2_audio"}


def costs(name: str, device: str = "A100-80G", **options: object) -> Costs:
    return analytic_profile(preset(name), find_device(device), **options).costs()  # type: ignore[arg-type]


@pytest.mark.parametrize("device", list(known_devices()))
@pytest.mark.parametrize("name", PRESETS)
def test_every_model_has_a_profile_on_every_device(name: str, device: str, tmp_path: Path) -> None:
    profile = analytic_profile(preset(name), find_device(device))
    assert profile.kind == "analytic"
    found = profile.costs()
    assert 0.001 < found.decode_step < 1
    assert 0 < found.prefill_token < 0.01
    assert found.encode_unit + found.encode_row > 0
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


def test_a_decode_step_reads_the_weights_and_a_full_prefill_step_computes() -> None:
    shape, efficiency = preset("internvl2-8b"), EFFICIENCY
    found = costs("internvl2-8b")
    read = 2 * (shape.language_parameters - shape.language.embedding) / (A100.memory_bandwidth * efficiency.decode)
    assert found.decode_step - efficiency.decode_launch == pytest.approx(read, rel=1e-6)
    compute = 2048 * shape.language.flops_per_token / (A100.flops * efficiency.prefill)
    step = found.prefill_step - efficiency.prefill_launch + 2048 * found.prefill_token
    assert step == pytest.approx(compute, rel=0.01)


def test_a_cell_of_the_paper_is_near_before_any_fit() -> None:
    """Table 4 of arXiv 2501.05460 leaves about 0.41 s for a picture of 4032x3024 on an E worker, its preparation on the
    host included, and about 0.055 s for its prefill; section 3.2.4 switches roles in less than 0.7 s."""
    found = costs("minicpm-v-2.6")
    encode = found.encode_step + 10 * (found.encode_unit + 64 * found.encode_row) + 4032 * 3024 * found.encode_pixel
    assert encode == pytest.approx(0.41, rel=0.15)
    assert found.prefill_step + 660 * found.prefill_token == pytest.approx(0.055, rel=0.2)
    assert found.switch_weights < 0.7


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
@pytest.mark.parametrize("size", [(56, 84), (640, 480), (1344, 1344), (4032, 3024), (5000, 5000)])
def test_pictures_that_are_taken_whole_cost_what_is_computed_for_them(name: str, size: tuple[int, int]) -> None:
    """Attention grows with the square of their rows, and the rest with these."""
    [unit] = preset(name).image_units(*size)
    exact = preset(name).encode_flops(unit) / (A100.flops * EFFICIENCY.encode)
    unit_of_step = EncodeUnit(UnitHash(b"unit"), "image", unit.rows, 0)
    found, work = costs(name), EncodeWork(unit_of_step, Media(b"item", "image", b""), [])
    assert found.encode_s([work], []) - found.encode_step == pytest.approx(exact, rel=0.02)


def test_tiles_cost_by_their_number() -> None:
    found = costs("internvl2-26b")
    assert found.encode_unit > 0
    assert found.encode_row == found.encode_pair == 0


def test_more_devices_are_faster_but_not_by_their_number() -> None:
    one, four = costs("internvl2-26b"), costs("internvl2-26b", tensor_parallel=4)
    for name in ("encode_unit", "prefill_token", "decode_step"):
        assert 1 < getattr(one, name) / getattr(four, name) < 4, name
    profile = analytic_profile(preset("internvl2-26b"), A100, tensor_parallel=4)
    assert profile.price == pytest.approx(4 * 1.79)
    assert profile.memory.device == pytest.approx(4 * A100.memory)
    slow_link = replace(A100, link=type(A100.link)(1e9))
    slow = analytic_profile(preset("internvl2-26b"), slow_link, tensor_parallel=4).costs()
    assert slow.prefill_token > 2 * four.prefill_token


def test_degree_that_divides_no_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel: 5 does not divide the 32 heads of internvl2-8b"):
        analytic_profile(preset("internvl2-8b"), A100, tensor_parallel=5)


def test_degree_that_no_engine_can_spread_heads_of_kv_over_is_refused() -> None:
    shape = preset("qwen2.5-vl-7b")
    assert (shape.language.heads, shape.language.kv_heads) == (28, 4)
    for degree in (7, 14):
        told = f"--tensor-parallel: {degree} neither divides the 4 heads of KV of qwen2.5-vl-7b nor is a multiple"
        with pytest.raises(ConfigError, match=told):
            analytic_profile(shape, A100, tensor_parallel=degree)


def test_devices_beyond_the_heads_of_kv_hold_copies_of_them() -> None:
    four, all_heads = (analytic_profile(preset("qwen2.5-vl-7b"), A100, tensor_parallel=n) for n in (4, 28))
    assert four.memory.kv_token == preset("qwen2.5-vl-7b").kv_token_bytes
    assert all_heads.memory.kv_token == 7 * four.memory.kv_token
    assert all_heads.costs().decode_context == pytest.approx(four.costs().decode_context)  # of each device: one head


def test_experts_are_read_when_there_are_tokens_for_them() -> None:
    shape = shape_of({"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 128, "num_experts_per_tok": 8}})
    found = analytic_profile(shape, A100).costs()
    active = 2 * shape.language.active / (A100.memory_bandwidth * 0.7)
    everything = 2 * shape.language.parameters / (A100.memory_bandwidth * 0.7)
    assert active < found.decode_step < 0.5 * everything
    assert found.decode_step + 64 * found.decode_sequence > 0.9 * everything


def test_models_that_only_hear_have_profiles() -> None:
    shape = shape_of(AUDIO)
    found = analytic_profile(shape, A100).costs()
    assert found.encode_unit + 750 * found.encode_row > 0


def test_memory_of_a_profile_gives_pools() -> None:
    profile = analytic_profile(preset("internvl2-8b"), A100)
    sizes = {role: profile.sizes(Role(role), max_num_seqs=1000) for role in ("e", "p", "d", "epd")}
    assert sizes["e"].num_kv_blocks == 0
    assert sizes["d"].num_kv_blocks > sizes["epd"].num_kv_blocks > 10_000


def test_a_device_on_which_nothing_ends_is_refused() -> None:
    slow = replace(A100, flops=FlopPerSecond(1e-300))
    with pytest.raises(ConfigError, match=r"--gpu: internvl2-8b on A100-80G: .* s is out of range"):
        analytic_profile(preset("internvl2-8b"), slow)
