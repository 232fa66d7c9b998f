"""Mixed requests for whole-server tests, what plain transformers answers to them, and what instances count of them."""

import asyncio
import base64
import io
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.flows.servers import MODEL, cluster
from tests.reference import Messages, Reference, reference, reference_processor

TIE = 1e-4  # float32: two best logits that are nearer than this are a tie, which either answer may take
REPORTED_S = 0.3  # after that much time every instance has reported
WORDS = "what colour is the circle in this picture and how many of them do you see there please tell me".split()


@dataclass(frozen=True)
class Question:
    """A conversation with media in it, and how many tokens of answer are asked for.

    Parts are those of `reference`: pictures are encoded ones, videos and sounds have their encoded form as `file`. A
    sound is sent as `input_audio` if it has a `format`, else by URL.
    """

    messages: Messages
    max_tokens: int

    def as_openai(self) -> list[dict[str, Any]]:
        return [message | {"content": _openai_content(message["content"])} for message in self.messages]


def mixed_questions(count: int, seed: int, max_pictures: int = 6) -> list[Question]:
    """0 to `max_pictures` pictures of different sizes and formats, text around them, system messages, earlier turns."""
    rng = random.Random(seed)
    return [_question(rng, index % (max_pictures + 1)) for index in range(count)]


def picture(rng: random.Random, width: int, height: int) -> bytes:
    """A picture with structure in it, encoded as PNG or JPEG."""
    small = Image.frombytes("RGB", (5, 4), rng.randbytes(60))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, rng.choice(["PNG", "JPEG"]))
    return file.getvalue()


@cache
def references(folder: Path, count: int, seed: int) -> list[Reference]:
    return [reference(folder, q.messages, q.max_tokens) for q in mixed_questions(count, seed)]


def text_of(folder: Path, token_ids: list[int]) -> str:
    text: str = reference_processor(folder).tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


async def ask_all(url: str, questions: list[Question], **extra: Any) -> list[Any]:
    """All at once, greedily. Whole responses in the order of the questions."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        return await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=MODEL, messages=q.as_openai(), max_tokens=q.max_tokens, temperature=0, **extra
                )
                for q in questions
            )
        )


def differences(folder: Path, answers: list[Any], expected: list[Reference]) -> list[str]:
    """What is not as transformers answers it. A split at a near tie is left out: there is no right token there."""
    found = []
    for index, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        said = answer.choices[0].message.content or ""
        if answer.usage.prompt_tokens != len(wanted.prompt_ids):
            found.append(f"{index}: prompt of {answer.usage.prompt_tokens} tokens, not {len(wanted.prompt_ids)}")
        elif said != text_of(folder, wanted.token_ids) and min(wanted.gaps) > TIE:
            found.append(f"{index}: said {said!r}, not {text_of(folder, wanted.token_ids)!r}")
    return found


def lone_picture(width: int, height: int, seed: int) -> Question:
    parts = [{"type": "image", "image": picture(random.Random(seed), width, height)}]
    return Question([{"role": "user", "content": [*parts, {"type": "text", "text": "what is it"}]}], max_tokens=6)


def encoded_units(url: str) -> dict[str, float]:
    """Encode instance -> how many units it has encoded, as of its last report."""
    return {
        instance["id"]: instance["counters"].get("encode_units_computed", 0.0)
        for instance in cluster(url)["instances"]
        if "e" in instance["role"]
    }


def unit_sources(url: str) -> Counter[str]:
    """How many units came from where (`computed`, `cached`, ...), by `triptych:encode_units_total`: of all that the
    instances have done by now."""
    time.sleep(REPORTED_S)
    found: Counter[str] = Counter()
    for metric in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in metric.samples:
            if sample.name == "triptych:encode_units_total":
                found[sample.labels["source"]] += int(sample.value)
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 2.0) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _question(rng: random.Random, num_pictures: int) -> Question:
    pictures = [picture(rng, rng.randint(20, 160), rng.randint(20, 160)) for _ in range(num_pictures)]
    parts: list[dict[str, Any]] = [{"type": "image", "image": data} for data in pictures]
    parts.insert(rng.randint(0, len(parts)), {"type": "text", "text": _sentence(rng)})
    messages: Messages = [{"role": "user", "content": parts if pictures else _sentence(rng)}]
    if rng.random() < 0.3:
        earlier = [{"role": "user", "content": _sentence(rng)}, {"role": "assistant", "content": _sentence(rng)}]
        messages = earlier + messages
    return Question(messages, max_tokens=rng.randint(2, 14))


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))


def _openai_content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [_openai_part(part) for part in content]


def _openai_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    data = base64.b64encode(part.get("file") or part["image"]).decode()
    match part:
        case {"type": "audio", "format": str(format)}:
            return {"type": "input_audio", "input_audio": {"data": data, "format": format}}
        case {"type": "audio"}:
            return {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}}
        case {"type": "video"}:
            return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
