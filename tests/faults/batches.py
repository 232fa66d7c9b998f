"""Requests of all kinds, made from a number: no two numbers share a picture or the beginning of a text."""

import base64
import random
from typing import Any

from tests.faults.asking import Ask
from tests.flows.questions import WORDS, picture
from tests.model.sounds import float_wav, noise
from tests.model.video_prompts import moving

ANSWER_TOKENS = 12
NUM_REPEATED = 8  # pictures
ABORTED = 0.2  # of the requests of a long run
FRAMES = {"video": {"num_frames": 5}}


def batch(number: int, *, stream: bool) -> list[Ask]:
    """Some that have work at every moment: long prompts, pictures, several choices, one token only."""
    rng = random.Random(number)
    again = image(rng)
    bodies = [
        body(rng, [], num_words=60),
        body(rng, [again], logprobs=True, top_logprobs=2),
        body(rng, [image(rng), image(rng)], num_words=40, temperature=0.8),
        body(rng, [], num_words=20, temperature=1.0, top_p=0.9, n=2, logprobs=True),
        body(rng, [], num_words=50, max_tokens=1),
        body(rng, [again], num_words=30, temperature=1.2, top_k=20, max_tokens=24, logprobs=True),
        body(rng, [image(rng)], num_words=10, n=2, temperature=0.7),
    ]
    return [Ask(each, stream) for each in bodies]


def body(rng: random.Random, images: list[dict[str, Any]], *, num_words: int = 25, **changes: Any) -> dict[str, Any]:
    """Greedy, and of full length, where `changes` do not say otherwise."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": sentence(rng, num_words)}]
    for each in images:
        parts.insert(rng.randint(0, len(parts)), each)
    usual = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.0,
        "seed": rng.getrandbits(40),
        "ignore_eos": True,
    }
    return usual | changes


def sentence(rng: random.Random, num_words: int) -> str:
    return f"{rng.getrandbits(40):x} " + " ".join(rng.choices(WORDS, k=num_words))


def image(rng: random.Random, ending: bytes = b"") -> dict[str, Any]:
    """`ending` is behind what readers of pictures look at."""
    data = picture(rng, rng.randint(30, 120), rng.randint(30, 120)) + ending
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def sound(rng: random.Random) -> dict[str, Any]:
    data = float_wav(noise(rng.randint(4_000, 30_000), rng.getrandbits(30)))
    return {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{base64.b64encode(data).decode()}"}}


def video(rng: random.Random) -> dict[str, Any]:
    data = moving(rng.randint(6, 20), 16 * rng.randint(2, 5), 16 * rng.randint(2, 5), rng.choice([3, 10, 25]))
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}


def anything(seed: int, index: int) -> Ask:
    """Request `index` of a long run: texts, pictures that come once and pictures that come again, clips and sounds,
    answered greedily or not, once or twice. One client of five leaves at some moment."""
    rng = random.Random(f"{seed} {index}")
    repeated = random.Random(f"{seed} picture {rng.randrange(NUM_REPEATED)}")
    media = rng.choices(
        [[], [image(rng)], [image(repeated)], [image(rng), image(repeated), image(rng)], [video(rng)], [sound(rng)]],
        [35, 20, 20, 10, 8, 7],
    )[0]
    changes: dict[str, Any] = {"max_tokens": rng.choice([1, 4, 12, 40]), "media_io_kwargs": FRAMES}
    if rng.random() < 0.5:
        changes |= {"temperature": rng.choice([0.7, 1.0, 1.3]), "top_p": rng.choice([0.9, 1.0])}
    if rng.random() < 0.5:
        changes |= {"logprobs": True, "top_logprobs": rng.choice([0, 3])}
    if rng.random() < 0.1:
        changes["n"] = 2
    leaves = rng.randint(0, 40) if rng.random() < ABORTED else None
    return Ask(body(rng, media, num_words=rng.randint(3, 90), **changes), rng.random() < 0.7, leaves, comes_again=True)
