"""What streamed prefill gives: TTFT of requests with 8 pictures, one at a time, against the barrier mode.

    python benchmarks/streamed_prefill.py

Placement 1e1pd, one thread and one core for each instance. The checkpoint (random weights) is chosen so that the
encoder and the prefill of the 8 pictures take comparable time. Prefill is measured as the TTFT of text alone of as many
tokens; encoding (with its transfer) is what the barrier mode takes beyond that.
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

CHECKPOINT = Checkpoint(
    "whole", Tower(512, 12, 8, 1408), Decoder(hidden=1024, layers=12, heads=16, kv_heads=8, ffn=2816)
)
STREAMED, BARRIER = "streamed", "--no-streamed-prefill"
NUM_PICTURES, SIDE, TEXT_TOKENS = 8, 448, 16
TOKENS_OF_PICTURE = (SIDE // 28) ** 2 + 2  # with the tokens around it
TARGET = 0.80


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder, _servers(options, CHECKPOINT.write(Path(folder))) as engines:
        size = f"{SIDE}x{SIDE}"
        load = {"requests": options.requests, "concurrency": 1, "output_tokens": 1}
        pictures = alternate(
            engines,
            options.rounds,
            "pictures",
            images=NUM_PICTURES,
            image_sizes=(size,),
            text_words=TEXT_TOKENS,
            **load,
        )
        num_words = NUM_PICTURES * TOKENS_OF_PICTURE + TEXT_TOKENS
        text = alternate(engines, options.rounds, "text", text_words=num_words, **load)
    rows = _show("8 pictures", pictures) + _show("text alone", text)
    streamed, barrier = (middle(pictures[name], "ttft_ms", "p50") for name in (STREAMED, BARRIER))
    prefill = middle(text[BARRIER], "ttft_ms", "p50")
    encode = barrier - prefill
    print(f"    encode {encode:.1f} ms, prefill {prefill:.1f} ms: a ratio of {encode / prefill:.2f}")
    print(f"    the bound of perfect overlap: {(max(encode, prefill) + min(encode, prefill) / 8) / barrier:.3f}")
    verdicts = [verdict("TTFT streamed / barrier", streamed / barrier, TARGET)]
    write_result(
        "streamed-prefill",
        options,
        checkpoint=CHECKPOINT.described(),
        dtype=options.dtype,
        encode_ms=encode,
        prefill_ms=prefill,
        verdicts=verdicts,
        rows=rows,
    )


@contextmanager
def _servers(options: argparse.Namespace, checkpoint: Path) -> Iterator[Sequence[Engine]]:
    """Both modes at once; the one that is not asked idles."""
    with ExitStack() as stack:
        engines = []
        for name in options.mode:
            arguments = [checkpoint, "--load-format", "dummy", "--dtype", options.dtype, "--threads", 1]
            arguments += ["--placement", "1e1pd", *([name] if name != STREAMED else []), *options.serve.split()]
            url, pid = stack.enter_context(triptych_server(*arguments))
            pin_roles(url, {"e": [options.cores[0]], "pd": [options.cores[1]]})
            engines.append(Engine(name, url, [pid]))
        yield engines


def _show(case: str, rounds: dict[str, list[Round]]) -> list[dict[str, Any]]:
    rows = []
    for name, found in rounds.items():
        ttft_ms = middle(found, "ttft_ms", "p50")
        tokens = found[0]["requests"][0]["prompt_tokens"]
        print(f"{case:12s} {name:22s} {tokens} tokens  TTFT {ttft_ms:8.1f} ms  {disturbance(found)}", flush=True)
        rows.append({"case": case, "mode": name, "ttft_ms": ttft_ms, "rounds": found})
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", nargs=2, type=int, default=[0, 1], help="of the encode and of the other instance")
    parser.add_argument("--dtype", default="float32")
    add_common_options(parser, rounds=5, requests=3)
    options = parser.parse_args()
    options.mode = [STREAMED, BARRIER]
    if options.quick:
        options.rounds, options.requests = 1, 1
    return options


main()
