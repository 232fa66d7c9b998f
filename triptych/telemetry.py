"""Metrics under vLLM's names where they exist, and the set-up of logging. Knows no messages: it takes plain numbers."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from triptych.core import FinishReason

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


_LABELS = ("model_name", "instance", "role")
RETRY_REASONS = ("instance_lost", "transfer", "moved", "unavailable")
REFUSAL_REASONS = ("overload", "unavailable", "deadline", "poison", "shutting_down")
_UNIT_SOURCES = ("computed", "cached", "transferred", "prefix")
_INSTANCE_TOTALS = {  # counters of an instance that are metrics of their own, under better names
    "embedding_hits": ("triptych:embedding_cache_hits", "Embeddings that were there already when they were asked for"),
    "embeddings_evicted": ("triptych:embedding_cache_evictions", "Embeddings given up for others"),
}
_SUMMED_TOTALS = {  # of all instances together
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens that were looked for in a prefix cache"),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens that were found in a prefix cache"),
}


@dataclass(frozen=True)
class InstanceSample:
    """What one instance last said about itself: its queues, pools as (total, free, used, cached), running totals."""

    role: str
    queues: Mapping[str, int]
    pools: Mapping[str, tuple[int, int, int, int]]
    counters: Mapping[str, float]


@dataclass(frozen=True)
class QueueSample:
    """Requests of one kind that wait at the frontend."""

    num_waiting: int
    predicted_wait_s: float


class Telemetry:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._instances = _InstanceCollector(model_name)
        self._registry.register(self._instances)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, ("model_name",), registry=self._registry, buckets=buckets)
            return family.labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ("model_name",), registry=self._registry).labels(model_name)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _TTFT_BUCKETS)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a sequence", _ITL_BUCKETS)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", _E2E_BUCKETS)
        self._prompt_sizes = histogram("vllm:request_prompt_tokens", "Prompt tokens of a sequence", _TOKEN_BUCKETS)
        self._output_sizes = histogram("vllm:request_generation_tokens", "Tokens of an answer", _TOKEN_BUCKETS)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of sequences that began to answer")
        self._output_tokens = counter("vllm:generation_tokens", "Tokens sampled")
        self._failures = counter("triptych:request_failure", "Sequences that ended with an error")
        finished = Counter(
            "vllm:request_success",
            "Sequences that ended, by the reason",
            labelnames=("model_name", "finished_reason"),
            registry=self._registry,
        )
        retries = Counter(
            "triptych:request_retries",
            "Sequences that were taken up again, by the reason",
            labelnames=("model_name", "reason"),
            registry=self._registry,
        )
        refused = Counter(
            "triptych:requests_refused",
            "Requests that were refused or given up, by the reason",
            labelnames=("model_name", "reason"),
            registry=self._registry,
        )
        self._retries = {reason: retries.labels(model_name, reason) for reason in RETRY_REASONS}
        self._refused = {reason: refused.labels(model_name, reason) for reason in REFUSAL_REASONS}
        self._finished = {reason: finished.labels(model_name, reason.value) for reason in FinishReason}

    def first_token(self, after_s: float, num_prompt_tokens: int) -> None:
        self._ttft.observe(after_s)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._output_tokens.inc()

    def next_token(self, gap_s: float) -> None:
        self._itl.observe(gap_s)
        self._output_tokens.inc()

    def finished(self, reason: FinishReason, after_s: float, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._finished[reason].inc()
        self._e2e.observe(after_s)
        self._prompt_sizes.observe(num_prompt_tokens)
        self._output_sizes.observe(num_output_tokens)

    def aborted(self) -> None:
        """The client left before the answer was complete."""
        self._finished[FinishReason.ABORT].inc()

    def failed(self) -> None:
        self._failures.inc()

    def retried(self, reason: str) -> None:
        """One of `RETRY_REASONS`."""
        self._retries[reason].inc()

    def refused(self, reason: str) -> None:
        """One of `REFUSAL_REASONS`."""
        self._refused[reason].inc()

    def watch_queues(self, samples: Callable[[], Mapping[str, QueueSample]]) -> None:
        """`samples` is asked by every exposition what waits at the frontend, by kind."""
        self._instances.queues = samples

    def watch_media_held(self, num_bytes: Callable[[], int]) -> None:
        """`num_bytes` is asked by every exposition what all requests hold of their bodies and media."""
        self._instances.media_held = num_bytes

    def instances(self, samples: dict[str, InstanceSample]) -> None:
        """Replaces what is known about all instances; called before an exposition."""
        self._instances.samples = samples

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class _InstanceCollector(Collector):
    """Turns the newest samples into metrics at the time they are asked for."""

    def __init__(self, model_name: str) -> None:
        self.samples: dict[str, InstanceSample] = {}
        self.queues: Callable[[], Mapping[str, QueueSample]] = dict
        self.media_held: Callable[[], int] = int
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        at_frontend = self.queues()
        waiting = sum(queue.num_waiting for queue in at_frontend.values())
        running, used, total = 0, 0, 0
        for sample in self.samples.values():
            running += sample.queues.get("prefill_running", 0) + sample.queues.get("decode_running", 0)
            waiting += sample.queues.get("prefill_waiting", 0) + sample.queues.get("decode_waiting", 0)
            if "kv" in sample.pools:
                pool = sample.pools["kv"]
                total, used = total + pool[0], used + pool[2]
        yield self._gauge("vllm:num_requests_running", "Sequences in batches, all instances", running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences in all queues", waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Used share of all KV blocks (0 to 1)", used / max(total, 1))
        yield self._gauge(
            "triptych:media_held_bytes", "Bodies and media of all requests, and what is promised", self.media_held()
        )
        yield from self._at_frontend(at_frontend)
        yield from self._summed()
        yield from self._queues_and_pools()
        yield from self._totals()

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _at_frontend(self, samples: Mapping[str, QueueSample]) -> Iterator[Metric]:
        labels = ["model_name", "kind"]
        waiting = GaugeMetricFamily(
            "triptych:requests_waiting", "Sequences at the frontend, by modality", labels=labels
        )
        wait = GaugeMetricFamily("triptych:predicted_wait_seconds", "Of a request that came now", labels=labels)
        for kind, sample in samples.items():
            waiting.add_metric([self._model_name, kind], sample.num_waiting)
            wait.add_metric([self._model_name, kind], sample.predicted_wait_s)
        yield waiting
        yield wait

    def _summed(self) -> Iterator[Metric]:
        for counter, (name, text) in _SUMMED_TOTALS.items():
            family = CounterMetricFamily(name, text, labels=["model_name"])
            values = (sample.counters.get(counter, 0.0) for sample in self.samples.values())
            family.add_metric([self._model_name], sum(values))
            yield family

    def _queues_and_pools(self) -> Iterator[Metric]:
        queues = GaugeMetricFamily("triptych:queue_length", "Entries of a queue", labels=[*_LABELS, "queue"])
        blocks = GaugeMetricFamily(
            "triptych:pool_blocks", "Blocks of a pool by state", labels=[*_LABELS, "pool", "state"]
        )
        for values, sample in self._labelled():
            for queue, count in sample.queues.items():
                queues.add_metric([*values, queue], count)
            for pool, counts in sample.pools.items():
                for state, count in zip(("total", "free", "used", "cached"), counts, strict=True):
                    blocks.add_metric([*values, pool, state], count)
        yield queues
        yield blocks

    def _totals(self) -> Iterator[Metric]:
        """The counters of every instance: those of units as one family, the others under their own names."""
        units = CounterMetricFamily(
            "triptych:encode_units", "Encode units by where they came from", labels=[*_LABELS, "source"]
        )
        families: dict[str, CounterMetricFamily] = {}
        sources = {f"encode_units_{source}": source for source in _UNIT_SOURCES}
        for values, sample in self._labelled():
            for counter, value in sample.counters.items():
                if counter in sources:
                    units.add_metric([*values, sources[counter]], value)
                elif counter not in _SUMMED_TOTALS:
                    plain = counter.removesuffix("_total")
                    name, text = _INSTANCE_TOTALS.get(counter, (f"triptych:{plain}", f"Running total of {plain}"))
                    families.setdefault(name, CounterMetricFamily(name, text, labels=_LABELS)).add_metric(values, value)
        yield units
        yield from families.values()

    def _labelled(self) -> Iterator[tuple[list[str], InstanceSample]]:
        """Every instance with the values of `_LABELS`."""
        for instance, sample in self.samples.items():
            yield [self._model_name, instance, sample.role], sample


def set_up_logging(level: str = "INFO", process: str = "") -> None:
    """Logs of this process to stderr, one line each. Called once per process, by its entry point."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s {process or '-'} %(name)s: %(message)s",
        force=True,
    )
    for noisy in ("httpcore", "httpx", "urllib3", "filelock", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
