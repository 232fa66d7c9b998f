"""Costs and workloads that others can check: the paper's (arXiv 2501.05460), and the built-in model's."""

from triptych.planning.costs.cost_model import Costs
from triptych.planning.workloads.demand import Demand, Item, Phase, poisson

# One 4032x3024 picture for MiniCPM-V 2.6: 10 slices of 64 rows. The paper's code encodes a picture on one instance
# (only whole pictures of a request are spread), so it is one unit.
PICTURE_4K = Item((640,), pixels=4032 * 3024)

# MiniCPM-V 2.6 on A100-80G. Four figures come from elsewhere than the table they are used for; one is fitted to it:
#   encode_unit      0.68 s    README of the paper's code: 100 requests of one 4K picture take 68 s on one E
#   prefill_token    0.055 s per picture and its text (662 tokens): slope of TTFT over pictures in Table 4
#   arrival          0.40 s    what is left of TTFT in Table 4 for no picture
#   decode_step      0.025 s   TPOT at an almost empty decode batch, Table 5
#   decode_sequence  0.0032 s  fitted: mean latency of the static placement in Table 6 (61.1 s)
#   switch_weights   0.7 s     "typically < 0.7 s", section 3.2.4; between P and D "significantly shorter"
# KV: 28 layers x 4 heads x 128 x 2 x 2 bytes a token; embeddings: 3584 x 2 bytes a row; links: NVLink, far from full.
PAPER_COSTS = Costs(
    encode_unit=0.68,
    prefill_token=0.055 / 662,
    arrival=0.40,
    decode_step=0.025,
    decode_sequence=0.0032,
    transfer=0.001,
    bytes_per_second=100e9,
    kv_token_bytes=57_344,
    embedding_row_bytes=7_168,
    switch_weights=0.7,
    switch_books=0.1,
)

# The built-in model with one thread per instance, timed runner by runner on two shared cores of an AMD EPYC on
# 22 Nov 2026 (medians): a 1344x1344 JPEG takes 35 ms to 16 rows; a prompt of 32, 64, 128 tokens 2.0, 2.8, 4.4 ms; a
# decode step of 1, 8, 32 sequences 1.0, 1.8, 5.1 ms. Switches: what this project asks of itself (0.7 s, 0.05 s).
BUILT_IN_COSTS = Costs(
    encode_unit=0.035,
    prefill_step=0.0012,
    prefill_token=0.000025,
    arrival=0.002,
    decode_step=0.0009,
    decode_sequence=0.00013,
    transfer=0.0002,
    bytes_per_second=3e9,
    kv_token_bytes=6_144,
    embedding_row_bytes=768,
    switch_weights=0.7,
    switch_books=0.05,
)
BUILT_IN_PICTURE = Item((16,), pixels=1344 * 1344)


def paper_shifting_load(seed: int) -> list[Demand]:
    """Table 6: 100 requests of one 4K picture, 3 a second; the first 10 ask for 50 tokens, the others for 500."""
    return poisson([Phase(10, 50, (PICTURE_4K,)), Phase(90, 500, (PICTURE_4K,))], rate=3.0, seed=seed)


def built_in_shifting_load(seed: int) -> list[Demand]:
    """The same for the built-in model, which encodes 19 times as fast: as much work per second for the encoders, for
    as many seconds, takes 19 times as many requests."""
    phases = [Phase(190, 50, (BUILT_IN_PICTURE,)), Phase(1710, 500, (BUILT_IN_PICTURE,))]
    return poisson(phases, rate=58.0, seed=seed)
