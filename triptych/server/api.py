"""The routes of generation: chat completions, completions, tokenize, detokenize, models."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from triptych.config import ServerConfig
from triptych.core import SamplingParams
from triptych.errors import RequestError
from triptych.router.generation import Generation, PreparedPrompt
from triptych.router.waiting import Kind
from triptych.server.answers import Answer, ChatAnswer, CompletionAnswer
from triptych.server.frontend import Frontend
from triptych.server.http import Exchange, encode_json
from triptych.server.parsing import check_supported, decode_body, unsupported
from triptych.server.prompts import MAX_PROMPTS, PromptBuilder
from triptych.server.sampling import sampling_params, stop_strings
from triptych.server.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    GenerateRequest,
    MediaPart,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)

_TOKEN_BYTES = 5  # of a token id in a message, at most
_ORDERS_PER_BODY = 4  # bytes sent to instances for a request, as a multiple of the largest body


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a request for an answer says about it, but for prompt and sampling."""

    num_choices: int
    stop: tuple[str, ...]
    stream: bool
    deadline: float | None


class Api:
    """Handlers that share the frontend, the prompt builder and the limits."""

    def __init__(
        self,
        frontend: Frontend,
        prompts: PromptBuilder,
        config: ServerConfig,
        *,
        max_model_len: int,
        model_root: str,
    ) -> None:
        self._frontend = frontend
        self._prompts = prompts
        self._config = config
        self._max_model_len = max_model_len
        self._model_root = model_root
        self._created = int(time.time())

    async def chat_completions(self, exchange: Exchange) -> None:
        request = decode_body(await self._body(exchange), ChatRequest)
        check_supported(request)
        model = self._served_model(request.model)
        terms = self._terms(exchange, request)
        async with exchange.watched():
            async with self._admitted(_kind(request.messages), terms.deadline):
                prompt = await self._prompts.chat(
                    request.messages,
                    add_generation_prompt=request.add_generation_prompt is not False,
                    continue_final_message=bool(request.continue_final_message),
                    template_variables=request.chat_template_kwargs or {},
                    media_options=request.media_io_kwargs,
                    reservation=exchange.reservation,
                )
            sampling = sampling_params(
                request,
                num_prompt_tokens=len(prompt.token_ids),
                max_model_len=self._max_model_len,
                max_tokens=request.max_completion_tokens or request.max_tokens,
                max_tokens_field="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
                logprobs=_chat_logprobs(request),
                prompt_field="messages",
            )
            answer = ChatAnswer(exchange.request_id, model, self._prompts, request.stream_options)
            del request  # an answer may take long, and the text that media came in is large
            await self._answer(exchange, terms, answer, [prompt], [sampling])

    async def completions(self, exchange: Exchange) -> None:
        request = decode_body(await self._body(exchange), CompletionRequest)
        check_supported(request)
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise unsupported("best_of", "only the value of n is")
        model = self._served_model(request.model)
        terms = self._terms(exchange, request)
        async with exchange.watched():
            async with self._admitted(Kind.TEXT, terms.deadline):
                prompts = await self._prompts.completion(request.prompt, request.add_special_tokens is not False)
            samplings = [
                sampling_params(
                    request,
                    num_prompt_tokens=len(prompt.token_ids),
                    max_model_len=self._max_model_len,
                    max_tokens=16 if request.max_tokens is None else request.max_tokens,  # OpenAI's default
                    logprobs=request.logprobs,
                    prompt_field="prompt",
                )
                for prompt in prompts
            ]
            echo = [self._prompts.text_of(prompt.token_ids, "prompt") for prompt in prompts] if request.echo else None
            if request.echo and request.logprobs is not None:
                raise unsupported("echo", "together with logprobs")
            answer = CompletionAnswer(
                exchange.request_id, model, self._prompts.token_text, request.stream_options, echo
            )
            del request  # an answer may take long
            await self._answer(exchange, terms, answer, prompts, samplings)

    async def tokenize(self, exchange: Exchange) -> None:
        request = decode_body(await exchange.body(self._config.max_body_bytes), TokenizeRequest)
        self._served_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("exactly one of prompt and messages is required", param="prompt", code="missing_field")
        async with exchange.watched():
            if request.messages is None:
                assert request.prompt is not None
                (prompt,) = await self._prompts.completion(request.prompt, request.add_special_tokens is not False)
            else:
                prompt = await self._prompts.chat(
                    request.messages,
                    add_generation_prompt=request.add_generation_prompt is not False,
                    continue_final_message=bool(request.continue_final_message),
                    template_variables=request.chat_template_kwargs or {},
                    media_options=request.media_io_kwargs,
                    reservation=exchange.reservation,
                )
        tokens = prompt.token_ids
        names = self._prompts.token_names(tokens) if request.return_token_strs else None
        await exchange.json(TokenizeResponse(len(tokens), self._max_model_len, tokens, names))

    async def detokenize(self, exchange: Exchange) -> None:
        request = decode_body(await exchange.body(self._config.max_body_bytes), DetokenizeRequest)
        self._served_model(request.model)
        await exchange.json(DetokenizeResponse(self._prompts.text_of(request.tokens, "tokens")))

    async def models(self, exchange: Exchange) -> None:
        await exchange.json(ModelList(data=[self._card(name) for name in self._config.served_model_names]))

    async def model(self, exchange: Exchange) -> None:
        await exchange.json(self._card(self._served_model(exchange.scope["path_params"]["model"])))

    async def _answer(
        self,
        exchange: Exchange,
        terms: _Terms,
        answer: Answer,
        prompts: Sequence[PreparedPrompt],
        samplings: Sequence[SamplingParams],
    ) -> None:
        self._check_order_size(prompts, terms.num_choices)
        async with self._frontend.generate(
            prompts,
            samplings,
            terms.num_choices,
            terms.stop,
            arrived_at=exchange.arrived_at,
            deadline=terms.deadline,
            reservation=exchange.reservation,
        ) as generation:
            if terms.stream:
                await _stream(exchange, generation, answer)
            else:
                await generation.wait()
                await exchange.json(answer.whole(generation))

    async def _body(self, exchange: Exchange) -> bytes:
        """Of a request for an answer, which is refused before it is read where none can be given."""
        self._frontend.check_open()
        async with self._in_time(exchange.deadline()):
            return await exchange.body(self._config.max_body_bytes)

    @asynccontextmanager
    async def _admitted(self, kind: Kind, deadline: float | None) -> AsyncIterator[None]:
        """Inside, the prompt of a request is made, which may take a while where media are fetched: only where it can be
        answered afterwards, and in time."""
        self._frontend.check_admission(kind, deadline)
        async with self._in_time(deadline):
            yield

    @asynccontextmanager
    async def _in_time(self, deadline: float | None) -> AsyncIterator[None]:
        """Raises RequestError(504) at the deadline, whatever is waited for inside."""
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._frontend.too_late() from None

    def _terms(self, exchange: Exchange, request: GenerateRequest) -> _Terms:
        """Raises RequestError for a stop string, or a stop token, that can never come."""
        self._prompts.check_token_ids(request.stop_token_ids or (), "stop_token_ids")
        deadline = exchange.deadline(request.timeout)
        return _Terms(request.n or 1, stop_strings(request), bool(request.stream), deadline)

    def _check_order_size(self, prompts: Sequence[PreparedPrompt], num_choices: int) -> None:
        """Every choice is an order of its own, with all tokens: a small request must not become a flood of bytes."""
        if len(prompts) * num_choices > MAX_PROMPTS:
            text = f"n: {len(prompts)} prompts with {num_choices} choices are more than {MAX_PROMPTS} sequences"
            raise RequestError(text, param="n", code="invalid_value")
        order_bytes = sum(_TOKEN_BYTES * len(prompt.token_ids) for prompt in prompts)
        limit = _ORDERS_PER_BODY * self._config.max_body_bytes
        if num_choices > 1 and num_choices * order_bytes > limit:
            most = max(limit // order_bytes, 1)
            raise RequestError(
                f"n: {num_choices} choices of a request of this size are too many; at most {most}",
                param="n",
                code="invalid_value",
            )

    def _served_model(self, name: str | None) -> str:
        if name is None:
            return self._config.served_model_names[0]
        if name not in self._config.served_model_names:
            raise RequestError(
                f"the model {name!r} does not exist; served are {', '.join(self._config.served_model_names)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name

    def _card(self, name: str) -> ModelCard:
        return ModelCard(id=name, created=self._created, root=self._model_root, max_model_len=self._max_model_len)


async def _stream(exchange: Exchange, generation: Generation, answer: Answer) -> None:
    """Server-sent events. The status line waits for the first token: what fails before it gets a proper status."""
    begun = False
    async for changed in generation:
        chunks = [encode_json(chunk) for output in changed for chunk in answer.chunks(generation, output)]
        if not chunks:
            continue
        if not begun:
            await exchange.begin_stream()
            begun = True
        await exchange.write(b"data: " + b"\n\ndata: ".join(chunks) + b"\n\n")
    last = answer.last_chunk(generation)
    usage = b"" if last is None else b"data: " + encode_json(last) + b"\n\n"
    await exchange.write(usage + b"data: [DONE]\n\n", more=False)


def _kind(messages: Iterable[ChatMessage]) -> Kind:
    parts = (part for message in messages if isinstance(message.content, list) for part in message.content)
    return Kind.of(part.MODALITY for part in parts if isinstance(part, MediaPart))


def _chat_logprobs(request: ChatRequest) -> int | None:
    """How many alternatives to report per token, None for no log-probabilities at all."""
    if not request.logprobs:
        if request.top_logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs", code="invalid_value")
        return None
    return request.top_logprobs or 0
