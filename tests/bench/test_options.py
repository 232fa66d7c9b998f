from typing import Any

import pytest

from triptych.bench import BenchOptions, Kind
from triptych.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"url": "localhost:8000"}, "--url"),
        ({"requests": 0}, "--requests"),
        ({"rate": 0.0}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"concurrency": 0}, "--concurrency"),
        ({"images": -1}, "--images"),
        ({"image_sizes": ("64",)}, "--image-size"),
        ({"image_sizes": ("0x64",)}, "--image-size"),
        ({"image_sizes": ()}, "--image-size"),
        ({"image_format": "bmp"}, "--image-format"),
        ({"output_tokens": 0}, "--output-tokens"),
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"slo_ttft_ms": -1.0}, "--slo-ttft-ms"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"kinds": (Kind(name="a"), Kind(name="a", images=1))}, "--kind"),
    ],
)
def test_a_bad_flag_is_named(fields: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        BenchOptions(**fields)


def test_sizes_are_width_and_height() -> None:
    assert BenchOptions(image_sizes=("64x48", "10x20")).sizes == [(64, 48), (10, 20)]


def test_a_kind_is_its_name_pictures_prompt_and_output_tokens() -> None:
    assert Kind.parse("some:4:32:16") == Kind(name="some", images=4, prompt_tokens=32, output_tokens=16)


@pytest.mark.parametrize(("text", "flag"), [("text", "--kind"), ("a:1:2", "--kind"), ("a:0:0:1", "--prompt-tokens")])
def test_a_kind_that_is_none_is_refused(text: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        Kind.parse(text)
