"""The caches cannot lie: near-identical pictures share nothing, and whatever is evicted meanwhile, every answer is that
of plain transformers, which caches nothing between requests."""

import asyncio
import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.checkpoints import make_checkpoint
from tests.flows.questions import TIE, Question, text_of
from tests.flows.servers import MODEL, running, wait_until_idle
from tests.reference import Reference, reference
from triptych.core import EncodeUnit
from triptych.memory.prefix import prompt_hashes
from triptych.model.headers import ImageHeader
from triptych.model.images import read_header
from triptych.model.loading import load_config
from triptych.model.probe import embedding_layout, kv_layout
from triptych.model.processor import Processor

torch.set_num_threads(1)

BLOCK = 16
QUESTION: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "?" * 40}],
    }
]


def pixels(seed: int, size: int = 56) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def as_file(values: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


def near_copies(values: np.ndarray, count: int) -> list[bytes]:
    """Files of one picture that differ in one pixel, in one byte of metadata, or in how the same pixels are encoded."""
    files = [as_file(values, "PNG", compress_level=level) for level in (1, 9)]
    files += [as_file(values, kind) for kind in ("BMP", "TIFF", "WEBP")] + [as_file(values, "JPEG", quality=95)]
    rng = random.Random(0)
    for number in range(count - len(files)):
        if number % 2:
            note = PngInfo()
            note.add_text("note", f"{number:06}")
            files.append(as_file(values, "PNG", compress_level=0, pnginfo=note))
        else:
            changed = values.copy()
            changed[rng.randrange(56), rng.randrange(56), rng.randrange(3)] ^= 1 << rng.randrange(8)
            files.append(as_file(changed, "PNG", compress_level=0))
    return files


def hashes_of(processor: Processor, file: bytes) -> tuple[list[EncodeUnit], tuple[bytes, ...]]:
    """Units of a picture, and the blocks of a question about it."""
    header = read_header(file)
    item = ("image", ImageHeader(*header[1:]))
    prompt = processor.expand(processor.render(QUESTION), [item])
    media = processor.media([item], [(file, hashlib.blake2b(file, digest_size=16).digest())])
    units = [unit for unit, _ in processor.encode_units(prompt, media)]
    return units, prompt_hashes(processor.identity, prompt.token_ids, units, prompt.spans, BLOCK).blocks


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_thousands_of_near_identical_pictures_share_no_unit_and_no_block(tmp_path: Path, family: str) -> None:
    processor = Processor.load(make_checkpoint(family, tmp_path))
    files = near_copies(pixels(0), 4000)
    by_bytes = {file: hashes_of(processor, file) for file in files}
    assert len(by_bytes) > 3900, "some pixels were drawn twice"
    units = [unit.hash for units, _ in by_bytes.values() for unit in units]
    assert len(set(units)) == len(units) >= len(by_bytes)
    first_units, first_blocks = by_bytes[files[0]]
    prompt = processor.expand(processor.render(QUESTION), [("image", ImageHeader(56, 56))])
    num_before = prompt.spans[0].start // BLOCK  # the text in front of the picture is the same for all
    behind = [hash_ for _, blocks in by_bytes.values() for hash_ in blocks[num_before:]]
    assert len(set(behind)) == len(behind) > 2 * len(by_bytes)
    assert {blocks[:num_before] for _, blocks in by_bytes.values()} == {first_blocks[:num_before]}
    assert hashes_of(processor, bytes(bytearray(files[0]))) == (first_units, first_blocks), "equal bytes, equal hashes"


@pytest.mark.parametrize("change", ["arguments", "revision"])
def test_the_same_picture_under_other_processor_arguments_or_another_revision_shares_no_unit(
    tmp_path: Path, change: str
) -> None:
    folder, file = make_checkpoint("qwen2_5_vl", tmp_path), as_file(pixels(0))
    units, blocks = hashes_of(Processor.load(folder), file)
    assert hashes_of(Processor.load(folder), file) == (units, blocks)
    if change == "arguments":
        config = folder / "preprocessor_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"image_mean": [0.4, 0.5, 0.5]}))
    other_units, other_blocks = hashes_of(Processor.load(folder, revision="b" * (change == "revision")), file)
    assert not {unit.hash for unit in units} & {unit.hash for unit in other_units}
    assert blocks[-1] != other_blocks[-1]


# ---- answers


SYSTEMS = [None, "You are a helpful assistant who looks at pictures and answers in a few words.", "Be brief."]
TEXTS = ["what is it", "how many of them are there in this picture, please", "and the other one?", "why"]


class Asked:
    """Conversations over a few pictures, some of which go on behind others, and what transformers answers to them."""

    def __init__(self, folder: Path, seed: int, count: int) -> None:
        self.folder = folder
        self._rng = rng = random.Random(seed)
        base = [pixels(seed * 100 + i, 72) for i in range(8)]
        for values in list(base[:4]):
            changed = values.copy()
            changed[36, 36] = 255 - changed[36, 36]
            base.append(changed)
        self.pictures = [as_file(values) for values in base]
        self.questions: list[Question] = []
        self.expected: list[Reference] = []
        for picture in self.pictures:
            self._add([*self._system(1), self._user([picture], TEXTS[0])], 9)
        while len(self.questions) < count:
            self._add(self._continued() if rng.random() < 0.4 else self._new())

    def _add(self, messages: list[dict[str, Any]], max_tokens: int | None = None) -> None:
        question = Question(messages, max_tokens or self._rng.choice([1, 4, 9]))
        answer = reference(self.folder, messages, question.max_tokens)
        if len(answer.prompt_ids) <= 230:
            self.questions.append(question)
            self.expected.append(answer)

    def _new(self) -> list[dict[str, Any]]:
        pictures = self._rng.choices(self.pictures, k=self._rng.choice([0, 1, 1, 2]))
        return [*self._system(self._rng.randrange(3)), self._user(pictures, self._rng.choice(TEXTS))]

    def _continued(self) -> list[dict[str, Any]]:
        index = self._rng.randrange(len(self.questions))
        said = text_of(self.folder, self.expected[index].token_ids)
        pictures = self._rng.choices(self.pictures, k=self._rng.choice([0, 0, 1]))
        answered = {"role": "assistant", "content": said.strip() or "yes"}
        return [*self.questions[index].messages, answered, self._user(pictures, self._rng.choice(TEXTS))]

    def _system(self, index: int) -> list[dict[str, Any]]:
        text = SYSTEMS[index]
        return [] if text is None else [{"role": "system", "content": text}]

    def _user(self, pictures: list[bytes], text: str) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    @property
    def num_blocks(self) -> int:
        """Distinct blocks that their prompts fill, not counting that pictures make more of them distinct."""
        prompts = [prompt_hashes(b"", answer.prompt_ids, (), (), BLOCK).blocks for answer in self.expected]
        return len({hash_ for blocks in prompts for hash_ in blocks})

    def wrong(self, index: int, answer: Any) -> list[str]:
        expected = self.expected[index]
        said = text_of(self.folder, expected.token_ids)
        if min(expected.gaps) <= TIE:
            return []
        return [
            f"{index}: {choice.message.content!r} instead of {said!r}"
            for choice in answer.choices
            if choice.message.content != said
        ]


async def ask_in_disorder(url: str, asked: Asked, count: int, seed: int) -> list[str]:
    """Random questions, up to ten at a time, some for two answers, some left early. What was answered wrong."""
    rng, places = random.Random(seed), asyncio.Semaphore(10)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)

    async def ask(index: int, n: int, patience_s: float | None) -> list[str]:
        question = asked.questions[index]
        arguments: dict[str, Any] = {"max_tokens": question.max_tokens, "temperature": 0, "n": n}
        async with places:
            call = client.chat.completions.create(model=MODEL, messages=question.as_openai(), **arguments)
            try:
                answer = await asyncio.wait_for(call, patience_s)
            except TimeoutError:
                return []
        assert len(answer.choices) == n
        return asked.wrong(index, answer)

    async with client:
        found = await asyncio.gather(
            *(
                ask(
                    rng.randrange(len(asked.questions)),
                    rng.choice([1, 1, 1, 2]),
                    rng.choice([None, None, None, None, rng.random() / 10]),
                )
                for _ in range(count)
            )
        )
    return [problem for problems in found for problem in problems]


@pytest.mark.parametrize(("placement", "family"), [("1e1p1d", "qwen2_5_vl"), ("2epd", "internvl"), ("2e1pd", "gemma3")])
def test_every_answer_is_the_uncached_one_whatever_is_evicted_meanwhile(
    tmp_path: Path, placement: str, family: str
) -> None:
    folder = make_checkpoint(family, tmp_path)
    asked = Asked(folder, seed=1, count=50)
    first = [tuple(answer.token_ids) for answer in asked.expected[: len(asked.pictures)]]
    assert len(set(first)) > 5, "a wrong picture would not be noticed"
    config = load_config(folder)
    tiny = {
        "max_model_len": 256,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
        "kv_cache_bytes": 24 * kv_layout(config, torch.float32).block_bytes,
        "embedding_cache_bytes": NUM_EMBEDDING_BLOCKS[placement] * embedding_layout(config, torch.float32).block_bytes,
    }
    with running(folder, placement, **tiny) as url:
        wrong = asyncio.run(ask_in_disorder(url, asked, 160, seed=2))
        view = wait_until_idle(url, 10)
    assert wrong == []
    instances = view["instances"]
    counters = {name: sum(i["counters"].get(name, 0) for i in instances) for name in instances[0]["counters"] | COUNTED}
    assert counters["embeddings_evicted"] > 20, counters
    assert counters["prefix_hits"] > 500, counters
    assert counters["encode_units_prefix"] > 0, counters
    pools = [i["pools"]["kv"]["total"] for i in instances if "kv" in i["pools"]]
    assert asked.num_blocks > sum(pools), f"blocks of all prompts {asked.num_blocks} fit the pools {pools}"


NUM_EMBEDDING_BLOCKS = {"1e1p1d": 8, "2epd": 32, "2e1pd": 8}
COUNTED = {"embeddings_evicted": 0, "prefix_hits": 0, "encode_units_prefix": 0}
