"""The nouns that every layer shares. Imports nothing above itself; knows no tensor, no socket, no model."""

import enum
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NewType, Self

import msgspec

from triptych.errors import ConfigError

InstanceId = NewType("InstanceId", str)
RequestId = NewType("RequestId", str)
UnitHash = NewType("UnitHash", bytes)  # 16 bytes, see EncodeUnit
LeaseId = NewType("LeaseId", int)
BlockHash = NewType("BlockHash", bytes)  # 16 bytes, see BlockHashes

HASH_BYTES = 16  # of every hash of content: 128 bits of BLAKE2b
MOST_INSTANCES = 1024  # of a placement: what is beyond is a slip of the pen, and must not cost its length in memory


class Stage(enum.StrEnum):
    """A kind of work."""

    ENCODE = "e"  # media to embeddings
    PREFILL = "p"  # prompt to KV cache and first token
    DECODE = "d"  # tokens one by one


STAGE_SETS = [frozenset(stages) for number in (1, 2, 3) for stages in combinations(Stage, number)]


class Role(enum.StrEnum):
    """The set of stages that an instance serves now, spelled by their letters in the order of the data."""

    E = "e"
    P = "p"
    D = "d"
    EP = "ep"
    PD = "pd"
    ED = "ed"
    EPD = "epd"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return _STAGES[self]

    @property
    def encodes(self) -> bool:
        return Stage.ENCODE in self.stages

    @property
    def has_language_model(self) -> bool:
        return Stage.PREFILL in self.stages or Stage.DECODE in self.stages

    def num_halves_to_load(self, after: "Role") -> int:
        """Halves of the model, encoder and language model, that an instance has to load to become `after`."""
        return (after.encodes and not self.encodes) + (after.has_language_model and not self.has_language_model)


_STAGES = {role: tuple(Stage(letter) for letter in role.value) for role in Role}


def unserved(roles: Iterable[Role]) -> list[Stage]:
    """The stages that nobody among `roles` serves."""
    served = {stage for role in roles for stage in role.stages}
    return [stage for stage in Stage if stage not in served]


@dataclass(frozen=True)
class Placement:
    """Counts and roles, written `2e1p1d`: the roles of all instances, in the order in which they were written."""

    roles: tuple[Role, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ConfigError for text that is no placement, that leaves a stage without an instance, or that asks for
        more than `MOST_INSTANCES`."""
        parts = re.findall(r"([0-9]{1,18})([a-z]{1,3})", text)
        valid = {role.value for role in Role}
        if not parts or "".join(n + r for n, r in parts) != text or any(r not in valid for _, r in parts):
            raise ConfigError(
                f"placement {text[:100]!r}: expected counts and roles such as 1e1p1d or 2e1pd; "
                f"roles are {', '.join(Role)}"
            )
        number = sum(int(n) for n, _ in parts)
        if number > MOST_INSTANCES:
            raise ConfigError(f"placement {text[:100]!r}: {number} instances, at most {MOST_INSTANCES}")
        roles = tuple(Role(r) for n, r in parts for _ in range(int(n)))
        missing = [stage.name.lower() for stage in unserved(roles)]
        if missing:
            raise ConfigError(f"placement {text[:100]!r}: no instance serves {' or '.join(missing)}")
        return cls(roles)

    @classmethod
    def of(cls, roles: Iterable[Role]) -> Self:
        """Of instances that are there, whatever they serve: in the order of `Role`."""
        return cls(tuple(sorted(roles, key=list(Role).index)))

    def __str__(self) -> str:
        return "".join(f"{count}{role}" for role, count in Counter(self.roles).items())


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. Defaults are the OpenAI ones; 0 or None switches a filter off.

    `seed` is set for every request before it leaves the frontend: the token at a position is a function of
    (seed, choice, position) and of the logits, never of the batch or the instance.
    """

    max_tokens: int
    seed: int
    choice: int = 0  # index of this sequence among the `n` choices of its request
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None  # how many alternatives to report per token; 0: the chosen token only


class Media(msgspec.Struct, frozen=True):
    """One picture, video or audio clip as the encoder gets it.

    `hash` is 128 bits over the bytes and over every field here that changes what is encoded.
    """

    hash: bytes
    modality: str  # image, video or audio
    data: bytes  # the encoded file (JPEG, MP4, WAV, ...)
    frames: tuple[int, ...] = ()  # of a video: indices of the frames that the model sees, ascending
    num_items: int = 1  # items of this modality in the prompt, where the family's tiling depends on that; else 1


class EncodeUnit(msgspec.Struct, frozen=True):
    """The smallest piece of a media item that the encoder treats independently: a picture, a tile, a temporal slice
    of a video, a window of audio.

    `hash` is 128 bits over the item's hash, processor arguments, model, revision and `index`, the unit's place in its
    item. `num_tokens` counts its embedding rows: exact, and known before encoding.
    """

    hash: UnitHash
    modality: str
    num_tokens: int
    index: int = 0


class Span(msgspec.Struct, frozen=True, array_like=True):
    """A run of placeholder tokens in a prompt: rows [offset, offset + length) of a unit stand at `start`."""

    start: int
    length: int
    unit: int  # index into the request's units
    offset: int


class BlockHashes(msgspec.Struct, frozen=True, array_like=True):
    """What the KV of a prompt is a function of, block by block: `memory.prefix` makes and continues them.

    `blocks[i]` is 128 bits over `root` (model and revision), all tokens and all media up to the end of block i.
    `tail` names the media that fall into the last block, which the prompt does not fill.
    """

    root: bytes = b""
    blocks: tuple[BlockHash, ...] = ()
    tail: bytes = b""


# What the position rule of a model wants to know about the media of a prompt, by the name that it gives it: one value
# per item, in the order of the prompt (image_grid_thw: [[1, 16, 16], ...]). Empty for models that count tokens only.
PositionArguments = dict[str, list[Any]]


def distinct(units: Iterable[EncodeUnit]) -> list[EncodeUnit]:
    """Without repetitions, in order."""
    return list({unit.hash: unit for unit in units}.values())


def units_behind(units: tuple[EncodeUnit, ...], spans: Iterable[Span], num_tokens: int) -> dict[UnitHash, EncodeUnit]:
    """Distinct units of which rows stand behind the first `num_tokens` tokens of a prompt, in order."""
    indices = {span.unit for span in spans if span.start + span.length > num_tokens}
    return {units[index].hash: units[index] for index in sorted(indices)}


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence, a stop token or a stop string
    LENGTH = "length"
    ABORT = "abort"


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: of the chosen token, and of the most likely ones, best first."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Status(enum.Enum):
    """Where a sequence stands inside a stage."""

    WAITING = enum.auto()  # admitted to the queue, holds nothing
    LOADING = enum.auto()  # holds its blocks; embeddings or KV are on their way
    RUNNING = enum.auto()  # part of batches
    OFFLOADED = enum.auto()  # decode only: KV in host memory, blocks given back
    LEASED = enum.auto()  # done here; blocks pinned until the next stage released the lease
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """A token list in prefill and decode, with the blocks that hold its KV. One owner at a time."""

    request_id: RequestId
    token_ids: list[int]  # prompt, then everything sampled so far
    num_prompt_tokens: int  # a resubmitted request has output tokens behind the prompt from the start
    sampling: SamplingParams
    units: tuple[EncodeUnit, ...] = ()
    spans: tuple[Span, ...] = ()
    position_arguments: PositionArguments = field(default_factory=dict)
    prompt_hashes: BlockHashes = field(default_factory=BlockHashes)
    num_computed: int = 0  # leading tokens whose KV is in the blocks
    block_table: list[int] = field(default_factory=list)
    sealed: list[BlockHash] = field(default_factory=list)  # of the leading blocks that others may use, see KVCache.seal
    rope_delta: int = 0  # set by the language runner in prefill: decode position = index + rope_delta
    status: Status = Status.WAITING
    scratch: object = None  # per-sequence state of the runner that runs it; never leaves the instance
    offloaded: object = None  # what the runner saved of its KV while the status is OFFLOADED

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True)
class EncodeWork:
    """One unit to encode, and where its rows go."""

    unit: EncodeUnit
    media: Media  # the item that the unit is a part of
    blocks: list[int]  # of the embedding region


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence in one forward. It samples if it ends at the last token."""

    sequence: Sequence
    start: int
    length: int
    embedding_blocks: dict[int, list[int]] = field(default_factory=dict)  # unit index -> blocks, if a span falls in

    @property
    def samples(self) -> bool:
        return self.start + self.length == len(self.sequence.token_ids)


@dataclass(slots=True)
class SampledToken:
    """What a chunk that samples gave: the token that follows its last one."""

    token_id: int
    logprobs: TokenLogprobs | None = None
