"""What instances of a candidate cost and hold by the profiles of a model, and why one does not fit."""

import msgspec
import pytest

from tests.planning.places import make_candidate
from triptych.config import GIB
from triptych.core import Role
from triptych.errors import ConfigError
from triptych.planning.costs.analytic import analytic_profile
from triptych.planning.costs.hardware import find_device
from triptych.planning.costs.sizes import Sizes
from triptych.planning.model.shapes import find_shape
from triptych.planning.quantities import Bytes
from triptych.planning.search.machines import ProfiledMachines, Reach, require_room
from triptych.planning.workloads.demand import Demand, Item

SHAPE, DEVICE = find_shape("qwen2.5-vl-7b"), find_device("A100-80G")
PROFILES = {degree: analytic_profile(SHAPE, DEVICE, tensor_parallel=degree) for degree in (1, 2)}
SMALL = Reach.of([Demand(0.0, (Item((100, 300)),), text_tokens=50, output_tokens=20)])


def test_the_reach_of_a_workload_is_its_largest_request_in_each_measure():
    demands = [Demand(0.0, (Item((100, 300)), Item((50,))), text_tokens=10, output_tokens=5), Demand(1.0, (), 900, 100)]
    assert Reach.of(demands) == Reach(prompt_tokens=900, sequence_tokens=1000, unit_blocks=19, media_blocks=7 + 19 + 4)


def test_each_stage_costs_what_it_does_at_its_degree():
    machines = ProfiledMachines(PROFILES, SMALL)
    costs = machines.costs(make_candidate("2e1p1d", degrees=(1, 2, 1)))
    one, two = PROFILES[1].costs(), PROFILES[2].costs()
    assert (costs.encode_row, costs.decode_step) == (one.encode_row, one.decode_step)
    assert (costs.prefill_token, costs.prefill_step) == (two.prefill_token, two.prefill_step)
    assert one.prefill_token != two.prefill_token


def test_prices_are_those_of_all_gpus():
    machines = ProfiledMachines(PROFILES, SMALL)
    price = PROFILES[1].price
    assert price is not None
    assert machines.dollars_per_hour(make_candidate("2e1p1d", degrees=(1, 2, 1))) == pytest.approx(5 * price)
    unknown = {1: msgspec.structs.replace(PROFILES[1], price=None)}
    assert ProfiledMachines(unknown, SMALL).dollars_per_hour(make_candidate("2epd")) is None


def test_every_role_has_pools_of_its_own():
    sizes = ProfiledMachines(PROFILES, SMALL).sizes(make_candidate("1e1p1d", max_num_seqs=7))
    assert (sizes[Role.E].num_kv_blocks, sizes[Role.D].num_embedding_blocks) == (0, 0)
    assert sizes[Role.D].num_kv_blocks > 0 < sizes[Role.P].num_embedding_blocks
    assert sizes[Role.D].max_num_seqs == 7


def test_embeddings_get_room_for_the_largest_request_four_times():
    row = PROFILES[1].memory.embedding_row
    assert ProfiledMachines(PROFILES, SMALL).embedding_bytes() == GIB / 4
    large = Reach.of([Demand(0.0, (Item((300_000,)),))])
    assert ProfiledMachines(PROFILES, large).embedding_bytes() == 4 * 300_000 * row


def test_a_model_that_is_larger_than_a_gpu_needs_two():
    half = msgspec.structs.replace(PROFILES[1].memory, device=Bytes(12e9))
    both = {1: msgspec.structs.replace(PROFILES[1], memory=half), 2: PROFILES[2]}
    machines = ProfiledMachines(both, SMALL)
    with pytest.raises(ConfigError, match=r"--gpu: 12 GB of A100-80G cannot hold what p of qwen2\.5-vl-7b needs"):
        machines.sizes(make_candidate("1e1p1d"))
    assert machines.sizes(make_candidate("1e1p1d", degrees=(1, 2, 2)))


def test_where_memory_is_short_the_context_is_what_the_workload_needs():
    memory = PROFILES[1].memory
    tight = msgspec.structs.replace(memory, device=Bytes(memory.used(Role.EPD) + 0.1 * memory.device + 1.5e9))
    machines = ProfiledMachines({1: msgspec.structs.replace(PROFILES[1], memory=tight)}, SMALL)
    candidate = make_candidate("1epd")
    assert machines.context_len(Role.EPD, candidate) == SMALL.sequence_tokens
    assert machines.sizes(candidate)[Role.EPD].num_kv_blocks > 0
    assert ProfiledMachines(PROFILES, SMALL).context_len(Role.EPD, candidate) == memory.context_len


def test_a_request_longer_than_the_context_is_told_with_the_workload():
    reach = Reach.of([Demand(0.0, text_tokens=1_000_000, output_tokens=1)])
    with pytest.raises(ConfigError, match=r"long\.json: a request has 1000001 tokens, the context of qwen2\.5-vl-7b"):
        ProfiledMachines(PROFILES, reach).require_context("long.json")


@pytest.mark.parametrize(
    ("role", "sizes", "said"),
    [
        (Role.D, Sizes(num_kv_blocks=29), "d: the largest request needs room for 470 in the KV cache, 464 fit"),
        (Role.P, Sizes(num_kv_blocks=28), "p: the largest request needs room for 450 in the KV cache"),
        (Role.P, Sizes(num_embedding_blocks=24), "p: the largest request needs room for 416 in the embedding cache"),
        (Role.EP, Sizes(num_embedding_blocks=49), "ep: the largest request needs room for 816 in the embedding cache"),
        (Role.E, Sizes(num_embedding_blocks=18), "e: the largest request needs room for 304 in the embedding cache"),
    ],
)
def test_a_pool_that_the_largest_request_does_not_fit_into_is_named(role: Role, sizes: Sizes, said: str):
    with pytest.raises(ConfigError, match=said):
        require_room(role, sizes, SMALL)
    require_room(role, Sizes(num_kv_blocks=30, num_embedding_blocks=52), SMALL)
