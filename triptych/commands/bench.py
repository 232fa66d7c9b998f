"""`triptych bench`: load on any OpenAI-compatible server, and what came of it."""

from typing import Annotated

import typer


def bench(
    url: Annotated[str, typer.Option(help="Base URL of any OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model name; the first that the server lists if left out.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
    requests: Annotated[int, typer.Option(help="How many requests are measured.")] = 64,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, Poisson arrivals; inf sends all at once.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Clients of a closed loop, used without --rate.")] = 8,
    images: Annotated[int, typer.Option(help="Pictures per request, no two alike.")] = 0,
    image_size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT, may be given several times; 448x448 if left out.")
    ] = None,
    image_format: Annotated[str, typer.Option(help="jpeg or png.")] = "jpeg",
    text_words: Annotated[int, typer.Option(help="Words of text per request.")] = 32,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of text per request, instead of words.")] = None,
    output_tokens: Annotated[int, typer.Option(help="max_tokens of every request.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for exactly that many tokens (an extra of vLLM's).")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of texts, pictures and arrivals.")] = 0,
    warmup: Annotated[int, typer.Option(help="Requests before the clock starts.")] = 1,
    timeout_s: Annotated[float, typer.Option(help="For one request.")] = 600.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Limit of the time to first token.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Limit of the time per output token.")] = None,
    server_pid: Annotated[
        int | None,
        typer.Option(help="Process of a server on this machine: its CPU time and everybody else's are told."),
    ] = None,
    json_path: Annotated[str | None, typer.Option("--json", help="File for raw records and figures.")] = None,
) -> None:
    """Load an OpenAI-compatible server and print TTFT, TPOT, ITL, throughput, SLO attainment and goodput."""
    from triptych.bench.options import BenchOptions
    from triptych.bench.run import run

    options = BenchOptions(
        url=url,
        model=model,
        api_key=api_key,
        requests=requests,
        rate=rate,
        concurrency=concurrency,
        images=images,
        image_sizes=tuple(image_size or ("448x448",)),
        image_format=image_format,
        text_words=text_words,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        warmup=warmup,
        timeout_s=timeout_s,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        server_pid=server_pid,
        json_path=json_path,
    )
    raise typer.Exit(run(options))
