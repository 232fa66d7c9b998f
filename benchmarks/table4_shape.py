"""The shape of the paper's Table 4: TTFT over 2, 4, 6 and 8 pictures with and without intra-request parallelism.

    python benchmarks/table4_shape.py

The paper measured it on 8 GPUs with pictures of 4032 x 3024 pixels (10 slices, 640 tokens), 100 requests at 0.25 a
second. Here the costs of one picture are measured on this machine (encoding on one core, prefill per token, pulling the
embeddings into another process), with a checkpoint whose pictures become 10 tiles and 640 tokens as well and whose
encoder outweighs prefill about as much as the paper's. TTFT is then computed for the paper's numbers of instances with
the router's own assignment, for arrivals as in the paper, at a rate that keeps the encoders as busy as there.

The paper's own figures are explained by 0.40 s fixed, 0.41 s a picture on an encoder, 0.055 s a picture after it (and
6 encoders: it does not say how many there were); they are computed too, and so are the measured costs with a fixed part
of the same weight, because ours is next to nothing. The paper's units are pictures, and it prefills when all are there.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from checkpoints import Checkpoint, Decoder, Tower
from measuring import Engine, add_common_options, disturbance, fresh_seed, middle, one_round, write_result
from servers import pin_roles, triptych_server

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.transfer.holders import holding, reading
from triptych.config import EMBEDDING_BLOCK_TOKENS
from triptych.core import EncodeUnit, InstanceId, Role, UnitHash
from triptych.messages import Peer, SlabDescription
from triptych.routing import RoutingTable, assign_units

CHECKPOINT = Checkpoint(
    "tiled",
    Tower(512, 8, 8, 2048),
    Decoder(hidden=512, layers=4, heads=8, kv_heads=4, ffn=1408),
    tile=224,
    max_tiles=9,
)
TILES, TILE_TOKENS, SIZE = 10, 64, "672x672"
TOKENS = TILES * TILE_TOKENS  # of a picture
PICTURES = (2, 4, 6, 8)
PAPER_S = {2: (0.92, 1.46), 4: (1.02, 2.47), 6: (1.14, 3.37), 8: (1.74, 4.27)}  # with, without; ratios 1.6 2.4 2.9 2.5
PAPER_RATE, NUM_REQUESTS = 0.25, 100
PREFILL_INSTANCES = 2


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    fixed: float  # of a request, before anything is encoded
    encode: float  # of a picture on one encode instance
    transfer: float  # of a picture's embeddings
    prefill: float  # of a picture's tokens


PAPER_COSTS = Costs(fixed=0.40, encode=0.41, transfer=0.0, prefill=0.055)


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        measured, raw = _measure(options, CHECKPOINT.write(Path(folder)))
    scale = measured.encode / PAPER_COSTS.encode
    with_fixed = Costs(PAPER_COSTS.fixed * scale, measured.encode, measured.transfer, measured.prefill)
    print(
        f"one picture: encode {1e3 * measured.encode:.1f} ms, transfer {1e3 * measured.transfer:.2f} ms, prefill"
        f" {1e3 * measured.prefill:.1f} ms ({1e6 * measured.prefill / TOKENS:.1f} us a token); a request: fixed"
        f" {1e3 * measured.fixed:.1f} ms\nencode / prefill {measured.encode / measured.prefill:.1f}"
        f" (the paper's {PAPER_COSTS.encode / PAPER_COSTS.prefill:.1f})\n"
    )
    rows = []
    cases = itertools.product(
        (
            ("measured", measured),
            ("measured, with the paper's fixed part", with_fixed),
            ("the paper's costs", PAPER_COSTS),
        ),
        options.encoders,
        ((1, False), (1, True), (TILES, True)),
    )
    for (name, costs), num_encoders, (units_per_picture, streamed) in cases:
        rows.append(_row(name, costs, num_encoders, units_per_picture, streamed))
    paper = {n: round(without / with_irp, 2) for n, (with_irp, without) in PAPER_S.items()}
    print(f"{'the paper (1.6x, 2.4x, 2.9x, 2.5x)':92s}" + "".join(f"{ratio:7.2f}" for ratio in paper.values()))
    write_result(
        "table4-shape",
        options,
        checkpoint=CHECKPOINT.described(),
        dtype=options.dtype,
        costs_s={"measured": asdict(measured), "paper": asdict(PAPER_COSTS)},
        paper_ttft_s=PAPER_S,
        paper_ratios=paper,
        rows=rows,
        raw=raw,
    )


def _row(name: str, costs: Costs, num_encoders: int, units_per_picture: int, streamed: bool) -> dict[str, Any]:
    rate = PAPER_RATE * PAPER_COSTS.encode / costs.encode
    ttft_s: dict[int, dict[str, float]] = {}
    for pictures in PICTURES:
        with_irp, without = (
            _mean_ttft(costs, pictures, num_encoders, units_per_picture, streamed, spread, rate)
            for spread in (True, False)
        )
        ttft_s[pictures] = {"irp": with_irp, "no_irp": without, "ratio": without / with_irp}
    unit = "pictures" if units_per_picture == 1 else "tiles"
    label = f"{name}: {num_encoders} encoders, units are {unit}, {'streamed' if streamed else 'barrier'} prefill"
    print(f"{label:92s}" + "".join(f"{found['ratio']:7.2f}" for found in ttft_s.values()), flush=True)
    return {
        "costs": name,
        "encoders": num_encoders,
        "units": unit,
        "streamed": streamed,
        "rate": rate,
        "ttft_s": ttft_s,
    }


# ---- the computation


def _mean_ttft(
    costs: Costs, pictures: int, num_encoders: int, units_per_picture: int, streamed: bool, spread: bool, rate: float
) -> float:
    """Over requests that arrive as in the paper. Encoders and prefill instances serve first come, first served."""
    source, table = random.Random(0), _table(num_encoders)
    encoders = dict.fromkeys(table.peers, 0.0)  # when each is free
    prefills = [0.0] * PREFILL_INSTANCES
    ttft_s, arrival = [], 0.0
    for number in range(NUM_REQUESTS):
        begin = arrival + costs.fixed
        units = _units(number, pictures * units_per_picture)
        loads = {id: max(0.0, free - begin) for id, free in encoders.items()}
        cost_s = costs.encode * pictures / sum(unit.num_tokens for unit in units)
        assigned = assign_units(table, units, loads, cost_s, spread=spread)
        ready = []
        for unit in units:
            encoder = assigned[unit.hash]
            encoders[encoder] = max(encoders[encoder], begin) + unit.num_tokens * cost_s
            ready.append(encoders[encoder] + costs.transfer / units_per_picture)
        prefill = min(range(PREFILL_INSTANCES), key=prefills.__getitem__)
        end = max(prefills[prefill], begin)
        for at in ready if streamed else [max(ready)] * len(ready):
            end = max(end, at) + costs.prefill / units_per_picture
        prefills[prefill] = end
        ttft_s.append(end - arrival)
        arrival += source.expovariate(rate)
    return fmean(ttft_s)


def _units(request: int, count: int) -> list[EncodeUnit]:
    return [EncodeUnit(UnitHash(f"{request}/{index}".encode()), "image", TOKENS) for index in range(count)]


def _table(num_encoders: int) -> RoutingTable:
    slab = SlabDescription({}, "", "cpu", 0, {})
    peers = [Peer(InstanceId(f"e{index}"), Role.E, "", "", slab) for index in range(num_encoders)]
    return RoutingTable(1, {peer.id: peer for peer in peers})


# ---- the measurement


def _measure(options: argparse.Namespace, checkpoint: Path) -> tuple[Costs, dict[str, Any]]:
    """One encoder and one prefill instance on a core each, in barrier mode, one request at a time."""
    arguments = [checkpoint, "--load-format", "dummy", "--dtype", options.dtype, "--threads", 1]
    arguments += ["--placement", "1e1pd", "--no-streamed-prefill", *options.serve.split()]
    lengths = [n for n in (1, *PICTURES) if not options.quick or n <= 2]
    rounds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with triptych_server(*arguments) as (url, pid):
        pin_roles(url, {"e": [options.cores[0]], "pd": [options.cores[1]]})
        engine = Engine("triptych 1e1pd", url, [pid])
        for number, pictures in itertools.product(range(options.rounds), lengths):
            for kind, load in (
                ("text", {"text_words": TOKENS * pictures}),
                ("pictures", {"images": pictures, "image_sizes": (SIZE,), "text_words": 1}),
            ):
                seed = fresh_seed(kind, pictures, number)
                found = one_round(
                    engine, [engine], seed=seed, requests=options.requests, concurrency=1, output_tokens=1, **load
                )
                rounds.setdefault((kind, pictures), []).append(found)
    ttft_s = {key: middle(found, "ttft_ms", "p50") / 1e3 for key, found in rounds.items()}
    for (kind, pictures), of_case in rounds.items():
        name = f"{kind:9s}{pictures} x {TOKENS} tokens"
        print(f"{name:24s}  TTFT {1e3 * ttft_s[kind, pictures]:8.1f} ms  {disturbance(of_case)}", flush=True)
    fixed, prefill = _line([(n, ttft_s["text", n]) for n in lengths])
    _, beyond = _line([(n, ttft_s["pictures", n] - ttft_s["text", n]) for n in lengths])
    transfer = _transfer_s(CHECKPOINT.decoder.hidden * (4 if options.dtype == "float32" else 2))
    raw = {f"{kind} {pictures}": of_case for (kind, pictures), of_case in rounds.items()}
    return Costs(max(0.0, fixed), beyond - transfer, transfer, prefill), raw


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope, least squares."""
    xs, ys = [float(x) for x, _ in points], [y for _, y in points]
    mean_x, mean_y = fmean(xs), fmean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x in xs)
    return mean_y - slope * mean_x, slope


def _transfer_s(row_bytes: int) -> float:
    """Pulling the rows of one picture, tile by tile, out of the slab of another process."""
    blocks_per_tile = -(-TILE_TOKENS // EMBEDDING_BLOCK_TOKENS)
    sizes = {"embedding": (EMBEDDING_BLOCK_TOKENS * row_bytes, TILES * blocks_per_tile, "rows")}
    samples = []
    with holding("shm", sizes=sizes) as holder, reading("shm", holder, sizes=sizes) as reader:
        for _ in range(50):
            began = time.perf_counter()
            for tile in range(TILES):
                blocks = list(range(tile * blocks_per_tile, (tile + 1) * blocks_per_tile))
                reader.transfers.pull(tile, holder.ticket(blocks, "embedding"), blocks)
            reader.wait(TILES)
            samples.append(time.perf_counter() - began)
    return median(samples)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", type=int, default=[5, 6], help="of the paper's 8 instances")
    parser.add_argument("--cores", nargs=2, type=int, default=[0, 1], help="of the encode and of the other instance")
    parser.add_argument("--dtype", default="float32")
    add_common_options(parser, rounds=3, requests=3)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests = 1, 1
    return options


if __name__ == "__main__":  # the transfer's other process imports this file
    main()
