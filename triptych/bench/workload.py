"""Requests to send: seeded, and no two with the same text or the same picture, so that no cache can help."""

import base64
import io
import random
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
from PIL import Image

from triptych.bench.options import BenchOptions, Kind

_TEXT = (
    "apple river stone cloud window garden letter music winter silver bridge candle forest mirror engine harbour "
    "pepper ladder market pocket saddle timber velvet wagon anchor basket copper desert eagle feather glacier hammer "
    "island jungle kettle lantern meadow needle orchard parrot quarry ribbon shadow temple valley whistle yellow zebra"
)
WORDS = _TEXT.split()


class Workload:
    """Bodies number 0, 1, 2, ... of one run. Equal options give equal bodies.

    `num_words` is the length of the text of each kind.
    """

    def __init__(self, options: BenchOptions, model: str, num_words: Mapping[str, int]) -> None:
        self._options = options
        self._model = model
        self._num_words = num_words
        self._order = [options.mix[index % len(options.mix)] for index in range(options.requests)]
        random.Random(f"{options.seed}-order").shuffle(self._order)

    def kind(self, index: int) -> Kind:
        """Of request `index`: each as often as the others in a run, in an order that hangs on the seed."""
        return self._order[index] if index < len(self._order) else self._options.mix[index % len(self._options.mix)]

    def bodies(self, first: int, count: int) -> Iterator[bytes]:
        for index in range(first, first + count):
            yield self.body(index)

    def body(self, index: int, *, most_output_tokens: int | None = None) -> bytes:
        options, kind = self._options, self.kind(index)
        num_output_tokens = min(kind.output_tokens, most_output_tokens or kind.output_tokens)
        fields: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._content(index, kind)}],
            "max_tokens": num_output_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)

    def _content(self, index: int, kind: Kind) -> object:
        text = text_of(self._options.seed, index, self._num_words[kind.name])
        if not kind.images:
            return text
        urls = (self._picture_url(index, place, kind.images) for place in range(kind.images))
        return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]

    def _picture_url(self, index: int, place: int, num_images: int) -> str:
        sizes, kind = self._options.sizes, self._options.image_format
        width, height = sizes[(index * num_images + place) % len(sizes)]
        return picture_url((self._options.seed, index, place), width, height, kind)


def text_of(seed: int, index: int, num_words: int) -> str:
    source = random.Random(f"{seed}-{index}")
    return " ".join(source.choices(WORDS, k=num_words))


def picture_url(seed: tuple[int, ...], width: int, height: int, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture(seed, width, height, kind)).decode()}"


def picture(seed: tuple[int, ...], width: int, height: int, kind: str) -> bytes:
    """Coloured noise, as smooth as a photograph, so that it compresses like one."""
    grid = (max(2, height // 28), max(2, width // 28), 3)
    colours = np.random.default_rng(seed).integers(0, 256, grid, dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, kind, quality=90)
    return out.getvalue()
