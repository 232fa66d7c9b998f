"""From the fields of a request to the sampling parameters that travel to the instances."""

import secrets

from triptych.core import SamplingParams
from triptych.errors import RequestError
from triptych.server.schema import MAX_SEED, GenerateRequest

# Text of every token is compared with each of them, and with each beginning of each of them.
MAX_STOPS = 128
MAX_STOP_CHARACTERS = 16_384  # of all together

_GREEDY_BELOW = 1e-5  # dividing logits by less overflows in half precision; vLLM draws the line at the same place


def sampling_params(
    request: GenerateRequest,
    *,
    num_prompt_tokens: int,
    max_model_len: int,
    max_tokens: int | None,
    max_tokens_field: str = "max_tokens",
    logprobs: int | None,
    prompt_field: str,
) -> SamplingParams:
    """Raises RequestError if prompt and answer together are longer than the model can take.

    `max_tokens` None: as many as there is room for. The seed is drawn here, so that a retry elsewhere gives the same.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise RequestError(
            f"{prompt_field}: this model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{num_prompt_tokens} and the answer needs at least one; please shorten the prompt",
            param=prompt_field,
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise RequestError(
            f"{max_tokens_field}: this model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{num_prompt_tokens} and the answer was to have {max_tokens} ({max_tokens} > {max_model_len} - "
            f"{num_prompt_tokens}); please lower one of them",
            param=max_tokens_field,
            code="context_length_exceeded",
        )
    max_tokens = room if max_tokens is None else max_tokens
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens: {min_tokens} is more than max_tokens, {max_tokens}", param="min_tokens", code="invalid_value"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbelow(MAX_SEED) if request.seed is None else request.seed,
        temperature=_temperature(request),
        top_p=_default(request.top_p, 1.0),
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_default(request.repetition_penalty, 1.0),
        logprobs=logprobs,
    )


def stop_strings(request: GenerateRequest) -> tuple[str, ...]:
    """Raises RequestError for an empty one, which would stop everything, and for more than can be looked for."""
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stops) > MAX_STOPS or sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        text = f"stop: at most {MAX_STOPS} texts, and {MAX_STOP_CHARACTERS} characters together"
        raise RequestError(text, param="stop", code="invalid_value")
    for index, stop in enumerate(stops):
        if not stop:
            field = "stop" if isinstance(request.stop, str) else f"stop[{index}]"
            raise RequestError(f"{field}: must not be empty", param=field, code="invalid_value")
    return stops


def _temperature(request: GenerateRequest) -> float:
    temperature = _default(request.temperature, 1.0)
    return 0.0 if temperature < _GREEDY_BELOW else temperature


def _default(value: float | None, default: float) -> float:
    return default if value is None else value
