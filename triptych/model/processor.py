"""Everything between a request and a model's inputs: chat template, tokens, placeholders, media, unit hashes.

The frontend uses the half that decodes nothing: what an item becomes in the prompt follows from its header. Encode
instances use the other half. Knows no request, no server and no model weights.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from triptych.core import HASH_BYTES, EncodeUnit, Media, PositionArguments, Span, UnitHash
from triptych.errors import ConfigError, RequestError
from triptych.model.chat import ChatTemplate
from triptych.model.families import Family, ItemLayout, Modality, Parts, Run, answering_part, family_for
from triptych.model.headers import Header, VideoHeader
from triptych.model.token_stream import TokenStream

Item = tuple[str, Header]  # a media item as the prompt needs it: its modality, and what its header says


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every placeholder expanded. `layouts` are those of the placeholders, in the order of the text;
    `items` says which item each one stands for. Spans count the units through all layouts."""

    token_ids: list[int]
    layouts: tuple[ItemLayout, ...] = ()
    items: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    position_arguments: PositionArguments = field(default_factory=dict)


class Processor:
    """The processor of one checkpoint. Equal arguments give equal hashes in every process. `identity` is 128 bits over
    model and revision."""

    def __init__(
        self,
        family: Family,
        parts: Parts,
        *,
        chat_template: str | None,
        eos_token_ids: frozenset[int],
        identity: str,
    ) -> None:
        self.family = family
        self.tokenizer = parts.tokenizer
        self.eos_token_ids = eos_token_ids
        self.modalities: dict[str, Modality] = {modality.name: modality for modality in family.modalities(parts)}
        self._named = {modality.placeholder: modality.name for modality in self.modalities.values()}
        longest_first = sorted(self._named, key=len, reverse=True)
        self._placeholders = re.compile("|".join(map(re.escape, longest_first)))
        self._reserved_texts = family.reserved_texts(self.tokenizer)
        self._chat = ChatTemplate(
            self.tokenizer,
            chat_template,
            markup={name: modality.markup for name, modality in self.modalities.items()},
            reserved={
                *self._reserved_texts,
                *family.refused_texts(self.tokenizer),
                *(modality.placeholder for modality in self.modalities.values()),
            },
        )
        self._reserved_ids = frozenset(map(self.tokenizer.convert_tokens_to_ids, self._reserved_texts))
        self.identity = _digest(b"model", identity.encode())
        self._fingerprints = {
            name: _digest(self.identity, name.encode(), modality.arguments.encode())
            for name, modality in self.modalities.items()
        }

    @classmethod
    def load(cls, path: str | Path, *, revision: str = "") -> Self:
        """From a local folder. Raises ConfigError where a part is missing, or does not fit the others."""
        folder = Path(path)
        try:
            config = answering_part(AutoConfig.from_pretrained(folder))
            family = family_for(config)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"model {folder}: {error}") from error
        if not tokenizer.is_fast:
            raise ConfigError(f"model {folder}: needs a tokenizer.json")
        _refuse_unembedded_tokens(folder, config, tokenizer)
        tokenizer.backend_tokenizer.no_truncation()  # some checkpoints were saved with either switched on
        tokenizer.backend_tokenizer.no_padding()
        parts = Parts(folder, tokenizer)
        return cls(
            family,
            parts,
            chat_template=_chat_template(parts),
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

    def expand(self, text: str, items: Sequence[Item] = (), *, add_special_tokens: bool | None = None) -> Prompt:
        """Tokens of a prompt whose placeholders stand for these items: the first one for pictures for the first
        picture, and so on.

        The ids are those that the family's own processor gives. By default the tokenizer adds its special tokens
        unless the text begins with the first of them already. Raises RequestError if placeholders and items do not
        match.
        """
        texts, names = self._split(text)
        order = _order(names, items)
        counts = Counter(names)
        layouts = [
            self.modalities[name].lay_out(items[item][1], counts[name]) for name, item in zip(names, order, strict=True)
        ]
        compact = texts[0] + "".join(layout.compact + part for layout, part in zip(layouts, texts[1:], strict=True))
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and compact.startswith(bos))
        return self._repeat(self.encode(compact, add_special_tokens=add_special_tokens), layouts, order)

    def from_token_ids(self, token_ids: Sequence[int]) -> Prompt:
        """A prompt that the client tokenised, without pictures. Raises RequestError for ids that no text has."""
        vocab_size = len(self.tokenizer)
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            raise RequestError(f"token ids must be between 0 and {vocab_size - 1}", param="prompt")
        return self._repeat(list(token_ids), [], [])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Plain tokens; placeholders are not expanded."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_stream(self) -> TokenStream:
        return TokenStream(self.tokenizer.backend_tokenizer)

    def _split(self, text: str) -> tuple[list[str], list[str]]:
        """The texts around the placeholders, and the modality of each placeholder."""
        if not self._named:
            return [text], []
        names = [self._named[found] for found in self._placeholders.findall(text)]
        return self._placeholders.split(text), names

    def _repeat(self, compact_ids: list[int], layouts: list[ItemLayout], order: list[int]) -> Prompt:
        """Writes every placeholder token as often as its run is long, and notes which rows stand where."""
        runs = [run for layout in layouts for run in layout.runs]
        run_ids = [self.tokenizer.convert_tokens_to_ids(run.token) for run in runs]
        reserved = self._reserved_ids.union(run_ids)
        places = [index for index, token_id in enumerate(compact_ids) if token_id in reserved]
        if [compact_ids[place] for place in places] != run_ids:
            raise RequestError("the prompt contains tokens that stand for media", code="placeholder_mismatch")
        token_ids: list[int] = []
        starts: list[int] = []
        done = 0
        for place, run in zip(places, runs, strict=True):
            token_ids += compact_ids[done:place]
            starts.append(len(token_ids))
            token_ids += [compact_ids[place]] * run.length
            done = place + 1
        token_ids += compact_ids[done:]
        arguments: PositionArguments = {}
        for layout in layouts:
            for name, value in layout.positions.items():
                arguments.setdefault(name, []).append(value)
        spans = tuple(_spans(starts, runs, layouts))
        return Prompt(token_ids, tuple(layouts), tuple(order), spans, arguments)

    # ---- units, on the frontend

    def media(self, items: Sequence[Item], files: Sequence[tuple[bytes, bytes]]) -> list[Media]:
        """The items of one prompt as the encoder gets them. `files`: the bytes of each, and 128 bits over them."""
        counts = Counter(name for name, _ in items)
        media = []
        for (name, header), (data, data_hash) in zip(items, files, strict=True):
            frames, fps = (header.frames, header.fps) if isinstance(header, VideoHeader) else ((), 0.0)
            num_items = counts[name] if self.modalities[name].depends_on_num_items else 1
            shown = f"{frames} {fps} {num_items}"  # where a frame stands in time decides its positions
            hash_ = _digest(self._fingerprints[name], data_hash, shown.encode())
            media.append(Media(hash_, name, data, frames, num_items))
        return media

    def encode_units(self, prompt: Prompt, media: Sequence[Media]) -> list[tuple[EncodeUnit, Media]]:
        """The units that the spans of a prompt count, each with its item. `media` are the items in their own order.

        A hash covers bytes, processor arguments, model, revision, and the unit's index within its item.
        """
        units = []
        for layout, item in zip(prompt.layouts, prompt.items, strict=True):
            for index, num_tokens in enumerate(layout.units):
                hash_ = UnitHash(_digest(media[item].hash, index.to_bytes(4, "little")))
                units.append((EncodeUnit(hash_, media[item].modality, num_tokens, index), media[item]))
        return units

    # ---- units, on encode instances

    def prepare(self, media: Media) -> Any:
        """The decoded item, for `inputs`. Raises RequestError if it cannot be decoded."""
        return self.modalities[media.modality].prepare(media)

    def inputs(self, media: Media, prepared: Any, index: int) -> dict[str, Tensor]:
        """What `features` takes for one unit of an item."""
        return self.modalities[media.modality].inputs(prepared, index)

    def features(self, modality: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """[rows of all units of a batch, row width]."""
        return self.modalities[modality].features(model, inputs)


def _spans(starts: list[int], runs: list[Run], layouts: list[ItemLayout]) -> Iterator[Span]:
    """The rows that layouts name fill the runs of placeholder tokens in order, without a gap."""
    rows: list[tuple[int, int, int]] = []  # (unit, counted through all items; offset; length)
    num_units = 0
    for layout in layouts:
        rows += [(num_units + row.unit, row.offset, row.length) for row in layout.rows]
        num_units += len(layout.units)
    rows.reverse()
    for start, run in zip(starts, runs, strict=True):
        end = start + run.length
        while start < end:
            unit, offset, length = rows.pop()
            taken = min(end - start, length)
            yield Span(start, taken, unit, offset)
            start += taken
            if taken < length:
                rows.append((unit, offset + taken, length - taken))


def _order(names: Sequence[str], items: Sequence[Item]) -> list[int]:
    """Which item each placeholder stands for. A template may change the order of a conversation between modalities, but
    never within one."""
    wanted, given = Counter(names), Counter(name for name, _ in items)
    if wanted != given:
        raise RequestError(
            f"the prompt has placeholders for {_counts(wanted)}, but {_counts(given)} came with it",
            code="placeholder_mismatch",
        )
    queues = {name: iter([index for index, (kind, _) in enumerate(items) if kind == name]) for name in given}
    return [next(queues[name]) for name in names]


def _digest(*parts: bytes) -> bytes:
    """128 bits over the parts, each with its length, so that no two lists of parts run together to the same bytes."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _counts(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name}(s)" for name, count in sorted(names.items())) or "no media"


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


def _chat_template(parts: Parts) -> str | None:
    """A processor's own template goes before the tokenizer's, which may know no pictures."""
    template: Any = parts.tokenizer.chat_template
    if (parts.folder / "chat_template.jinja").is_file():
        template = (parts.folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (parts.folder / "chat_template.json").is_file():
        template = parts.read_json("chat_template.json").get("chat_template")
    if isinstance(template, dict):
        template = template.get("default")
    return None if template is None else str(template)
