"""What a message must be in itself, beyond the types of its fields: one that contradicts itself never gets to a stage.

Whoever sends is trusted; this is for the day on which it has a bug, so that one request suffers and not an instance.
"""

import math
from collections.abc import Iterator
from functools import singledispatch

from triptych.core import EncodeUnit, SamplingParams
from triptych.messages import AnyMessage, Embedded, Encode, Load, Prefilled, Prefilling, Share, Submit, Ticket


def contradiction(message: AnyMessage) -> str | None:
    """What is wrong with a message, None if nothing is."""
    return next(_contradictions(message), None)


@singledispatch
def _contradictions(message: object) -> Iterator[str]:
    yield from ()


@_contradictions.register
def _(message: Submit) -> Iterator[str]:
    num_tokens = len(message.token_ids)
    if not 1 <= message.num_prompt_tokens <= num_tokens:
        yield f"{message.num_prompt_tokens} of {num_tokens} tokens are its prompt"
    yield from _of_sampling(message.sampling)
    yield from _of_units(message.units)
    for span in message.spans:
        if not 0 <= span.unit < len(message.units):
            yield f"a span of unit {span.unit} of {len(message.units)}"
            return
        rows = message.units[span.unit].num_tokens
        if not 0 <= span.offset <= span.offset + span.length <= rows:
            yield f"a span of rows {span.offset} to {span.offset + span.length} of {rows}"
        if not 0 <= span.start <= num_tokens - span.length:
            yield f"a span of tokens {span.start} to {span.start + span.length} of {num_tokens}"


@_contradictions.register
def _(message: Encode) -> Iterator[str]:
    return _of_units(message.units)


@_contradictions.register
def _(message: Share) -> Iterator[str]:
    return _of_units((message.unit,))


@_contradictions.register
def _(message: Embedded) -> Iterator[str]:
    return _of_ticket(message.ticket, "embedding")


@_contradictions.register
def _(message: Prefilling) -> Iterator[str]:
    yield from _of_ticket(message.ticket, "kv")
    if message.ticket.num_tokens > message.num_tokens:
        yield f"a ticket for {message.ticket.num_tokens} of {message.num_tokens} tokens"


@_contradictions.register
def _(message: Prefilled) -> Iterator[str]:
    yield from _of_ticket(message.ticket, "kv")
    yield from _of_sampling(message.sampling)
    num_tokens = len(message.token_ids)
    if not 1 <= message.num_prompt_tokens < num_tokens:
        yield f"{message.num_prompt_tokens} of {num_tokens} tokens are its prompt"
    if message.ticket.num_tokens >= num_tokens:
        yield f"a ticket for {message.ticket.num_tokens} of {num_tokens} tokens"


@_contradictions.register
def _(message: Load) -> Iterator[str]:
    if not message.work_s.keys() <= message.pace_s.keys():
        yield f"work of stages {sorted(message.work_s)} at the pace of {sorted(message.pace_s)}"
    if not all(0 <= seconds < math.inf for seconds in [*message.work_s.values(), *message.pace_s.values()]):
        yield "seconds of work that are no time"


def _of_units(units: tuple[EncodeUnit, ...]) -> Iterator[str]:
    for unit in units:
        if unit.num_tokens < 1 or unit.index < 0:
            yield f"unit {unit.index} has {unit.num_tokens} rows"


def _of_sampling(sampling: SamplingParams) -> Iterator[str]:
    if sampling.max_tokens < 1:
        yield f"at most {sampling.max_tokens} tokens are wanted"


def _of_ticket(ticket: Ticket, region: str) -> Iterator[str]:
    if ticket.region != region:
        yield f"a ticket for region {ticket.region!r}, not {region!r}"
    if not 1 <= len(ticket.blocks) <= ticket.num_tokens + _MAX_STATE_BLOCKS:
        yield f"a ticket for {ticket.num_tokens} tokens in {len(ticket.blocks)} blocks"
    if len(set(ticket.blocks)) < len(ticket.blocks) or min(ticket.blocks, default=0) < 0:
        yield f"a ticket for blocks {ticket.blocks}"


_MAX_STATE_BLOCKS = 1 << 16  # of recurrent layers, far above any model's
