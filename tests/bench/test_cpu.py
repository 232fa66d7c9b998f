import os
import subprocess
import sys

from triptych.bench.cpu import CpuMeter, machine_cpu_s, tree_cpu_s

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


def test_a_tree_includes_its_children() -> None:
    meter = CpuMeter(os.getpid())
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        client, server, others = meter.read()
        assert server is not None
        assert server >= 0.25
        assert client < server
        assert others is not None
        child.communicate(b"\n")


def test_what_is_not_there_is_not_known() -> None:
    assert tree_cpu_s(1 << 30) is None
    assert machine_cpu_s() is not None
