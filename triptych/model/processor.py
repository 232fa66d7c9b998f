"""Everything between a request and a model's inputs: chat template, tokens, placeholders, pixels, unit hashes.

The frontend uses the half that needs no pixel: what a picture becomes in the prompt follows from its size. Encode
instances use the other half. Knows no request, no server and no model weights.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.image_processing_utils import BaseImageProcessor

# Not from `transformers`, which says in some versions that this name needs torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from triptych.core import EncodeUnit, Span, UnitHash
from triptych.errors import ConfigError, RequestError
from triptych.model.chat import ChatTemplate
from triptych.model.families import Family, ItemLayout, UnitLayout, family_for
from triptych.model.images import decode_image
from triptych.model.pixel_table import tabulate
from triptych.model.token_stream import TokenStream

HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every placeholder expanded. `units` are those of each item; spans count them through all items."""

    token_ids: list[int]
    units: tuple[tuple[UnitLayout, ...], ...] = ()
    spans: tuple[Span, ...] = ()


class Processor:
    """The processor of one checkpoint. Equal arguments give equal hashes in every process."""

    def __init__(
        self,
        family: Family,
        tokenizer: Tokenizer,
        image_processor: BaseImageProcessor,
        *,
        arguments: Mapping[str, Any],
        chat_template: str | None,
        eos_token_ids: frozenset[int],
        identity: str,
    ) -> None:
        self.family = family
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self._image_processor = image_processor
        self._images = family.image_layout(image_processor, tokenizer, arguments)
        self._chat = ChatTemplate(
            tokenizer,
            chat_template,
            markup=self._images.markup,
            reserved=family.reserved_texts(tokenizer) | {self._images.placeholder},
        )
        self.fingerprint = _fingerprint(image_processor, family.image_arguments, identity)

    @classmethod
    def load(cls, path: str | Path, *, revision: str = "") -> Self:
        """From a local folder. Raises ConfigError where a part is missing, or does not fit the others."""
        folder = Path(path)
        try:
            config = AutoConfig.from_pretrained(folder)
            family = family_for(config)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"model {folder}: {error}") from error
        if not tokenizer.is_fast:
            raise ConfigError(f"model {folder}: needs a tokenizer.json")
        _refuse_unembedded_tokens(folder, config, tokenizer)
        tokenizer.backend_tokenizer.no_truncation()  # some checkpoints were saved with either switched on
        tokenizer.backend_tokenizer.no_padding()
        tabulate(image_processor)
        return cls(
            family,
            tokenizer,
            image_processor,
            arguments=_read_json(folder / "processor_config.json"),
            chat_template=_chat_template(folder, tokenizer),
            eos_token_ids=_eos_token_ids(folder, config, tokenizer),
            identity=f"{folder.resolve()}@{revision}",
        )

    # ---- text, on the frontend

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, object] = MappingProxyType({}),
    ) -> str:
        """The prompt of a conversation in OpenAI's format, with one placeholder for each picture, in order.

        `variables` are the client's own for the template. Raises RequestError for those that would replace something
        of the server's, for what the template refuses, and for text that contains a placeholder itself.
        """
        return self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            tools=tools,
            variables=variables,
        )

    def expand(
        self, text: str, sizes: Sequence[tuple[int, int]] = (), *, add_special_tokens: bool | None = None
    ) -> Prompt:
        """Tokens of a prompt whose placeholders stand for pictures of these (width, height), in order.

        The ids are those that the family's own processor gives. By default the tokenizer adds its special tokens
        unless the text begins with the first of them already. Raises RequestError if placeholders and pictures do not
        match.
        """
        layouts = [self._images.lay_out(width, height) for width, height in sizes]
        parts = text.split(self._images.placeholder)
        if len(parts) - 1 != len(layouts):
            raise RequestError(
                f"the prompt has {len(parts) - 1} placeholders for {len(layouts)} pictures",
                code="placeholder_mismatch",
            )
        compact = parts[0] + "".join(layout.compact + part for layout, part in zip(layouts, parts[1:], strict=True))
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and compact.startswith(bos))
        return self._repeat(self.encode(compact, add_special_tokens=add_special_tokens), layouts)

    def from_token_ids(self, token_ids: Sequence[int]) -> Prompt:
        """A prompt that the client tokenised, without pictures. Raises RequestError for ids that no text has."""
        vocab_size = len(self.tokenizer)
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            raise RequestError(f"token ids must be between 0 and {vocab_size - 1}", param="prompt")
        return self._repeat(list(token_ids), [])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Plain tokens; placeholders are not expanded."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_stream(self) -> TokenStream:
        return TokenStream(self.tokenizer.backend_tokenizer)

    def _repeat(self, compact_ids: list[int], layouts: list[ItemLayout]) -> Prompt:
        """Writes every image token as often as its run is long, and notes which rows stand where."""
        image_token_id = self.family.image_token_id
        places = [index for index, token_id in enumerate(compact_ids) if token_id == image_token_id]
        runs = [length for layout in layouts for length in layout.runs]
        strangers = self.family.reserved_token_ids - {image_token_id}
        if len(places) != len(runs) or not strangers.isdisjoint(compact_ids):
            raise RequestError("the prompt contains tokens that stand for media", code="placeholder_mismatch")
        token_ids: list[int] = []
        starts: list[int] = []
        done = 0
        for place, length in zip(places, runs, strict=True):
            token_ids += compact_ids[done:place]
            starts.append(len(token_ids))
            token_ids += [image_token_id] * length
            done = place + 1
        token_ids += compact_ids[done:]
        units = tuple(layout.units for layout in layouts)
        return Prompt(token_ids, units, _spans(starts, runs, [unit.num_tokens for item in units for unit in item]))

    # ---- units, on the frontend

    def encode_units(self, prompt: Prompt, media_hashes: Sequence[bytes]) -> tuple[EncodeUnit, ...]:
        """The units of all items, in the order in which spans count them. One media hash per item."""
        return tuple(
            EncodeUnit(self.unit_hash(media_hash, index), "image", unit.num_tokens, unit.grid)
            for media_hash, units in zip(media_hashes, prompt.units, strict=True)
            for index, unit in enumerate(units)
        )

    def unit_hash(self, media_hash: bytes, index: int) -> UnitHash:
        """Over media bytes, processor arguments, model, revision and the unit's index within its item."""
        digest = hashlib.blake2b(self.fingerprint, digest_size=HASH_BYTES)
        digest.update(index.to_bytes(4, "little"))
        digest.update(media_hash)
        return UnitHash(digest.digest())

    # ---- media

    def pixels(self, data: bytes) -> dict[str, Tensor]:
        """What the model's get_image_features takes for one picture. Raises RequestError if it cannot be decoded."""
        image = decode_image(data)
        outputs = self._image_processor(images=[image], return_tensors="pt", **self.family.image_arguments)
        return {name: outputs[name] for name in self.family.tensors}


def _spans(starts: list[int], runs: list[int], unit_tokens: list[int]) -> tuple[Span, ...]:
    """The rows of the units fill the runs of placeholder tokens in order; a run may take the rows of several units."""
    spans: list[Span] = []
    unit = offset = 0
    for start, length in zip(starts, runs, strict=True):
        end = start + length
        while start < end:
            taken = min(end - start, unit_tokens[unit] - offset)
            spans.append(Span(start, taken, unit, offset))
            start, offset = start + taken, offset + taken
            if offset == unit_tokens[unit]:
                unit, offset = unit + 1, 0
    return tuple(spans)


def _fingerprint(image_processor: BaseImageProcessor, image_arguments: Mapping[str, object], identity: str) -> bytes:
    """128 bits over everything but the media that decides what an encoder makes of a picture."""
    text = json.dumps([image_processor.to_json_string(), dict(image_arguments), identity])
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def _refuse_unembedded_tokens(folder: Path, config: PreTrainedConfig, tokenizer: Tokenizer) -> None:
    """A token without a row in the embedding table would end the instance that meets it."""
    num_embeddings: int | None = getattr(config.get_text_config(), "vocab_size", None)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if num_embeddings is not None and num_tokens > num_embeddings:
        raise ConfigError(
            f"model {folder}: its tokenizer has {num_tokens} tokens, its text model only {num_embeddings} embeddings"
        )


def _eos_token_ids(folder: Path, config: PreTrainedConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """All tokens that end an answer: the tokenizer's, and those of generation_config.json (else of the config)."""
    named = config.get_text_config().eos_token_id
    if (folder / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    ids = {*(named if isinstance(named, list | tuple) else (named,)), tokenizer.eos_token_id}
    return frozenset(token_id for token_id in ids if token_id is not None)


def _chat_template(folder: Path, tokenizer: Tokenizer) -> str | None:
    """A processor's own template goes before the tokenizer's, which may know no pictures."""
    template: Any = tokenizer.chat_template
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "chat_template.json").is_file():
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, dict):
        template = template.get("default")
    return None if template is None else str(template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return content
