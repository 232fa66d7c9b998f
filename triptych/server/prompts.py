"""From messages, text or token ids to a prompt that can be sent: placeholders expanded, units hashed. No pixels."""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ParamSpec

from triptych.core import UnitHash
from triptych.errors import RequestError
from triptych.model.processor import Processor, Prompt
from triptych.server.frontend import PreparedPrompt
from triptych.server.media import MediaItem, MediaLoader
from triptych.server.schema import ChatMessage, ImagePart, TextPart

P = ParamSpec("P")

MAX_PROMPTS = 2048  # of one request
_LONG_TEXT = 20_000  # characters; tokenising more would hold up the event loop for more than some milliseconds
_PIECE_COST = 100  # what a message or a content part costs the template, counted in characters of text

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
    ) -> PreparedPrompt:
        """Raises RequestError naming the part of the messages that is to blame."""
        for index, message in enumerate(messages):
            if message.tool_calls:
                field = f"messages[{index}].tool_calls"
                raise RequestError(
                    f"{field} is not supported by this server", param=field, code="unsupported_parameter"
                )
        num_pieces = sum(1 + (len(m.content) if isinstance(m.content, list) else 0) for m in messages)
        if num_pieces > 2 * self._max_model_len:  # the template writes tokens around each
            raise self._too_long("messages", f"{num_pieces} messages and parts")
        items = await self._media.load(_image_sources(messages))
        return await self._in_thread_if_long(
            sum(map(_text_len, messages)) + _PIECE_COST * num_pieces,
            "messages",
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
        with _blamed("messages"):
            text = self._processor.render(
                [_for_template(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
            expanded = self._processor.expand(text, [(item.width, item.height) for item in items])
        return self._with_units(expanded, items)

    def _with_units(self, expanded: Prompt, items: list[MediaItem]) -> PreparedPrompt:
        units = self._processor.encode_units(expanded, [item.hash for item in items])
        media: dict[UnitHash, bytes] = {}
        fields: dict[UnitHash, str] = {}
        owners = (item for item, layouts in zip(items, expanded.units, strict=True) for _ in layouts)
        for unit, item in zip(units, owners, strict=True):
            media[unit.hash] = item.data
            fields.setdefault(unit.hash, item.field)
        return PreparedPrompt(expanded.token_ids, units, expanded.spans, media, fields)

    async def _text(self, text: str, add_special_tokens: bool, field: str) -> PreparedPrompt:
        return await self._in_thread_if_long(len(text), field, self._tokenize, text, add_special_tokens, field)

    def _tokenize(self, text: str, add_special_tokens: bool, field: str) -> PreparedPrompt:
        with _blamed(field):
            prompt = self._processor.expand(text, add_special_tokens=add_special_tokens)
        return self._without_units(prompt, field)

    def _from_token_ids(self, token_ids: list[int], field: str) -> PreparedPrompt:
        self.check_token_ids(token_ids, field)
        with _blamed(field):
            prompt = self._processor.from_token_ids(token_ids)
        return self._without_units(prompt, field)

    def _without_units(self, prompt: Prompt, field: str) -> PreparedPrompt:
        if not prompt.token_ids:
            raise RequestError(f"{field}: must not be empty", param=field, code="invalid_value")
        return PreparedPrompt(prompt.token_ids)

    async def _in_thread_if_long(
        self, num_characters: int, field: str, build: Callable[P, PreparedPrompt], *args: P.args, **kwargs: P.kwargs
    ) -> PreparedPrompt:
        if num_characters > self._max_characters:
            raise self._too_long(field, f"{num_characters} characters")
        if num_characters > _LONG_TEXT:
            return await asyncio.to_thread(build, *args, **kwargs)
        return build(*args, **kwargs)

    def _too_long(self, field: str, amount: str) -> RequestError:
        text = f"{field}: {amount} are more than this model's maximum context length of {self._max_model_len} tokens"
        return RequestError(text, param=field, code="context_length_exceeded")


@contextmanager
def _blamed(field: str) -> Iterator[None]:
    """Names `field` in errors that name none."""
    try:
        yield
    except RequestError as error:
        param = error.param or field
        raise RequestError(f"{param}: {error}", status=error.status, param=param, code=error.code) from error


def _image_sources(messages: Sequence[ChatMessage]) -> list[tuple[str, str]]:
    """(field, url) of each picture, in order."""
    return [
        (
            f"messages[{m}].content[{p}].image_url",
            part.image_url if isinstance(part.image_url, str) else part.image_url.url,
        )
        for m, message in enumerate(messages)
        if isinstance(message.content, list)
        for p, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def _text_len(message: ChatMessage) -> int:
    if isinstance(message.content, list):
        return sum(len(part.text) for part in message.content if isinstance(part, TextPart))
    return len(message.content or "")


def _for_template(message: ChatMessage) -> dict[str, object]:
    """As chat templates expect it. `developer` is OpenAI's newer word for `system`."""
    role = "system" if message.role == "developer" else message.role
    if not isinstance(message.content, list):
        return {"role": role, "content": message.content or ""}
    parts = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]
    return {"role": role, "content": parts}
