"""The OpenAI spellings of an answer: one class for chat completions, one for completions. Knows no HTTP.

Each makes a whole response from finished outputs, or chunks from outputs that have something new.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from msgspec import UNSET, Struct, UnsetType

from triptych.core import TokenLogprobs
from triptych.router.generation import Generation
from triptych.router.output import Output
from triptych.server.schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatResponse,
    ChatTokenLogprob,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    Delta,
    PromptTokensDetails,
    StreamOptions,
    TopLogprob,
    Usage,
)

ScoredTokens = list[tuple[int, TokenLogprobs]]


class TokenText(Protocol):
    """The text of a single token, as log-probabilities show it."""

    def __call__(self, token_id: int, /) -> str: ...


class Vocabulary(Protocol):
    """Single tokens, as log-probabilities show them. The text of half a character is a replacement character."""

    def token_text(self, token_id: int, /) -> str: ...

    def token_bytes(self, token_id: int, /) -> bytes: ...


class Answer(Protocol):
    """How one generation is written down."""

    def chunks(self, generation: Generation, output: Output) -> Iterator[Struct]:
        """What is new about `output` since the last call; possibly nothing."""
        ...

    def last_chunk(self, generation: Generation) -> Struct | None:
        """The usage chunk, if it was asked for."""
        ...

    def whole(self, generation: Generation) -> Struct: ...


class ChatAnswer:
    def __init__(self, request_id: str, model: str, vocabulary: Vocabulary, options: StreamOptions | None) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._model = model
        self._vocabulary = vocabulary
        self._usage = _StreamUsage(options)
        self._began: set[int] = set()  # choices whose role was sent

    def chunks(self, generation: Generation, output: Output) -> Iterator[ChatChunk]:
        if output.index not in self._began:
            self._began.add(output.index)
            yield self._chunk(generation, ChatChunkChoice(output.index, Delta("assistant", "")))
        text, tokens = output.take_text(), output.take_tokens()
        if not text and not tokens and output.finish is None:
            return
        logprobs = self._logprobs(tokens) if tokens else None
        if output.finish is None:
            yield self._chunk(generation, ChatChunkChoice(output.index, Delta(None, text), logprobs))
            return
        if text or tokens:
            yield self._chunk(generation, ChatChunkChoice(output.index, Delta(None, text), logprobs))
        last = ChatChunkChoice(output.index, Delta(), None, output.finish.value, output.stop_reason)
        yield self._chunk(generation, last)

    def last_chunk(self, generation: Generation) -> ChatChunk | None:
        if not self._usage.at_the_end:
            return None
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage_of(generation))

    def whole(self, generation: Generation) -> ChatResponse:
        return ChatResponse(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(output) for output in generation.outputs],
            usage=usage_of(generation),
        )

    def _chunk(self, generation: Generation, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[choice],
            usage=self._usage.of_chunk(generation),
        )

    def _choice(self, output: Output) -> ChatChoice:
        assert output.finish is not None, f"choice {output.index} is not finished"
        tokens = output.take_tokens()
        return ChatChoice(
            output.index,
            AnswerMessage("assistant", output.take_text()),
            output.finish.value,
            self._logprobs(tokens) if output.sampling.logprobs is not None else None,
            output.stop_reason,
        )

    def _logprobs(self, tokens: ScoredTokens) -> ChatLogprobs:
        return ChatLogprobs([self._token_logprob(token_id, scores) for token_id, scores in tokens])

    def _token_logprob(self, token_id: int, scores: TokenLogprobs) -> ChatTokenLogprob:
        text, spelling = self._vocabulary.token_text, self._vocabulary.token_bytes
        top = [
            TopLogprob(text(other), logprob, list(spelling(other)))
            for other, logprob in zip(scores.top_ids, scores.top_logprobs, strict=True)
        ]
        return ChatTokenLogprob(text(token_id), scores.logprob, list(spelling(token_id)), top)


class CompletionAnswer:
    def __init__(
        self,
        request_id: str,
        model: str,
        token_text: TokenText,
        options: StreamOptions | None,
        echo: Sequence[str] | None = None,
    ) -> None:
        """`echo`: the text of each prompt, to be said before the answer."""
        self._id = f"cmpl-{request_id}"
        self._created = int(time.time())
        self._model = model
        self._token_text = token_text
        self._usage = _StreamUsage(options)
        self._echo = echo
        self._num_shown: dict[int, int] = {}  # characters of each choice so far: where its next token begins

    def chunks(self, generation: Generation, output: Output) -> Iterator[CompletionResponse]:
        choice = self._choice(generation, output)
        if choice.text or choice.logprobs is not None or choice.finish_reason is not None:
            yield self._response([choice], self._usage.of_chunk(generation))

    def last_chunk(self, generation: Generation) -> CompletionResponse | None:
        return self._response([], usage_of(generation)) if self._usage.at_the_end else None

    def whole(self, generation: Generation) -> CompletionResponse:
        choices = [self._choice(generation, output) for output in generation.outputs]
        return self._response(choices, usage_of(generation))

    def _response(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> CompletionResponse:
        return CompletionResponse(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, generation: Generation, output: Output) -> CompletionChoice:
        text, tokens = output.take_text(), output.take_tokens()
        if self._echo is not None and output.index not in self._num_shown:
            text = self._echo[generation.prompt_index(output)] + text
        logprobs = self._logprobs(tokens, self._num_shown.get(output.index, 0)) if tokens else None
        self._num_shown[output.index] = self._num_shown.get(output.index, 0) + len(text)
        finish = None if output.finish is None else output.finish.value
        return CompletionChoice(output.index, text, logprobs, finish, output.stop_reason)

    def _logprobs(self, tokens: ScoredTokens, offset: int) -> CompletionLogprobs:
        names = [self._token_text(token_id) for token_id, _ in tokens]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        top: list[dict[str, float] | None] = []
        for name, (_, scores) in zip(names, tokens, strict=True):
            others = map(self._token_text, scores.top_ids)
            top.append({**dict(zip(others, scores.top_logprobs, strict=True)), name: scores.logprob})
        return CompletionLogprobs(offsets, [scores.logprob for _, scores in tokens], names, top)


class _StreamUsage:
    """Which chunks of a stream carry usage: all, none, or one of their own at the end."""

    def __init__(self, options: StreamOptions | None) -> None:
        self.at_the_end = bool(options and options.include_usage)
        self._in_each = bool(options and options.include_usage and options.continuous_usage_stats)

    def of_chunk(self, generation: Generation) -> Usage | UnsetType | None:
        if self._in_each:
            return usage_of(generation)
        return None if self.at_the_end else UNSET


def usage_of(generation: Generation) -> Usage:
    prompt, output = generation.num_prompt_tokens, generation.num_output_tokens
    return Usage(prompt, output, prompt + output, PromptTokensDetails(_num_cached_tokens(generation)))


def _num_cached_tokens(generation: Generation) -> int:
    """Of each prompt as its first choice found it: the other choices find what that one has just computed."""
    num_choices = len(generation.outputs) // len(generation.prompts)
    return sum(output.num_cached_tokens for output in generation.outputs[::num_choices])
