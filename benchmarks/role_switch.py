"""How long role switches take, and what they cost the requests of others.

    python benchmarks/role_switch.py

The built-in model. Idle: one of two instances (the other one is `epd`, so that every stage stays served) goes through
all 42 pairs of roles. Under load: `2e2p2d` answers a closed loop of text and pictures while an instance changes its
role and back, again and again; told are failures, and the time per token of all requests that ran during a switch
against the same number of requests before.
"""

import argparse
import itertools
import threading
import time
from statistics import median
from typing import Any

import httpx
from measuring import add_result_options, fresh_seed, verdict, write_result
from servers import instances, triptych_server, wait_until_idle

from triptych.bench import BenchOptions, measure
from triptych.bench.options import Kind
from triptych.bench.report import Record
from triptych.core import Role

KINDS = (
    Kind(name="text", prompt_tokens=64, output_tokens=48),
    Kind(name="picture", images=1, prompt_tokens=32, output_tokens=48),
)
# Each pair of switches leaves every stage served.
UNDER_LOAD = (("p", "d"), ("d", "p"), ("e", "p"), ("d", "e"))
PAUSE_S = 0.1  # between two pairs of switches


def main() -> None:
    options = _options()
    with triptych_server("--placement", "2epd", "--threads", 1) as (url, pid):
        wait_until_idle([pid, *(i["pid"] for i in instances(url))])
        idle = [switch(url, "i1", role) for _ in range(options.rounds) for role in _every_pair()]
    with triptych_server("--placement", "2e2p2d", "--threads", 1) as (url, pid):
        wait_until_idle([pid, *(i["pid"] for i in instances(url))])
        before = _run(url, options.requests, "before")
        during, switches = _run_while_switching(url, options)
    between = [row["total_ms"] for row in idle if {row["before"], row["after"]} == {"p", "d"}]
    encoding = [row["total_ms"] for row in idle if ("e" in row["before"]) != ("e" in row["after"])]
    ratio = _tpot_ms(during) / _tpot_ms(before)
    verdicts = [
        verdict("P<->D, slowest of all, ms", max(between), 50),
        verdict("any switch with E, slowest of all, s", max(encoding) / 1e3, 0.7),
        verdict("failed requests under load", sum(r.error is not None for r in during), 0),
        verdict("mean TPOT during switches / before", ratio, 1.25),
    ]
    print(f"    P<->D median {median(between):.1f} ms, switches that load or drop encoders {median(encoding):.1f} ms")
    print(f"    {len(switches)} switches under load, median {median(s['total_ms'] for s in switches):.0f} ms")
    write_result("role-switch", options, idle=idle, under_load=switches, verdicts=verdicts)


def switch(url: str, instance: str, role: str) -> dict[str, Any]:
    """Milliseconds of each step. `total_ms` is what the server says, without HTTP."""
    before = next(i["role"] for i in instances(url) if i["id"] == instance)
    answer = httpx.post(f"{url}/cluster/instances/{instance}/role", json={"role": role}, timeout=120)
    steps_s = answer.raise_for_status().json()["steps_s"]
    return {"before": before, "after": role, **{f"{name}_ms": 1e3 * s for name, s in steps_s.items()}}


def _every_pair() -> list[str]:
    """A walk from `epd` through all pairs of roles, each once, and back to `epd` (an Euler circuit, Hierholzer)."""
    left = {role: [other for other in Role if other is not role] for role in Role}
    stack, walk = [Role.EPD], list[Role]()
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    assert len(set(itertools.pairwise(walk))) == len(walk) - 1 == len(Role) * (len(Role) - 1)
    return [role.value for role in walk[-2::-1]]


def _run(url: str, requests: int, name: str) -> list[Record]:
    load = BenchOptions(
        url=url, requests=requests, concurrency=4, kinds=KINDS, ignore_eos=True, seed=fresh_seed(name), warmup=4
    )
    return measure(load).requests


def _run_while_switching(url: str, options: argparse.Namespace) -> tuple[list[Record], list[dict[str, Any]]]:
    """The records of the run, and the switches that were made meanwhile."""
    records: list[Record] = []
    client = threading.Thread(target=lambda: records.extend(_run(url, options.requests, "during")))
    client.start()
    switches: list[dict[str, Any]] = []
    for before, after in itertools.cycle(UNDER_LOAD):
        if not client.is_alive():
            break
        chosen = next(i["id"] for i in instances(url) if i["role"] == before)
        switches += [switch(url, chosen, role) for role in (after, before)]
        time.sleep(PAUSE_S)
    client.join()
    return records, switches


def _tpot_ms(records: list[Record]) -> float:
    values = [record.tpot_s for record in records if record.tpot_s is not None]
    return 1e3 * sum(values) / len(values)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of all 42 pairs")
    parser.add_argument("--requests", type=int, default=200, help="before, and as many during switches")
    add_result_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests = 1, 12
    return options


if __name__ == "__main__":
    main()
