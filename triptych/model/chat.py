"""From a conversation in OpenAI's format to the text of a prompt, by the checkpoint's own chat template."""

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from triptych.errors import RequestError

_PROBE = "f3a1c0"  # a text that a template can only have from the message
_PROBE_PART = {"type": "text", "text": _PROBE}
_MODALITIES = {  # of content parts, by their type
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}

# What a template raises on messages that it was not made for: a refusal of its own, or a wrong guess about their shape.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)

# Names that variables of a client cannot have: the code between here and the template would take them for its own.
_TAKEN_NAMES = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"} | {
    "messages",
    "conversations",
}

Message = dict[str, Any]


@dataclass(frozen=True)
class _Takes:
    """In which form a template reads the content of a message."""

    text: bool
    parts: bool
    modalities: frozenset[str]  # whose parts it writes something for


class ChatTemplate:
    """Renders conversations. `markup` is, by modality, what stands for an item in templates that take no content parts,
    or none of that modality: modalities that it does not have are refused. `reserved` are texts that stand for media
    and are therefore refused in what a client wrote.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        *,
        markup: Mapping[str, str],
        reserved: Collection[str],
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._markup = dict(markup)
        self._reserved = tuple(sorted(reserved))
        self._takes = lru_cache(16)(self._probe)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, object],
    ) -> str:
        template = chat_template or self._template
        if template is None:
            raise RequestError("the model has no chat template, so it takes no messages", param="messages")
        for name in variables:
            if name in _TAKEN_NAMES:
                field = f"chat_template_kwargs.{name}"
                raise RequestError(f"{field} cannot be set here", param=field, code="unsupported_parameter")
        arguments = {
            **variables,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
        }
        takes = self._takes(template)
        conversation = [self._message(message, takes, f"messages[{i}]") for i, message in enumerate(messages)]
        try:
            return self._apply(template, conversation, arguments)
        except _TEMPLATE_ERRORS as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error

    def _apply(self, template: str, conversation: list[Message], arguments: Mapping[str, Any]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, **arguments
        )
        return text

    def _probe(self, template: str) -> _Takes:
        """Finds out by trying: some templates drop plain text silently, others print parts as Python writes them."""
        return _Takes(
            text=self._keeps(template, _PROBE),
            parts=self._keeps(template, [_PROBE_PART]),
            modalities=frozenset(name for name in self._markup if self._writes(template, name)),
        )

    def _keeps(self, template: str, content: str | list[Message]) -> bool:
        text = self._try(template, content)
        return text is not None and _PROBE in text and repr(content) not in text

    def _writes(self, template: str, modality: str) -> bool:
        """Whether a part of that modality leaves a mark: some templates know fewer of them than their model."""
        text = self._try(template, [{"type": modality}, _PROBE_PART])
        return text is not None and text != self._try(template, [_PROBE_PART])

    def _try(self, template: str, content: str | list[Message]) -> str | None:
        try:
            return self._apply(template, [{"role": "user", "content": content}], {"add_generation_prompt": True})
        except _TEMPLATE_ERRORS:
            return None

    def _message(self, message: Mapping[str, Any], takes: _Takes, field: str) -> Message:
        """A message as the template wants it: without absent fields, its content in the form that is read."""
        present = {name: value for name, value in message.items() if value is not None}
        if "tool_calls" in present:
            present["tool_calls"] = [_with_parsed_arguments(call) for call in present["tool_calls"]]
        if "content" in present:
            present["content"] = self._content(present["content"], takes, f"{field}.content")
        return present

    def _content(self, content: object, takes: _Takes, field: str) -> str | list[Message]:
        if isinstance(content, str):
            self._refuse_reserved(content, field)
            return content if takes.text or not takes.parts else [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise RequestError("expected a text or a list of parts", param=field)
        parts = [self._part(part, f"{field}[{i}]") for i, part in enumerate(content)]
        if takes.parts:
            return [part if part["type"] in ("text", *takes.modalities) else self._as_text(part) for part in parts]
        media = [self._markup[part["type"]] for part in parts if part["type"] != "text"]
        return "\n".join([*media, *(part["text"] for part in parts if part["type"] == "text")])

    def _part(self, part: object, field: str) -> Message:
        kind = part.get("type") if isinstance(part, Mapping) else None
        modality = _MODALITIES.get(kind) if isinstance(kind, str) else None
        if modality in self._markup:
            return {"type": modality}
        if not isinstance(part, Mapping) or kind != "text":
            raise RequestError(f"content parts of type {kind!r} are not supported", param=f"{field}.type")
        text = part.get("text")
        if not isinstance(text, str):
            raise RequestError("expected a text", param=f"{field}.text")
        self._refuse_reserved(text, f"{field}.text")
        return {"type": "text", "text": text}

    def _as_text(self, part: Message) -> Message:
        return {"type": "text", "text": self._markup[part["type"]]}

    def _refuse_reserved(self, text: str, field: str) -> None:
        for token in self._reserved:
            if token in text:
                raise RequestError(f"{token!r} stands for media and cannot be part of a text", param=field)


def _with_parsed_arguments(call: object) -> object:
    """Templates print the arguments of a tool call from an object; clients send them as a JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except ValueError:
        return call
