"""From single answers to the figures of a run: latencies, throughput, attainment, goodput."""

import itertools
from collections import Counter
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from triptych.bench.client import Answer
from triptych.bench.options import BenchOptions
from triptych.latency import Latencies, Objectives, percentile

ONE_PIECE_S = 2e-4  # a token: no model is that fast, so the texts of such an answer came together


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Times in seconds; `scheduled_s` and `sent_s` count from the start of the run.

    TTFT: sent to first text. TPOT: (last text - first text) / (completion tokens - 1). ITL: between texts.
    """

    index: int
    scheduled_s: float
    sent_s: float
    kind: str = "all"
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    itl_s: list[float] = []
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    status: int = 200
    failed_after_s: float | None = None  # sent to error

    @classmethod
    def of(cls, index: int, scheduled_s: float, started_at: float, answer: Answer, kind: str = "all") -> "Record":
        sent_s = answer.sent_at - started_at
        if answer.error is not None:
            return cls(
                index=index,
                scheduled_s=scheduled_s,
                sent_s=sent_s,
                kind=kind,
                error=answer.error,
                status=answer.status,
                failed_after_s=answer.ended_at - answer.sent_at,
            )
        times = answer.token_times
        # A server that sends no usage: one text, one token.
        num_tokens = answer.completion_tokens or len(times)
        return cls(
            index=index,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            kind=kind,
            ttft_s=times[0] - answer.sent_at,
            tpot_s=(times[-1] - times[0]) / (num_tokens - 1) if num_tokens > 1 else None,
            e2e_s=answer.ended_at - answer.sent_at,
            itl_s=[later - earlier for earlier, later in itertools.pairwise(times)],
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=num_tokens,
        )

    def meets(self, objectives: Objectives) -> bool:
        """Of a request that succeeded."""
        assert self.ttft_s is not None and self.e2e_s is not None, f"request {self.index} failed"
        return objectives.met(self.ttft_s, self.tpot_s, self.e2e_s)


class CpuSeconds(msgspec.Struct, frozen=True):
    """Of the time of the run: by the client, by the server, by everybody else on the machine. None: not known."""

    client: float
    server: float | None = None
    others: float | None = None


class Summary(Latencies, frozen=True, kw_only=True):
    """Figures of a whole run. Failed requests count as missing their objectives."""

    duration_s: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    images_per_s: float
    slo_attainment: float | None  # share of requests that met every objective given
    goodput_requests_per_s: float | None  # of those only
    send_lag_ms_p99: float  # how late the client was against its own schedule
    cpu_s: CpuSeconds
    errors: dict[str, int]
    num_in_one_piece: int  # answers whose texts came together
    kinds: dict[str, Latencies]  # of a mix, by their names

    @classmethod
    def of_run(
        cls, options: BenchOptions, records: Sequence[Record], duration_s: float, cpu_s: CpuSeconds
    ) -> "Summary":
        good = [record for record in records if record.error is None]
        objectives = Objectives(options.slo_ttft_ms, options.slo_tpot_ms)
        num_met = sum(record.meets(objectives) for record in good)
        lags = sorted(record.sent_s - record.scheduled_s for record in records)
        images = {kind.name: kind.images for kind in options.mix}
        return cls(
            **msgspec.structs.asdict(Latencies.of(records)),
            duration_s=duration_s,
            requests_per_s=len(good) / duration_s,
            prompt_tokens_per_s=sum(record.prompt_tokens or 0 for record in good) / duration_s,
            output_tokens_per_s=sum(record.completion_tokens or 0 for record in good) / duration_s,
            images_per_s=sum(images[record.kind] for record in good) / duration_s,
            slo_attainment=num_met / len(records) if objectives else None,
            goodput_requests_per_s=num_met / duration_s if objectives else None,
            send_lag_ms_p99=1e3 * percentile(lags, 99),
            cpu_s=cpu_s,
            errors=dict(Counter(record.error for record in records if record.error is not None).most_common(20)),
            num_in_one_piece=sum(record.tpot_s is not None and record.tpot_s < ONE_PIECE_S for record in good),
            kinds={
                kind.name: Latencies.of([record for record in records if record.kind == kind.name])
                for kind in options.kinds
            },
        )


def show(console: Console, summary: Summary) -> None:
    """The table of a run, and under it the rates and what failed."""
    table = Table(title=f"{summary.num_requests} requests in {summary.duration_s:.2f} s, {summary.num_failed} failed")
    for column in ("", "mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in {"": summary, **summary.kinds}.items():
        for unit in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            values = getattr(figures, unit)
            cells = ["-"] * 4 if values is None else [f"{value:.1f}" for value in msgspec.structs.astuple(values)]
            table.add_row(f"{name} {unit.removesuffix('_ms').upper()} (ms)".lstrip(), *cells)
    console.print(table)
    lines = [
        f"Throughput: {summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output tokens/s, "
        f"{summary.prompt_tokens_per_s:.1f} prompt tokens/s, {summary.images_per_s:.2f} images/s"
    ]
    if summary.slo_attainment is not None:
        lines.append(
            f"SLO attainment: {summary.slo_attainment:.1%}, goodput: {summary.goodput_requests_per_s:.2f} requests/s"
        )
    lines.append(f"Client: {summary.cpu_s.client:.2f} s of CPU, p99 of send lag {summary.send_lag_ms_p99:.1f} ms")
    if summary.cpu_s.server is not None and summary.cpu_s.others is not None:
        lines.append(
            f"Server: {summary.cpu_s.server:.2f} s of CPU; others on this machine: {summary.cpu_s.others:.2f} s"
        )
    if summary.num_in_one_piece:
        lines.append(
            f"{summary.num_in_one_piece} of {summary.num_requests - summary.num_failed} answers arrived in one piece: "
            "the server, or the machine between, held their texts back, and TPOT and ITL say nothing about them"
        )
    lines += [f"{count} x {error}" for error, count in summary.errors.items()]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
