"""An engine in this process together with its frontend: what one turn of it runs, and how long that takes.

A turn counts from taking messages to sending tokens, so that schedules, commits and messages are part of it.
"""

import io
import itertools
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from PIL import Image

from triptych.config import KV_BLOCK_TOKENS, InstanceConfig
from triptych.core import HASH_BYTES, Chunk, EncodeWork, LeaseId, RequestId, SampledToken, SamplingParams
from triptych.engine.engine import Engine
from triptych.engine.equipment import EncodeRuns, LanguageRuns
from triptych.engine.fitting import Fitter
from triptych.engine.sockets import Inbox, Post
from triptych.errors import ConfigError, RequestError
from triptych.memory.prefix import prompt_hashes
from triptych.messages import AnyMessage, Encode, Failed, Release, Submit, Table, Tokens
from triptych.model.headers import ImageHeader
from triptych.model.processor import Processor

ROOT = b"profiled"  # stands for the model in the names of blocks
WORDS = "apple river stone cloud window garden letter music winter silver bridge candle forest mirror engine harbour"


@dataclass(slots=True)
class Turn:
    """What one turn of the engine ran, and how long that took: up to the end of the encoder, and from there on."""

    encode_s: float = 0.0
    language_s: float = 0.0
    works: list[EncodeWork] = field(default_factory=list)
    chunks: list[tuple[int, int, bool]] = field(default_factory=list)  # start, length, whether it decodes


class _WatchedEncoder:
    def __init__(self, inner: EncodeRuns, rig: "Rig") -> None:
        self._inner = inner
        self._rig = rig

    def run(self, works: list[EncodeWork]) -> list[RequestError | None]:
        self._rig.now.works = list(works)
        errors = self._inner.run(works)
        self._rig.encoded()
        return errors


class _WatchedLanguage:
    def __init__(self, inner: LanguageRuns, rig: "Rig") -> None:
        self._inner = inner
        self._rig = rig

    def run(self, chunks: list[Chunk]) -> list[SampledToken]:
        self._rig.now.chunks = [
            (chunk.start, chunk.length, chunk.start >= chunk.sequence.num_prompt_tokens) for chunk in chunks
        ]
        return self._inner.run(chunks)

    def offload(self, blocks: list[int]) -> Any:
        return self._inner.offload(blocks)

    def restore(self, saved: Any, blocks: list[int]) -> None:
        self._inner.restore(saved, blocks)


class Rig:
    """One engine in this process that does every stage, and its frontend: `play` requests, and get the turns."""

    def __init__(self, config: InstanceConfig, fitter: Fitter, clock: Callable[[], float]) -> None:
        self.now = Turn()
        self._config = config
        self._clock = clock
        self._since = 0.0
        self._rng = random.Random(0)
        self._ids = itertools.count()
        self._processor = Processor.load(config.model.path, revision=config.model.revision)
        self._token_ids = self._processor.encode(WORDS, add_special_tokens=False)
        equipment = fitter.fit(config)
        runners = equipment.runners
        assert runners.encode is not None and runners.language is not None
        runners.encode, runners.language = (
            _WatchedEncoder(runners.encode, self),
            _WatchedLanguage(runners.language, self),
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox, self._post = Inbox(self._context, config.frontend), Post(self._context)
        self._engine_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        inbox, post = Inbox(self._engine_context, config.inbox), Post(self._engine_context)
        self._engine = Engine(fitter.near, equipment, inbox, post)
        self._post.send(config.inbox, Table(1, [self._engine.peer]))

    @property
    def takes_pictures(self) -> bool:
        return "image" in self._processor.modalities

    def text(self, num_tokens: int, output_tokens: int) -> list[AnyMessage]:
        """The orders of a request of so many tokens."""
        request_id, ids = self._new_id(), self._rng.choices(self._token_ids, k=num_tokens)
        hashes = prompt_hashes(ROOT, ids, (), (), KV_BLOCK_TOKENS)
        return [Submit(request_id, ids, num_tokens, (), (), self._sampling(output_tokens), prompt_hashes=hashes)]

    def pictures(self, width: int, height: int, count: int, output_tokens: int = 1) -> list[AnyMessage]:
        """The orders of a request with JPEG pictures that no cache knows."""
        request_id = self._new_id()
        content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": WORDS}]
        text = self._processor.render([{"role": "user", "content": content}])
        items = [("image", ImageHeader(width, height)) for _ in range(count)]
        prompt = self._processor.expand(text, items)
        files = [(_jpeg(width, height), secrets.token_bytes(HASH_BYTES)) for _ in range(count)]
        media = self._processor.media(items, files)
        units = self._processor.encode_units(prompt, media)
        orders: list[AnyMessage] = [
            Encode(request_id, one, tuple(unit for unit, of in units if of is one), self._config.id) for one in media
        ]
        submit = Submit(
            request_id,
            prompt.token_ids,
            len(prompt.token_ids),
            tuple(unit for unit, _ in units),
            prompt.spans,
            self._sampling(output_tokens),
            position_arguments=prompt.position_arguments,
            prompt_hashes=prompt_hashes(
                ROOT, prompt.token_ids, tuple(unit for unit, _ in units), prompt.spans, KV_BLOCK_TOKENS
            ),
            ordered=tuple(unit.hash for unit, _ in units),
        )
        return [submit, *orders]

    def rows(self, side: int) -> tuple[tuple[int, ...], int]:
        """Of the units of a square picture, and how many tokens of a prompt come before the first picture."""
        text = self._processor.render([{"role": "user", "content": [{"type": "image"}]}])
        prompt = self._processor.expand(text, [("image", ImageHeader(side, side))])
        return tuple(prompt.layouts[0].units), prompt.spans[0].start

    def play(self, requests: Sequence[list[AnyMessage]]) -> list[Turn]:
        """Until every request is answered. Raises ConfigError where one cannot be."""
        for order in itertools.chain(*requests):
            self._post.send(self._config.inbox, order)
        time.sleep(0.002)  # until they are there: sending is no part of a turn
        turns, left = [], len(requests)
        while left:
            turn = self._turn()
            if turn.works or turn.chunks:
                turns.append(turn)
            left -= self._num_answered()
        self._settle()
        return turns

    def idle_turn_s(self) -> float:
        """Of a message about nothing that is known: the turn that takes it, and the look after that."""
        self._post.send(self._config.inbox, Release(LeaseId(0)))
        time.sleep(0.001)
        began = self._clock()
        self._engine.turn(wait_s=1.0)
        self._engine.turn(wait_s=0.0)
        return self._clock() - began

    def close(self) -> None:
        self._engine.close()
        self._post.close(0)
        self._inbox.close()
        self._context.term()
        self._engine_context.term()

    def encoded(self) -> None:
        now = self._clock()
        self.now.encode_s, self._since = now - self._since, now

    def _turn(self) -> Turn:
        self.now, self._since = Turn(), self._clock()
        self._engine.turn(wait_s=0.0)
        self.now.language_s = self._clock() - self._since
        return self.now

    def _settle(self) -> None:
        """What is left after the last token: leases that are given back."""
        for _ in range(3):
            self._engine.turn(wait_s=0.001)

    def _num_answered(self) -> int:
        answered = 0
        for message in self._inbox.receive():
            if isinstance(message, Failed):
                raise ConfigError(f"the engine cannot do what is to be measured: {message.message}")
            if isinstance(message, Tokens):
                answered += sum(update.finish is not None for update in message.updates)
        return answered

    def _new_id(self) -> RequestId:
        return RequestId(f"r{next(self._ids)}")

    def _sampling(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)


def _jpeg(width: int, height: int) -> bytes:
    """Coloured noise, as smooth as a photograph, so that it decodes like one."""
    grid = (max(2, height // 28), max(2, width // 28), 3)
    colours = np.random.default_rng(0).integers(0, 256, grid, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
