"""A load generator for any OpenAI-compatible server. Knows nothing of the server that it measures."""

from triptych.bench.options import BenchOptions
from triptych.bench.run import run

__all__ = ["BenchOptions", "run"]
