"""What a model family has to say about itself, so that nothing outside this package needs to know its name.

A `Family` comes from the model's config alone. Joined with what a checkpoint brings beside its weights (`Parts`) it
gives one `Modality` for each kind of media: what an item becomes in the prompt, from its header alone, and what the
encoder gets for each of its units.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.image_processing_utils import BaseImageProcessor

# Not from `transformers`, which says in some versions that this name needs torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from triptych.core import Media
from triptych.errors import ConfigError, RequestError
from triptych.model.headers import Header, ImageHeader
from triptych.model.images import decode_image
from triptych.model.pixel_table import tabulate

MAX_ASPECT_RATIO = 200  # beyond it some processors refuse, others resize to something far larger than the picture
LAYOUT_CACHE_SIZE = 8192  # sizes of pictures

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Run:
    """`length` placeholder tokens in a row, written `token`: each stands for one embedding row."""

    token: str
    length: int


Piece = str | int | Run  # text; a run of that many of the modality's own token; a run of another token


@dataclass(frozen=True, slots=True)
class Rows:
    """`length` embedding rows of one unit, from `offset` on."""

    unit: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ItemLayout:
    """What replaces the placeholder of one media item.

    `compact` is the replacement with every run of placeholder tokens written as one token, and `runs` are those:
    tokenising the short text and repeating afterwards gives the same ids. `units` are the embedding rows that each
    unit of the item has; `rows` says which of them fill the runs, in order. `positions` is the item's part of the
    arguments of the model's position rule.
    """

    compact: str
    runs: tuple[Run, ...]
    units: tuple[int, ...]
    rows: tuple[Rows, ...]
    positions: Mapping[str, Any] = field(default_factory=dict)


class Modality(ABC):
    """A family's rule for one kind of media, with the numbers of one checkpoint."""

    name: ClassVar[str]  # image, video or audio
    depends_on_num_items: ClassVar[bool] = False  # whether other items of the prompt change how one is encoded

    def __init__(self, token: str, *, placeholder: str | None = None, markup: str | None = None) -> None:
        self.token = token  # stands for one embedding row
        self.placeholder = placeholder or token  # what the chat template writes for one item
        self.markup = markup or self.placeholder  # what to write for one where the template takes text only

    def lay_out(self, header: Header, num_items: int) -> ItemLayout:
        """For one of `num_items` items of this kind in a prompt. Raises RequestError where no processor takes it."""
        return self._lay_out(header, num_items if self.depends_on_num_items else 1)

    @abstractmethod
    def _lay_out(self, header: Any, num_items: int) -> ItemLayout: ...

    @property
    @abstractmethod
    def arguments(self) -> str:
        """Everything but the media that decides what the encoder gets for an item, as text: a part of every hash."""

    @abstractmethod
    def prepare(self, media: Media) -> Any:
        """The decoded item, in the form that `inputs` takes. Raises RequestError if it cannot be decoded."""

    @abstractmethod
    def inputs(self, prepared: Any, index: int) -> Tensors:
        """What `features` takes for unit `index` of an item. Tensors whose shapes agree behind their first axis are
        joined along it, so that several units run as one batch."""

    def features(self, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        """[rows of all units of the batch, hidden * (1 + deepstack layers)]: projected features, deepstack ones."""
        output = getattr(model.base_model, f"get_{self.name}_features")(**inputs, return_dict=True)
        pooled = output.pooler_output if output.pooler_output is not None else output.last_hidden_state
        deepstack = getattr(output, "deepstack_features", None) or ()
        parts = [flatten(pooled), *(flatten(layer) for layer in deepstack)]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def item(
        self,
        pieces: Sequence[Piece],
        units: Sequence[int],
        rows: Sequence[Rows] | None = None,
        positions: Mapping[str, Any] | None = None,
    ) -> ItemLayout:
        """A layout from its pieces. By default all rows of all units fill the runs."""
        runs = [Run(self.token, piece) if isinstance(piece, int) else piece for piece in pieces]
        if rows is None:
            rows = [Rows(unit, 0, length) for unit, length in enumerate(units)]
        wanted = sum(run.length for run in runs if isinstance(run, Run))
        given = sum(row.length for row in rows)
        assert wanted == given, f"runs of {wanted} tokens for {given} rows"
        assert all(row.offset + row.length <= units[row.unit] for row in rows), f"{rows} of units with {units} rows"
        return ItemLayout(
            compact="".join(run.token if isinstance(run, Run) else run for run in runs),
            runs=tuple(run for run in runs if isinstance(run, Run)),
            units=tuple(units),
            rows=tuple(rows),
            positions=positions or {},
        )


class ImageModality(Modality):
    """Pictures. Unless a family says otherwise, a whole picture is one unit."""

    name = "image"
    tensors: ClassVar[tuple[str, ...]] = ("pixel_values",)  # what the feature function takes of the processor's output
    options: ClassVar[Mapping[str, object]] = {}  # with which the family's processor calls its image processor

    def __init__(self, processor: BaseImageProcessor, token: str, **texts: str | None) -> None:
        super().__init__(token, **texts)
        self.processor = processor
        self._lay_out = lru_cache(LAYOUT_CACHE_SIZE)(self._lay_out)  # type: ignore[method-assign]

    @property
    def arguments(self) -> str:
        return json.dumps([self.processor.to_json_string(), dict(self.options)])

    def lay_out(self, header: Header, num_items: int) -> ItemLayout:
        assert isinstance(header, ImageHeader)
        refuse_narrow("picture", header.width, header.height, code="invalid_image")
        return super().lay_out(header, num_items)

    @abstractmethod
    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout: ...

    def prepare(self, media: Media) -> Tensors:
        """What the family's image processor makes of the picture."""
        outputs = self.processor(images=[decode_image(media.data)], return_tensors="pt", **self.options)
        return {name: outputs[name] for name in self.tensors if name in outputs}

    def inputs(self, prepared: Tensors, index: int) -> Tensors:
        assert index == 0, f"unit {index} of a picture that is encoded whole"
        return prepared


class Parts:
    """What a checkpoint brings beside its weights. Each part is read when a family asks for it."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Those of processor_config.json."""
        return self.read_json("processor_config.json")

    @cached_property
    def image_processor(self) -> Any:
        """On Pillow. Raises ConfigError where the checkpoint has none."""
        try:
            processor = AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"model {self.folder}: {error}") from error
        tabulate(processor)
        return processor

    @cached_property
    def feature_extractor(self) -> Any:
        """Of audio. Raises ConfigError where the checkpoint has none."""
        try:
            return AutoFeatureExtractor.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"model {self.folder}: {error}") from error

    def token(self, token_id: int) -> str:
        """How a token that the config names is written. Raises ConfigError where the tokenizer does not have it."""
        known = token_id < len(self.tokenizer)
        token: str | None = self.tokenizer.convert_ids_to_tokens(token_id) if known else None
        if token is None:
            raise ConfigError(f"model {self.folder}: the tokenizer has no token {token_id}, which the config names")
        return token

    def read_json(self, name: str) -> dict[str, Any]:
        """Empty where there is no such file. Raises ConfigError for one that is no JSON."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        return content


class Family(ABC):
    """What serving needs to know about a model beyond what its config and its modules say."""

    model_types: ClassVar[tuple[str, ...]]
    linear_attention: ClassVar[bool] = False  # its text model may have layers with a recurrent state
    image_groups: ClassVar[bool] = False  # image tokens attend to their whole image: a chunk must not cut one

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    @abstractmethod
    def modalities(self, parts: Parts) -> Sequence[Modality]:
        """Raises ConfigError where a processor would make another number of tokens than the model has features."""

    def reserved_texts(self, tokenizer: Tokenizer) -> frozenset[str]:
        """Tokens that stand for media although no modality is served that writes them. In a prompt of a client they
        are refused. A config may name some that the tokenizer does not have."""
        names = ("image_token_id", "video_token_id", "audio_token_id")
        ids = [getattr(self.config, name, None) for name in names]
        known = [token_id for token_id in ids if token_id is not None and token_id < len(tokenizer)]
        return frozenset(tokenizer.convert_ids_to_tokens(known))

    def refused_texts(self, tokenizer: Tokenizer) -> frozenset[str]:
        """What a client's own text must not contain, although a chat template may write it around media."""
        return frozenset()


def flatten(features: Any) -> Tensor:
    """[rows, width]: families nest features per item, per tile or not at all; rows are always in item order."""
    if isinstance(features, (list, tuple)):
        return torch.cat([flatten(part) for part in features])
    return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]


def refuse_narrow(what: str, width: int, height: int, *, code: str) -> None:
    """Raises RequestError for sides, in pixels, that no processor takes."""
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RequestError(
            f"a {what} of {width} x {height} pixels is too narrow: the longer side may be at most "
            f"{MAX_ASPECT_RATIO} times the shorter one",
            code=code,
        )


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
