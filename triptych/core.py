"""The nouns that every layer shares. Imports nothing above itself; knows no tensor, no socket, no model."""

import enum
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NewType, Self

import msgspec

from triptych.errors import ConfigError

InstanceId = NewType("InstanceId", str)
RequestId = NewType("RequestId", str)
UnitHash = NewType("UnitHash", bytes)  # 16 bytes, see EncodeUnit
LeaseId = NewType("LeaseId", int)


class Stage(enum.StrEnum):
    """A kind of work."""

    ENCODE = "e"  # media to embeddings
    PREFILL = "p"  # prompt to KV cache and first token
    DECODE = "d"  # tokens one by one


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
        return tuple(Stage(letter) for letter in self.value)

    @property
    def encodes(self) -> bool:
        return Stage.ENCODE in self.stages

    @property
    def has_language_model(self) -> bool:
        return Stage.PREFILL in self.stages or Stage.DECODE in self.stages


@dataclass(frozen=True)
class Placement:
    """Counts and roles, written `2e1p1d`: the roles of all instances, in the order in which they were written."""

    roles: tuple[Role, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ConfigError for text that is no placement, or that leaves a stage without an instance."""
        parts = re.findall(r"(\d+)([a-z]+)", text)
        valid = {role.value for role in Role}
        if not parts or "".join(n + r for n, r in parts) != text or any(r not in valid for _, r in parts):
            raise ConfigError(
                f"placement {text!r}: expected counts and roles such as 1e1p1d or 2e1pd; roles are {', '.join(Role)}"
            )
        roles = tuple(Role(r) for n, r in parts for _ in range(int(n)))
        missing = [stage.name.lower() for stage in Stage if not any(stage in role.stages for role in roles)]
        if missing:
            raise ConfigError(f"placement {text!r}: no instance serves {' or '.join(missing)}")
        return cls(roles)

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


class EncodeUnit(msgspec.Struct, frozen=True):
    """The smallest piece of a media item that the encoder treats independently.

    `hash` is 128 bits over media bytes, processor arguments, model, revision and unit index. `num_tokens` is exact
    and known before encoding. `grid` is what the language model needs to place the tokens: (time, height, width) in
    patches for families with multi-axis rotary positions, else None.
    """

    hash: UnitHash
    modality: str
    num_tokens: int
    grid: tuple[int, int, int] | None = None


class Span(msgspec.Struct, frozen=True, array_like=True):
    """A run of placeholder tokens in a prompt: rows [offset, offset + length) of a unit stand at `start`."""

    start: int
    length: int
    unit: int  # index into the request's units
    offset: int


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
    num_computed: int = 0  # leading tokens whose KV is in the blocks
    block_table: list[int] = field(default_factory=list)
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
    data: bytes  # the encoded media item (JPEG, PNG, ...) that the unit is a part of
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
