"""Requests to send: seeded, and no two with the same text or the same picture, so that no cache can help."""

import base64
import io
import random
from collections.abc import Iterator

import msgspec
import numpy as np
from PIL import Image

from triptych.bench.options import BenchOptions

_TEXT = (
    "apple river stone cloud window garden letter music winter silver bridge candle forest mirror engine harbour "
    "pepper ladder market pocket saddle timber velvet wagon anchor basket copper desert eagle feather glacier hammer "
    "island jungle kettle lantern meadow needle orchard parrot quarry ribbon shadow temple valley whistle yellow zebra"
)
WORDS = _TEXT.split()


class Workload:
    """Bodies number 0, 1, 2, ... of one run. Equal options give equal bodies."""

    def __init__(self, options: BenchOptions, model: str, num_words: int) -> None:
        self._options = options
        self._model = model
        self._num_words = num_words

    def bodies(self, first: int, count: int) -> Iterator[bytes]:
        for index in range(first, first + count):
            yield self.body(index)

    def body(self, index: int, *, output_tokens: int | None = None) -> bytes:
        options = self._options
        num_output_tokens = options.output_tokens if output_tokens is None else output_tokens
        fields: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._content(index)}],
            "max_tokens": num_output_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)

    def _content(self, index: int) -> object:
        text = text_of(self._options.seed, index, self._num_words)
        if not self._options.images:
            return text
        urls = (self._picture_url(index, place) for place in range(self._options.images))
        return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]

    def _picture_url(self, index: int, place: int) -> str:
        sizes = self._options.sizes
        width, height = sizes[(index * self._options.images + place) % len(sizes)]
        data = picture((self._options.seed, index, place), width, height, self._options.image_format)
        return f"data:image/{self._options.image_format};base64,{base64.b64encode(data).decode()}"


def text_of(seed: int, index: int, num_words: int) -> str:
    source = random.Random(f"{seed}-{index}")
    return " ".join(source.choices(WORDS, k=num_words))


def picture(seed: tuple[int, ...], width: int, height: int, kind: str) -> bytes:
    """Coloured noise, as smooth as a photograph, so that it compresses like one."""
    grid = (max(2, height // 28), max(2, width // 28), 3)
    colours = np.random.default_rng(seed).integers(0, 256, grid, dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, kind, quality=90)
    return out.getvalue()
