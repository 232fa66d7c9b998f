"""How long a plan for eight GPUs takes: the README's, on as many processes as there are cores.

    python benchmarks/plan_time.py

Told are wall time, CPU time of all processes together, and the best three of what the plan says.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from measuring import add_result_options, verdict, write_result

PLAN = ("qwen2.5-vl-7b", "--gpus", "8", "--workload", "pictures", "--slo-ttft", "4 s", "--slo-tpot", "50 ms")
QUICK = ("--trials", "4", "--requests", "50", "--confirm", "0")
TARGET_S = 300.0


def main() -> None:
    options = _options()
    command = [sys.executable, "-m", "triptych.cli", "plan", *PLAN, *(QUICK if options.quick else ()), "--json"]
    began_s = time.perf_counter()
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    wall_s = time.perf_counter() - began_s
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = spent.ru_utime + spent.ru_stime
    answer = json.loads(found.stdout)
    best = [{name: row[name] for name in ("placement", "kept_rate", "settings")} for row in answer["best"][:3]]
    for row in best:
        print(f"{row['placement']} keeps the SLO at {row['kept_rate']:.2f} req/s")
    print(f"{wall_s:.0f} s, {cpu_s:.0f} s of CPU")
    verdicts = [verdict("seconds of a plan for eight GPUs", wall_s, TARGET_S)]
    write_result("plan-time", options, plan=PLAN, wall_s=wall_s, cpu_s=cpu_s, best=best, verdicts=verdicts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_result_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
