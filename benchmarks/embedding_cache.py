"""What the embedding cache gives: a picture seen before in a new question, against text alone of the same length.

    python benchmarks/embedding_cache.py

Three requests in turn, one at a time: new pictures, the same pictures with other text before and behind them (no prefix
of that prompt was ever seen), and text alone of as many tokens. The counters of encode units tell what was encoded.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import msgspec
from checkpoints import Checkpoint, Decoder, Tower
from measuring import FOREIGN_LIMIT, add_common_options, ask, fresh_seed, verdict, write_result
from servers import CoreWatch, counters, triptych_server

from triptych.bench.workload import picture_url, text_of

CHECKPOINT = Checkpoint(
    "whole", Tower(512, 12, 8, 1408), Decoder(hidden=768, layers=12, heads=12, kv_heads=4, ffn=3072)
)
FIRST, AGAIN, TEXT = "new pictures", "seen pictures, new question", "text alone"
TARGET = 1.20
COUNTER = "triptych:encode_units"
REPORT_S = 0.6  # instances report their counters every 0.25 s


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        path = CHECKPOINT.write(Path(folder))
        arguments = [path, "--load-format", "dummy", "--dtype", options.dtype, "--threads", options.threads]
        arguments += ["--placement", options.placement, *options.serve.split()]
        with triptych_server(*arguments) as (url, pid):
            rows = [_measure(options, url, pid, num_pictures) for num_pictures in options.pictures]
    verdicts = []
    for row in rows:
        name = f"{row['pictures']} seen picture(s): TTFT / text alone of the same length"
        verdicts.append(verdict(name, row["ttft_ms"][AGAIN] / row["ttft_ms"][TEXT], TARGET))
    encoded = sum(row["units"][AGAIN]["computed"] for row in rows)
    verdicts.append(verdict("units encoded for seen pictures", encoded, 0))
    write_result(
        "embedding-cache",
        options,
        checkpoint=CHECKPOINT.described(),
        dtype=options.dtype,
        placement=options.placement,
        verdicts=verdicts,
        rows=rows,
    )


def _measure(options: argparse.Namespace, url: str, pid: int, num_pictures: int) -> dict[str, Any]:
    samples: dict[str, list[dict[str, Any]]] = {FIRST: [], AGAIN: [], TEXT: []}
    units: dict[str, dict[str, float]] = {kind: {} for kind in samples}
    watch = CoreWatch([pid], [])
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    for number in range(options.rounds + 1):  # the first one warms up
        seed = fresh_seed(num_pictures, number)
        pictures = [picture_url((seed, 0, place), options.side, options.side) for place in range(num_pictures)]
        first, again = (_question(seed, index, pictures) for index in range(2))
        for kind, messages in ((FIRST, first), (AGAIN, again), (TEXT, _as_long(url, seed, again))):
            before = counters(url, COUNTER)
            body = {"model": model, "messages": messages, "max_tokens": 1, "ignore_eos": True}
            (record,) = ask(url, [body], kind)
            time.sleep(REPORT_S)
            if number:
                samples[kind].append(msgspec.to_builtins(record))
                for source, total in counters(url, COUNTER).items():
                    units[kind][source] = units[kind].get(source, 0.0) + total - before.get(source, 0.0)
    load = watch.stop()
    row = {
        "pictures": num_pictures,
        "ttft_ms": {kind: 1e3 * median(record["ttft_s"] for record in found) for kind, found in samples.items()},
        "units": units,
        "load": load,
        "samples": samples,
    }
    _show(row)
    return row


def _question(seed: int, index: int, pictures: list[str]) -> list[dict[str, Any]]:
    """Words before the pictures and behind them, none of which stood there before."""
    before, behind = text_of(seed, 2 * index, 24), text_of(seed, 2 * index + 1, 24)
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": behind}]}]


def _as_long(url: str, seed: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text alone of exactly as many tokens, found without running the model: nothing of it gets into a cache."""
    wanted = _num_tokens(url, messages)
    num_words = wanted
    for _ in range(8):
        content = text_of(seed, random.Random(seed).randrange(1 << 30), num_words)
        text = [{"role": "user", "content": content}]
        missing = wanted - _num_tokens(url, text)
        if missing == 0:
            return text
        num_words += missing
    raise RuntimeError(f"no text of {wanted} tokens found")


def _num_tokens(url: str, messages: list[dict[str, Any]]) -> int:
    answer = httpx.post(f"{url}/tokenize", json={"messages": messages, "add_generation_prompt": True})
    return int(answer.raise_for_status().json()["count"])


def _show(row: dict[str, Any]) -> None:
    foreign = row["load"]["foreign_cores"]
    quiet = "" if foreign <= FOREIGN_LIMIT else f"  NOT QUIET ({foreign:.2f} foreign cores)"
    for kind, ttft_ms in row["ttft_ms"].items():
        tokens = row["samples"][kind][0]["prompt_tokens"]
        units = "  ".join(f"{source} {count:g}" for source, count in row["units"][kind].items())
        name = f"{row['pictures']} picture(s)  {kind}"
        print(f"{name:43s} {tokens:5d} tokens  TTFT {ttft_ms:8.1f} ms  units: {units}{quiet}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--placement", default="1e1pd")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    add_common_options(parser, rounds=20, requests=1)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.pictures = 2, [1]
    return options


main()
