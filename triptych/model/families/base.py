"""What a model family has to say about itself, so that nothing outside this package needs to know its name.

A `Family` comes from the model's config alone. Joined with the checkpoint's tokenizer and image processor it gives an
`ImageLayout`: what a picture becomes in the prompt, from its size alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError, RequestError

MAX_ASPECT_RATIO = 200  # beyond it some processors refuse, others resize to something far larger than the picture
LAYOUT_CACHE_SIZE = 8192  # picture sizes

Piece = str | int  # text, or a run of that many image tokens


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """The embedding rows of one encode unit. `grid` is (time, height, width) in patches for multi-axis positions."""

    num_tokens: int
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class ItemLayout:
    """What replaces the placeholder of one picture.

    `compact` is the replacement with every run of image tokens written as one token, and `runs` are their lengths:
    tokenising the short text and repeating afterwards gives the same ids. The rows of the units fill the runs in order.
    """

    compact: str
    runs: tuple[int, ...]
    units: tuple[UnitLayout, ...]

    @classmethod
    def of(cls, image_token: str, pieces: list[Piece], units: tuple[UnitLayout, ...]) -> "ItemLayout":
        runs = tuple(piece for piece in pieces if isinstance(piece, int))
        rows = sum(unit.num_tokens for unit in units)
        assert sum(runs) == rows, f"runs of {sum(runs)} tokens for units of {rows} rows"
        return cls(
            compact="".join(image_token if isinstance(piece, int) else piece for piece in pieces),
            runs=runs,
            units=units,
        )


class ImageLayout(ABC):
    """A family's rule for pictures, with the numbers of one checkpoint."""

    def __init__(self, image_token: str, placeholder: str | None = None, markup: str | None = None) -> None:
        self.image_token = image_token  # stands for one embedding row
        self.placeholder = placeholder or image_token  # what the chat template writes for one picture
        self.markup = markup or self.placeholder  # what to write for one where the template takes text only
        self._lay_out_cached = lru_cache(LAYOUT_CACHE_SIZE)(self._lay_out)

    def lay_out(self, width: int, height: int) -> ItemLayout:
        """For a picture of that many pixels, upright. Raises RequestError for one that no processor takes."""
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise RequestError(
                f"a picture of {width} x {height} pixels is too narrow: the longer side may be at most "
                f"{MAX_ASPECT_RATIO} times the shorter one",
                code="invalid_image",
            )
        return self._lay_out_cached(width, height)

    @abstractmethod
    def _lay_out(self, width: int, height: int) -> ItemLayout: ...


class Family(ABC):
    """What serving needs to know about a model beyond what its config and its modules say."""

    model_types: ClassVar[tuple[str, ...]]
    image_groups: ClassVar[bool] = False  # image tokens attend to their whole image: a chunk must not cut one
    tensors: ClassVar[tuple[str, ...]] = ("pixel_values",)  # what get_image_features takes of the processor's output
    image_arguments: ClassVar[Mapping[str, object]] = {}  # with which the family's processor calls its image processor

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.image_token_id: int = config.image_token_id
        # Tokens that stand for media. In a prompt they are only ever where a media item was.
        names = ("image_token_id", "video_token_id", "audio_token_id")
        ids = [getattr(config, name, None) for name in names]
        self.reserved_token_ids = frozenset(token_id for token_id in ids if token_id is not None)

    def reserved_texts(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
        """How those tokens are written. A config may name some that the tokenizer does not have."""
        known = [token_id for token_id in self.reserved_token_ids if token_id < len(tokenizer)]
        return frozenset(tokenizer.convert_ids_to_tokens(known))

    @abstractmethod
    def image_layout(
        self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
    ) -> ImageLayout:
        """`arguments` are those of processor_config.json.

        Raises ConfigError where the processor would make another number of tokens than the model has features.
        """

    def _token(self, tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
        token: str | None = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
        if token is None:
            raise ConfigError(
                f"{self.config.model_type}: the tokenizer has no token {token_id}, which the config names"
            )
        return token


def edge(size: Any, name: str) -> int | None:
    """One number of an image processor's size, which is a dict in some versions of transformers."""
    value: int | None = size.get(name)
    return value


def require_equal(what: str, of_processor: object, of_model: object) -> None:
    """Raises ConfigError if processor and model of a checkpoint disagree."""
    if of_processor != of_model:
        raise ConfigError(f"{what}: the checkpoint's processor says {of_processor}, its model {of_model}")


def square(size: Any) -> int:
    """The side of a square that configs write as one number or as a pair. Raises ConfigError if it is none."""
    sides = {int(side) for side in (size if isinstance(size, list | tuple) else (size,))}
    if len(sides) != 1:
        raise ConfigError(f"expected a square, got {size}")
    return sides.pop()
