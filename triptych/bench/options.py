"""What a run is asked to do, checked once."""

import math
import re
from urllib.parse import urlsplit

import msgspec

from triptych.config import require


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one kind in a mix. Every kind gets the same number of a run's requests.

    Raises ConfigError naming the flag.
    """

    name: str
    images: int = 0
    text_words: int = 32
    prompt_tokens: int | None = None
    output_tokens: int = 64

    @classmethod
    def parse(cls, text: str) -> "Kind":
        """`NAME:IMAGES:PROMPT_TOKENS:OUTPUT_TOKENS`, such as `text:0:128:64`."""
        found = re.fullmatch(r"([^:]+):(\d+):(\d+):(\d+)", text)
        require(found is not None, "--kind", f"{text!r} is not NAME:IMAGES:PROMPT_TOKENS:OUTPUT_TOKENS")
        assert found is not None
        images, prompt_tokens, output_tokens = map(int, found.groups()[1:])
        return cls(name=found[1], images=images, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    def __post_init__(self) -> None:
        for flag, value, low in (
            ("--images", self.images, 0),
            ("--text-words", self.text_words, 1),
            ("--prompt-tokens", self.prompt_tokens, 1),
            ("--output-tokens", self.output_tokens, 1),
        ):
            require(value is None or value >= low, flag, f"{value} is below {low}")


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Flags of `triptych bench`. Open loop if `rate` is set, else closed loop with `concurrency` clients.

    Raises ConfigError naming the flag.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None  # None: the first that the server lists
    api_key: str | None = None
    requests: int = 64
    rate: float | None = None  # requests per second, Poisson arrivals; inf: all at once
    concurrency: int = 8
    images: int = 0  # per request, no two alike
    image_sizes: tuple[str, ...] = ("448x448",)  # WxH, taken in turn by the pictures of a run
    image_format: str = "jpeg"
    text_words: int = 32
    prompt_tokens: int | None = None  # of the text; finds the number of words by asking the server
    output_tokens: int = 64
    kinds: tuple[Kind, ...] = ()  # a mix in random order, instead of pictures, text and output tokens of all requests
    ignore_eos: bool = False  # ask for exactly `output_tokens`; an extra of vLLM's that other servers may refuse
    temperature: float = 0.0
    seed: int = 0
    warmup: int = 1  # requests before the clock starts
    timeout_s: float = 600.0
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    json_path: str | None = None
    server_pid: int | None = None  # on this machine: reports its CPU time, and how much others disturbed the run

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        require(parts.scheme in ("http", "https") and bool(parts.hostname), "--url", f"{self.url!r} is no http(s) URL")
        for flag, value, low in (
            ("--requests", self.requests, 1),
            ("--concurrency", self.concurrency, 1),
            ("--warmup", self.warmup, 0),
            ("--seed", self.seed, 0),
        ):
            require(value >= low, flag, f"{value} is below {low}")
        names = [kind.name for kind in self.mix]
        require(len(set(names)) == len(names), "--kind", f"a name stands twice in {', '.join(names)}")
        for flag, number in (
            ("--rate", self.rate),
            ("--slo-ttft-ms", self.slo_ttft_ms),
            ("--slo-tpot-ms", self.slo_tpot_ms),
            ("--timeout-s", self.timeout_s),
        ):
            require(number is None or number > 0, flag, f"{number} is not above 0")
        require(self.temperature >= 0 and math.isfinite(self.temperature), "--temperature", "is not a number from 0")
        require(self.image_format in ("jpeg", "png"), "--image-format", f"{self.image_format!r} is not jpeg or png")
        require(bool(self.image_sizes), "--image-size", "none given")
        for size in self.image_sizes:
            valid = re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size)
            require(valid is not None, "--image-size", f"{size!r} is not WIDTHxHEIGHT")

    @property
    def mix(self) -> tuple[Kind, ...]:
        """The kinds, or the only one that there is."""
        return self.kinds or (
            Kind(
                name="all",
                images=self.images,
                text_words=self.text_words,
                prompt_tokens=self.prompt_tokens,
                output_tokens=self.output_tokens,
            ),
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(int(width), int(height)) for width, height in (size.split("x") for size in self.image_sizes)]
