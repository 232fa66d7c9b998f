"""Triptych beside vLLM's CPU build on the same cores and the same checkpoint: requests with pictures, in four parts.

    python benchmarks/pictures_against_peer.py CHECKPOINT --peer-venv FOLDER --peer-preload LIBTCMALLOC

a  alone: one request at a time, 4 and 8 pictures
b  saturated: 8 pictures, a closed loop of 4
c  mixed: Poisson arrivals at 70% of what the peer does in a closed loop of the same mix; half the requests text alone
   (128 tokens in, 64 out), half 4 pictures (32 out)
d  like for like: 1e1pd against the peer's own split of encoder and language model, one core for each instance on both
   sides; 8 pictures, one request at a time and a closed loop of 4

Both servers run all the time, and each is idle while the other is measured (a row says how idle). In a round both get
the same requests at the same times; no two rounds have a picture or a text in common.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from measuring import (
    Engine,
    Round,
    add_common_options,
    alternate,
    disturbance,
    fresh_seed,
    middle,
    one_round,
    pooled,
    verdict,
    write_result,
)
from peers import vllm_server, vllm_split
from servers import pin_roles, triptych_server

from triptych.bench import Kind

TEXT = Kind(name="text", images=0, prompt_tokens=128, output_tokens=64)
PICTURES = Kind(name="pictures", images=4, prompt_tokens=32, output_tokens=32)
PICTURE_LOAD = {"prompt_tokens": 32, "output_tokens": 32}
SHARE_OF_SATURATION = 0.7

Rows = list[dict[str, Any]]


def main() -> None:
    options = _options()
    rows: Rows = []
    verdicts: Rows = []
    if set(options.parts) & set("abc"):
        with _whole(options) as engines:
            for part in sorted(set(options.parts) & set("abc")):
                _PARTS[part](options, engines, rows, verdicts)
                _write(options, rows, verdicts)
    if "d" in options.parts:
        with _split(options) as engines:
            _like_for_like(options, engines, rows, verdicts)
            _write(options, rows, verdicts)


def _alone(options: argparse.Namespace, engines: Sequence[Engine], rows: Rows, verdicts: Rows) -> None:
    for images in (4, 8):
        case = f"a alone, {images} pictures"
        load = {"requests": options.requests, "concurrency": 1, "images": images, **PICTURE_LOAD}
        ours, peer = _measure(options, engines, case, rows, load)
        verdicts.append(_ratio(f"{case}: TTFT p50", ours, peer, ("ttft_ms", "p50"), 0.95))


def _saturated(options: argparse.Namespace, engines: Sequence[Engine], rows: Rows, verdicts: Rows) -> None:
    case = "b saturated, 8 pictures"
    load = {"requests": options.saturated_requests, "concurrency": 4, "images": 8, **PICTURE_LOAD}
    ours, peer = _measure(options, engines, case, rows, load)
    verdicts.append(_ratio(f"{case}: throughput", ours, peer, ("requests_per_s",), 1.1, at_most=False))
    verdicts.append(_ratio(f"{case}: TPOT p50", ours, peer, ("tpot_ms", "p50"), 0.5))


def _mixed(options: argparse.Namespace, engines: Sequence[Engine], rows: Rows, verdicts: Rows) -> None:
    rate = options.rate or SHARE_OF_SATURATION * _saturation(options, engines, rows)
    case = f"c mixed, {rate:.3f} requests/s"
    load = {"requests": options.mixed_requests, "rate": rate, "kinds": (TEXT, PICTURES)}
    ours, peer = _measure(options, engines, case, rows, load)
    verdicts.append(_ratio("c mixed: TTFT p90 of text", ours, peer, ("kinds", "text", "ttft_ms", "p90"), 0.3))
    verdicts.append(_ratio("c mixed: ITL p99 of all", ours, peer, ("itl_ms", "p99"), 0.5))
    verdicts.append(_ratio("c mixed: TTFT p50 of pictures", ours, peer, ("kinds", "pictures", "ttft_ms", "p50"), 1.1))
    for name, figure, percent, kind in (
        ("TTFT p90 of text", "ttft_s", 90, "text"),
        ("ITL p99 of all", "itl_s", 99, None),
        ("TTFT p50 of pictures", "ttft_s", 50, "pictures"),
    ):
        values = [pooled(rounds, figure, percent, kind) for rounds in (ours, peer)]
        ratio = values[0] / values[1]
        print(f"    all rounds as one: {name:22s} {values[0]:9.1f} ms / {values[1]:9.1f} ms = {ratio:.3f}")
        verdicts.append({"figure": f"c mixed, all rounds as one: {name}", "values_ms": values, "value": ratio})


def _saturation(options: argparse.Namespace, engines: Sequence[Engine], rows: Rows) -> float:
    """Requests per second of the peer in a closed loop of the mix."""
    peer, case = engines[1], "c saturation of the mix"
    found = one_round(
        peer,
        engines,
        seed=fresh_seed(case),
        requests=options.mixed_requests,
        concurrency=options.saturation_concurrency,
        kinds=(TEXT, PICTURES),
    )
    rows.append({"case": case, "engine": peer.name, "rounds": [found]})
    _show(case, peer.name, [found])
    return float(found["requests_per_s"])


def _like_for_like(options: argparse.Namespace, engines: Sequence[Engine], rows: Rows, verdicts: Rows) -> None:
    for concurrency, requests in ((1, options.requests), (4, options.saturated_requests)):
        case = f"d one core each, 8 pictures, loop of {concurrency}"
        load = {"requests": requests, "concurrency": concurrency, "images": 8, **PICTURE_LOAD}
        ours, peer = _measure(options, engines, case, rows, load)
        if concurrency == 1:
            verdicts.append(_ratio(f"{case}: TTFT p50", ours, peer, ("ttft_ms", "p50"), 0.95))
        else:
            verdicts.append(_ratio(f"{case}: throughput", ours, peer, ("requests_per_s",), 1.1, at_most=False))


_PARTS = {"a": _alone, "b": _saturated, "c": _mixed}


def _measure(
    options: argparse.Namespace, engines: Sequence[Engine], case: str, rows: Rows, load: dict[str, Any]
) -> tuple[list[Round], list[Round]]:
    """Rounds of ours and of the peer."""
    rounds = alternate(engines, options.rounds, case, **load)
    for name, found in rounds.items():
        rows.append({"case": case, "engine": name, "rounds": found})
        _show(case, name, found)
    ours, peer = rounds.values()
    return ours, peer


def _ratio(
    name: str, ours: list[Round], peer: list[Round], path: tuple[str, ...], target: float, *, at_most: bool = True
) -> dict[str, Any]:
    return verdict(name, middle(ours, *path) / middle(peer, *path), target, at_most=at_most)


def _show(case: str, name: str, rounds: list[Round]) -> None:
    print(f"{case:42s} {name:16s} {middle(rounds, 'requests_per_s'):6.3f} req/s  {disturbance(rounds)}", flush=True)
    kinds: dict[str, tuple[str, ...]] = {"": (), **{kind: ("kinds", kind) for kind in rounds[0]["kinds"]}}
    for kind, path in kinds.items():
        figures = "  ".join(
            f"{figure.removesuffix('_ms').upper()} {middle(rounds, *path, figure, 'p50'):8.1f} /"
            f" {middle(rounds, *path, figure, 'p90'):8.1f} / {middle(rounds, *path, figure, 'p99'):8.1f}"
            for figure in ("ttft_ms", "tpot_ms", "itl_ms")
        )
        print(f"    {kind:9s} p50 / p90 / p99 in ms: {figures}", flush=True)


@contextmanager
def _whole(options: argparse.Namespace) -> Iterator[Sequence[Engine]]:
    """Ours and one peer server, each free to use all cores."""
    with ExitStack() as stack:
        peer_url, peer_pid = stack.enter_context(
            vllm_server(options.peer_venv, options.checkpoint, options.dtype, options.cores, options.peer_preload)
        )
        threads = () if options.threads is None else ("--threads", options.threads)
        url, pid = stack.enter_context(_ours(options, options.placement, *threads))
        yield Engine(f"triptych {options.placement}", url, [pid]), Engine(options.peer_name, peer_url, [peer_pid])


@contextmanager
def _split(options: argparse.Namespace) -> Iterator[Sequence[Engine]]:
    """One core for the encoder and one for the language model, on both sides."""
    first, second = options.split_cores
    with ExitStack() as stack:
        peer_url, peer_pids = stack.enter_context(
            vllm_split(
                options.peer_venv, options.checkpoint, options.dtype, (str(first), str(second)), options.peer_preload
            )
        )
        url, pid = stack.enter_context(_ours(options, "1e1pd", "--threads", 1))
        pin_roles(url, {"e": [first], "pd": [second]})
        yield Engine("triptych 1e1pd", url, [pid]), Engine(f"{options.peer_name} E+PD", peer_url, peer_pids)


def _ours(options: argparse.Namespace, placement: str, *arguments: object) -> Any:
    common = [options.checkpoint, "--dtype", options.dtype, "--max-model-len", 8192, "--placement", placement]
    return triptych_server(*common, *arguments, *options.serve.split())


def _write(options: argparse.Namespace, rows: Rows, verdicts: Rows) -> None:
    checkpoint = Path(options.checkpoint).name
    write_result("pictures-against-vllm", options, checkpoint=checkpoint, verdicts=verdicts, rows=rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--parts", nargs="+", default=list("abcd"), choices=list("abcd"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--placement", default="2e1pd", help="ours in parts a, b and c")
    parser.add_argument("--threads", type=int, help="of each of our instances in parts a, b and c")
    parser.add_argument("--peer-venv", type=Path, required=True, help="Python environment with vLLM's CPU build")
    parser.add_argument("--peer-preload", type=Path, nargs="*", default=[], help="libraries; vLLM wants tcmalloc")
    parser.add_argument("--peer-name", default="vLLM")
    parser.add_argument("--cores", default="0-1", help="of the peer in parts a, b and c: one OpenMP thread on each")
    parser.add_argument("--split-cores", nargs=2, type=int, default=[0, 1], help="of the two instances in part d")
    parser.add_argument("--saturated-requests", type=int, default=16, help="of each engine and round in a loop of 4")
    parser.add_argument("--mixed-requests", type=int, default=64, help="of each engine and round")
    parser.add_argument("--saturation-concurrency", type=int, default=8)
    parser.add_argument("--rate", type=float, help="requests per second of part c, instead of measuring saturation")
    add_common_options(parser, rounds=4, requests=4)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests, options.saturated_requests, options.mixed_requests = 1, 1, 4, 6
    return options


main()
