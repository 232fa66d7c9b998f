"""A load generator for any OpenAI-compatible server. Knows nothing of the server that it measures."""

from triptych.bench.options import BenchOptions, Kind
from triptych.bench.run import Measurement, measure, run

__all__ = ["BenchOptions", "Kind", "Measurement", "measure", "run"]
