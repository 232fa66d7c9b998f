"""What intra-request parallelism gives: TTFT of one request at a time on 2 encode instances, on 1, and on 2 without it.

    python benchmarks/encode_parallel.py

Every encode instance has one thread and a core of its own; the instance that prefills and decodes runs where it likes.
Requests: 8 pictures of equal size, each one unit; 1 picture of 24 tiles and a thumbnail, each tile one unit; and that
one with a tower of 16 layers instead of 8, because both encoders decode and resize the whole picture.
The checkpoints (random weights) are chosen so that encoding is nearly all the work.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, Decoder, Tower
from measuring import Engine, Round, add_common_options, alternate, disturbance, middle, verdict, write_result
from servers import pin_roles, triptych_server

SMALL = Decoder(hidden=256, layers=2, heads=4, kv_heads=2, ffn=512)
# name: checkpoint, pictures of a request, their size
CASES = {
    "8 pictures": (Checkpoint("whole", Tower(512, 12, 8, 1408), SMALL), 8, "448x448"),
    "1 tiled picture": (Checkpoint("tiled", Tower(512, 8, 8, 2048), SMALL, tile=224, max_tiles=24), 1, "1344x896"),
    "1 tiled, deeper": (Checkpoint("tiled", Tower(512, 16, 8, 2048), SMALL, tile=224, max_tiles=24), 1, "1344x896"),
}
# name: arguments of triptych serve
CONFIGURATIONS = {
    "1e1pd": ("--placement", "1e1pd"),
    "2e1pd": ("--placement", "2e1pd"),
    "2e1pd --no-irp": ("--placement", "2e1pd", "--no-irp"),
}
TARGET = 0.60


def main() -> None:
    options = _options()
    rows: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    for case in options.case:
        checkpoint, images, size = CASES[case]
        with tempfile.TemporaryDirectory() as folder, _servers(options, checkpoint.write(Path(folder))) as engines:
            rounds = alternate(
                engines,
                options.rounds,
                case,
                requests=options.requests,
                concurrency=1,
                images=images,
                image_sizes=(size,),
                text_words=16,
                output_tokens=1,
            )
        rows += _show(case, rounds)
        ttft_ms = {row["configuration"]: row["ttft_ms"] for row in rows if row["case"] == case}
        if {"1e1pd", "2e1pd"} <= ttft_ms.keys():
            name = f"{case}: TTFT on 2 encode instances / on 1"
            verdicts.append(verdict(name, ttft_ms["2e1pd"] / ttft_ms["1e1pd"], TARGET))
    checkpoints = {case: CASES[case][0].described() for case in options.case}
    write_result("encode-parallel", options, checkpoints=checkpoints, dtype=options.dtype, verdicts=verdicts, rows=rows)


@contextmanager
def _servers(options: argparse.Namespace, checkpoint: Path) -> Iterator[Sequence[Engine]]:
    """All configurations at once; those that are not asked idle."""
    with ExitStack() as stack:
        engines = []
        for name in options.configuration:
            arguments = [checkpoint, "--load-format", "dummy", "--dtype", options.dtype, "--threads", 1]
            server = triptych_server(*arguments, *CONFIGURATIONS[name], *options.serve.split())
            url, pid = stack.enter_context(server)
            pin_roles(url, {"e": options.cores})
            engines.append(Engine(name, url, [pid]))
        yield engines


def _show(case: str, rounds: dict[str, list[Round]]) -> list[dict[str, Any]]:
    rows = []
    for name, found in rounds.items():
        ttft_ms = middle(found, "ttft_ms", "p50")
        print(f"{case:16s} {name:16s} TTFT {ttft_ms:8.1f} ms  {disturbance(found)}", flush=True)
        rows.append({"case": case, "configuration": name, "ttft_ms": ttft_ms, "rounds": found})
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--configuration", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    parser.add_argument("--cores", nargs="+", type=int, default=[0, 1], help="of the encode instances, in turn")
    parser.add_argument("--dtype", default="float32")
    add_common_options(parser, rounds=5, requests=3)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests = 1, 1
    return options


main()
