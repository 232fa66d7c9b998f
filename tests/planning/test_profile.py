import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from triptych.config import SHARED_DECODE_INTERVAL_MS
from triptych.core import Placement, Role
from triptych.errors import ConfigError
from triptych.planning import files
from triptych.planning.costs.profile import Made, Memory, Profile, Residual, StageCosts
from triptych.planning.quantities import Bytes, BytesPerSecond, DollarsPerHour, Seconds


def make_profile(*, device: float = 80e9, cores: int | None = None, **costs: float) -> Profile:
    return Profile(
        model="small",
        hardware="a GPU",
        kind="measured",
        costs_of_steps=StageCosts(
            bytes_per_second=BytesPerSecond(3e9),
            switch_weights=Seconds(0.7),
            switch_books=Seconds(0.05),
            cores=cores,
            **{name: Seconds(value) for name, value in costs.items()},
        ),
        memory=Memory(
            device=Bytes(device),
            encoder_weights=Bytes(1e9),
            language_weights=Bytes(16e9),
            encode_activations=Bytes(2e9),
            language_activations=Bytes(1e9),
            runtime=Bytes(5e8),
            kv_token=Bytes(57344),
            embedding_row=Bytes(7168),
            context_len=4096,
        ),
        price=DollarsPerHour(1.29),
        residuals={"encode": Residual(samples=12, median=0.03, worst=0.11)},
        made=Made(date="2026-11-23", version="0.1", threads=1),
    )


def saved(path: Path) -> Any:
    return json.loads(path.read_text())


@given(
    costs=st.dictionaries(st.sampled_from(["encode_step", "prefill_pair", "server_token"]), st.floats(0, 1e3)),
    cores=st.none() | st.integers(1, 64),
)
@settings(deadline=None)
def test_a_profile_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, costs: dict[str, float], cores: int | None
) -> None:
    path, profile = tmp_path_factory.getbasetemp() / "profile.json", make_profile(cores=cores, **costs)
    profile.save(path)
    assert Profile.load(path) == profile


def test_a_file_gives_its_numbers_with_their_units(tmp_path: Path) -> None:
    make_profile(encode_step=0.0012).save(tmp_path / "profile.json")
    content = saved(tmp_path / "profile.json")
    assert content["costs"]["encode_step"] == "1.2 ms"
    assert content["memory"]["device"] == "80 GB"
    assert content["price"] == "1.29 USD/h"


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("costs", "encode_stepp"), "1 ms", "costs.encode_stepp"),
        (("costs", "encode_step"), 0.001, "costs.encode_step"),
        (("costs", "encode_step"), "-1 ms", "costs.encode_step"),
        (("costs", "encode_step"), "1 GB", "costs.encode_step"),
        (("costs", "encode_step"), math.nan, "costs.encode_step"),
        (("costs", "bytes_per_second"), "0 GB/s", "bytes_per_second"),
        (("costs", "cores"), 0, "costs.cores"),
        (("memory", "context_len"), 0, "memory.context_len"),
        (("kind",), "guessed", "kind"),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(tmp_path: Path, keys: tuple[str, ...], value: object, said: str) -> None:
    path = tmp_path / "profile.json"
    make_profile().save(path)
    content = saved(path)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)


def test_a_file_without_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    content = json.loads(files.dumped(make_profile()))
    del content["memory"]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="memory"):
        Profile.load(path)


def test_the_simulator_gets_every_cost() -> None:
    costs = make_profile(encode_step=0.001, message=0.0002).costs()
    assert (costs.encode_step, costs.message, costs.cores) == (0.001, 0.0002, math.inf)
    assert (costs.kv_token_bytes, costs.embedding_row_bytes, costs.bytes_per_second) == (57344, 7168, 3e9)
    assert make_profile(cores=2).costs().cores == 2


def test_a_role_has_the_weights_of_the_halves_that_it_uses() -> None:
    memory = make_profile().memory
    assert memory.used(Role.E) == 0.5e9 + 1e9 + 2e9
    assert memory.used(Role.D) == memory.used(Role.P) == 0.5e9 + 16e9 + 1e9
    assert memory.used(Role.EPD) == 0.5e9 + 1e9 + 16e9 + 2e9


def test_only_roles_with_a_language_model_have_kv_blocks() -> None:
    profile = make_profile()
    assert profile.sizes(Role.E).num_kv_blocks == 0
    assert profile.sizes(Role.D).num_embedding_blocks == 0
    sizes = profile.sizes(Role.PD, kv_bytes=2e9)
    assert sizes.num_kv_blocks == int(2e9 / (16 * 57344))
    assert sizes.num_embedding_blocks == (1 << 28) // (16 * 7168)


def test_kv_gets_what_weights_activations_and_embeddings_leave_of_nine_tenths() -> None:
    profile = make_profile(device=40e9)
    left = 0.9 * 40e9 - profile.memory.used(Role.P) - (1 << 28)
    assert profile.sizes(Role.P, max_num_seqs=1024).num_kv_blocks == int(left / (16 * 57344))


def test_larger_steps_leave_less_for_kv() -> None:
    """Activations are 2 GB of 1,024 rows, and 1 GB of 2,048 tokens."""

    def kv_bytes(**bounds: int) -> float:
        return make_profile(device=40e9).sizes(Role.EPD, max_num_seqs=1024, **bounds).num_kv_blocks * 16 * 57344

    block = 16 * 57344
    assert kv_bytes() - kv_bytes(max_encode_tokens=4096) == pytest.approx(6e9, abs=block)
    assert kv_bytes() - kv_bytes(max_num_batched_tokens=8192) == pytest.approx(2e9, abs=block)
    assert kv_bytes(max_encode_tokens=512) == kv_bytes()


def test_a_server_that_is_not_told_has_a_gibibyte_for_kv_on_a_cpu_and_what_is_left_of_a_device() -> None:
    on_cpu = make_profile()
    on_gpu = structs.replace(on_cpu, made=structs.replace(on_cpu.made, device="cuda:0"))
    one = Placement.parse("1epd")
    assert on_cpu.as_served(one)[Role.EPD].num_kv_blocks == (1 << 30) // (16 * 57344)
    assert on_gpu.as_served(one)[Role.EPD].num_kv_blocks == 64 * 257


def test_an_encoder_needs_room_for_its_embeddings() -> None:
    profile = make_profile()
    free = profile.memory.free(Role.E)
    assert profile.sizes(Role.E, embedding_bytes=0.9 * free).num_embedding_blocks
    with pytest.raises(ConfigError, match="cannot hold what e of small needs"):
        profile.sizes(Role.E, embedding_bytes=1.1 * free)


def test_no_more_blocks_than_a_full_batch_could_fill() -> None:
    assert make_profile().sizes(Role.P, max_num_seqs=2).num_kv_blocks == 2 * 257


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--profile: 10 GB of a GPU cannot hold what p of small needs: 17.5 GB"):
        make_profile(device=10e9).sizes(Role.P)
    with pytest.raises(
        ConfigError, match=r"p of small on a GPU: a request of 4096 tokens needs 236 MB .* 0 B are free"
    ):
        make_profile(device=17.6e9).sizes(Role.P)


def test_prices_may_be_missing() -> None:
    assert structs.replace(make_profile(), price=None).price is None


def test_answers_slow_down_where_instances_have_more_threads_than_there_are_cores() -> None:
    on_four = make_profile(cores=4)
    assert [on_four.decode_interval_ms(number) for number in (1, 4, 5)] == [0.0, 0.0, SHARED_DECODE_INTERVAL_MS]
    of_two = structs.replace(on_four, made=structs.replace(on_four.made, threads=2))
    assert [of_two.decode_interval_ms(number) for number in (2, 3)] == [0.0, SHARED_DECODE_INTERVAL_MS]
    assert of_two.as_served(Placement.parse("1e1p1d"))[Role.P].decode_interval_ms == SHARED_DECODE_INTERVAL_MS
    assert make_profile().decode_interval_ms(1000) == 0.0
