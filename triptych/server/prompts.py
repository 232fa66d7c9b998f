"""From messages, text or token ids to a prompt that can be sent: placeholders expanded, units hashed. No pixels."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec

import msgspec

from triptych.errors import RequestError
from triptych.model.headers import VideoHeader
from triptych.model.processor import Processor, Prompt
from triptych.router.generation import PreparedPrompt
from triptych.router.ledger import Reservation
from triptych.server.media import MediaItem, MediaLoader
from triptych.server.media_source import MediaSource
from triptych.server.parsing import blamed
from triptych.server.schema import (
    ChatMessage,
    ContentPart,
    InputAudio,
    MediaIoKwargs,
    MediaPart,
    MediaUrl,
    TextPart,
)
from triptych.server.threads import in_thread

P = ParamSpec("P")

MAX_PROMPTS = 2048  # of one request
MAX_VARIABLES_BYTES = 64 << 10  # of chat_template_kwargs, as JSON: in memory lists of nothing are twenty times as large
_LONG_TEXT = 20_000  # characters; tokenising more would hold up the event loop for more than some milliseconds
_PIECE_COST = 100  # what a message, a content part or a frame costs, counted in characters of text

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # the text of bytes that are no whole character
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece vocabularies spell a byte


def _byte_level_alphabet() -> dict[str, int]:
    """How byte-level vocabularies spell a byte: as itself where that prints in Latin-1, else from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class PromptBuilder:
    """Everything between the fields of a request and a `PreparedPrompt`."""

    def __init__(self, processor: Processor, media: MediaLoader, max_model_len: int) -> None:
        self._processor = processor
        self._media = media
        self._max_model_len = max_model_len
        # More characters than this cannot be few enough tokens, whatever the normaliser drops: not worth tokenising.
        longest_token = max(map(len, processor.tokenizer.get_vocab()))
        self._max_characters = 4 * longest_token * max_model_len

    async def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_variables: Mapping[str, object],
        media_options: MediaIoKwargs | None,
        reservation: Reservation,
    ) -> PreparedPrompt:
        """`reservation` grows by media that are not in the messages themselves. Raises RequestError naming the part of
        the messages that is to blame, or RequestError(503) where there is no room for media."""
        for index, message in enumerate(messages):
            if message.tool_calls:
                field = f"messages[{index}].tool_calls"
                raise RequestError(
                    f"{field} is not supported by this server", param=field, code="unsupported_parameter"
                )
        if len(msgspec.json.encode(template_variables)) > MAX_VARIABLES_BYTES:
            field = "chat_template_kwargs"
            raise RequestError(f"{field}: at most {MAX_VARIABLES_BYTES} bytes", param=field, code="invalid_value")
        num_pieces = sum(1 + (len(m.content) if isinstance(m.content, list) else 0) for m in messages)
        if num_pieces > 2 * self._max_model_len:  # the template writes tokens around each
            raise self._too_long("messages", f"{num_pieces} messages and parts")
        num_characters = sum(map(_text_len, messages)) + _PIECE_COST * num_pieces
        self._check_length(num_characters, "messages")
        items = await self._media.load(_sources(messages), reservation, media_options)
        num_frames = sum(len(item.header.frames) for item in items if isinstance(item.header, VideoHeader))
        return await _in_thread_if_long(
            num_characters + _PIECE_COST * num_frames,
            self._build_chat,
            messages,
            add_generation_prompt and not continue_final_message,
            continue_final_message,
            template_variables,
            items,
        )

    async def completion(
        self, prompt: str | list[str | int | list[int]], add_special_tokens: bool
    ) -> list[PreparedPrompt]:
        """One text, one list of token ids, or a list of either."""
        match prompt:
            case []:
                raise RequestError("prompt: must not be empty", param="prompt", code="invalid_value")
            case str():
                return [await self._text(prompt, add_special_tokens, "prompt")]
            case [*ids] if all(isinstance(token, int) for token in ids):
                return [self._from_token_ids([token for token in ids if isinstance(token, int)], "prompt")]
        if len(prompt) > MAX_PROMPTS:
            raise RequestError(f"prompt: at most {MAX_PROMPTS} prompts", param="prompt", code="invalid_value")
        prompts = []
        for index, one in enumerate(prompt):
            field = f"prompt[{index}]"
            if isinstance(one, int):
                raise RequestError(f"{field}: texts and token ids in one list", param=field, code="invalid_value")
            if isinstance(one, str):
                prompts.append(await self._text(one, add_special_tokens, field))
            else:
                prompts.append(self._from_token_ids(one, field))
        return prompts

    def text_of(self, token_ids: list[int], field: str) -> str:
        """Raises RequestError for an id that the vocabulary does not have."""
        self.check_token_ids(token_ids, field)
        return self._processor.decode(token_ids, skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        return self._processor.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the answer, also where it is a part of a character only."""
        text = self.token_text(token_id)
        if _REPLACEMENT not in text:
            return text.encode()
        (name,) = self.token_names([token_id])
        fallback = _BYTE_FALLBACK.fullmatch(name)
        if fallback is not None:
            return bytes.fromhex(fallback[1])
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return text.encode()

    def token_names(self, token_ids: list[int]) -> list[str]:
        """As the vocabulary spells them."""
        names: list[str] = self._processor.tokenizer.convert_ids_to_tokens(token_ids)
        return names

    def check_token_ids(self, token_ids: Sequence[int], field: str) -> None:
        """Raises RequestError naming the first id that the vocabulary does not have."""
        size = len(self._processor.tokenizer)
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < size:
                place = f"{field}[{index}]"
                raise RequestError(f"{place}: expected 0 to {size - 1}", param=place, code="invalid_value")

    # ---- inside

    def _build_chat(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, object],
        items: list[MediaItem],
    ) -> PreparedPrompt:
        with blamed("messages"):
            text = self._processor.render(
                [_for_template(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
            self._check_room(items)
            expanded = self._processor.expand(text, [(item.modality, item.header) for item in items])
        return self._with_units(expanded, items)

    def _check_room(self, items: Sequence[MediaItem]) -> None:
        """Before anything is expanded: a long video can be more tokens than the memory of this host holds."""
        counts = Counter(item.modality for item in items)
        num_tokens = 0
        for item in items:
            with blamed(item.field):
                layout = self._processor.modalities[item.modality].lay_out(item.header, counts[item.modality])
            num_tokens += sum(run.length for run in layout.runs)
        if num_tokens > self._max_model_len:
            raise self._too_long("messages", f"{num_tokens} tokens of media")

    def _with_units(self, expanded: Prompt, items: Sequence[MediaItem]) -> PreparedPrompt:
        media = self._processor.media(
            [(item.modality, item.header) for item in items], [(item.data, item.hash) for item in items]
        )
        fields: dict[bytes, str] = {}
        for one, item in zip(media, items, strict=True):
            fields.setdefault(one.hash, item.field)
        units = self._processor.encode_units(expanded, media)
        return PreparedPrompt(
            token_ids=expanded.token_ids,
            units=tuple(unit for unit, _ in units),
            spans=expanded.spans,
            position_arguments=expanded.position_arguments,
            media={unit.hash: one for unit, one in units},
            fields={unit.hash: fields[one.hash] for unit, one in units},
        )

    async def _text(self, text: str, add_special_tokens: bool, field: str) -> PreparedPrompt:
        self._check_length(len(text), field)
        return await _in_thread_if_long(len(text), self._tokenize, text, add_special_tokens, field)

    def _tokenize(self, text: str, add_special_tokens: bool, field: str) -> PreparedPrompt:
        with blamed(field):
            prompt = self._processor.expand(text, add_special_tokens=add_special_tokens)
        return self._without_units(prompt, field)

    def _from_token_ids(self, token_ids: list[int], field: str) -> PreparedPrompt:
        self.check_token_ids(token_ids, field)
        with blamed(field):
            prompt = self._processor.from_token_ids(token_ids)
        return self._without_units(prompt, field)

    def _without_units(self, prompt: Prompt, field: str) -> PreparedPrompt:
        if not prompt.token_ids:
            raise RequestError(f"{field}: must not be empty", param=field, code="invalid_value")
        return PreparedPrompt(prompt.token_ids)

    def _check_length(self, num_characters: int, field: str) -> None:
        if num_characters > self._max_characters:
            raise self._too_long(field, f"{num_characters} characters")

    def _too_long(self, field: str, amount: str) -> RequestError:
        text = f"{field}: {amount} are more than this model's maximum context length of {self._max_model_len} tokens"
        return RequestError(text, param=field, code="context_length_exceeded")


async def _in_thread_if_long(
    num_characters: int, build: Callable[P, PreparedPrompt], *args: P.args, **kwargs: P.kwargs
) -> PreparedPrompt:
    if num_characters > _LONG_TEXT:
        return await in_thread(build, *args, **kwargs)
    return build(*args, **kwargs)


def _sources(messages: Sequence[ChatMessage]) -> list[MediaSource]:
    """Of every media item, in order."""
    return [
        _source(f"messages[{m}].content[{p}].{part.kind}", part)
        for m, message in enumerate(messages)
        if isinstance(message.content, list)
        for p, part in enumerate(message.content)
        if isinstance(part, MediaPart)
    ]


def _source(field: str, part: MediaPart) -> MediaSource:
    """What is empty counts as left out, as with vLLM."""
    match getattr(part, part.kind):
        case MediaUrl(url=url) | (str() as url) if url:
            return MediaSource(field, part.MODALITY, url=url, uuid=part.uuid)
        case InputAudio(data=data) if data:
            return MediaSource(field, part.MODALITY, base64=data, uuid=part.uuid)
    return MediaSource(field, part.MODALITY, uuid=part.uuid)


def _text_len(message: ChatMessage) -> int:
    if isinstance(message.content, list):
        return sum(len(_text_of(part) or "") for part in message.content)
    return len(message.content or "")


def _for_template(message: ChatMessage) -> dict[str, object]:
    """As chat templates expect it. `developer` is OpenAI's newer word for `system`."""
    role = "system" if message.role == "developer" else message.role
    if not isinstance(message.content, list):
        return {"role": role, "content": message.content or ""}
    return {"role": role, "content": [_part_for_template(part) for part in message.content]}


def _part_for_template(part: ContentPart) -> dict[str, object]:
    if isinstance(part, MediaPart):
        return {"type": part.MODALITY}
    return {"type": "text", "text": _text_of(part)}


def _text_of(part: ContentPart) -> str | None:
    """None for media."""
    match part:
        case str():
            return part
        case TextPart(text=text):
            return text
    return None
