"""What one sequence has said so far: tokens in, text out. Knows no HTTP and no other sequence."""

from collections.abc import Iterable
from typing import Protocol

from triptych.core import FinishReason, RequestId, SamplingParams, TokenLogprobs
from triptych.messages import TokenUpdate
from triptych.router.stopping import StopFilter


class TextStream(Protocol):
    """Text of tokens that arrive one by one, in pieces that are whole characters; `flush`: what was held back."""

    def push(self, token_id: int, /) -> str: ...
    def flush(self) -> str: ...


class Output:
    """One choice of an answer. `take_*` hands over what came since the last call, so that a slow client gets fewer,
    larger pieces and never a queue.
    """

    __slots__ = (
        "_early",
        "_new_text",
        "_new_tokens",
        "_stop_filter",
        "_token_stream",
        "finish",
        "index",
        "last_token_at",
        "num_cached_tokens",
        "request_id",
        "sampling",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        index: int,
        request_id: RequestId,
        sampling: SamplingParams,
        stop: tuple[str, ...],
        token_stream: TextStream,
    ) -> None:
        self.index = index  # among all choices of the client's request
        self.request_id = request_id
        self.sampling = sampling
        self.token_ids: list[int] = []  # all that came: whoever takes the sequence up again begins behind them
        self.num_cached_tokens = 0  # of the prompt: whose KV was there already
        self.finish: FinishReason | None = None
        self.stop_reason: int | str | None = None  # the stop token or stop string, None for end-of-sequence
        self.last_token_at = 0.0
        self._token_stream = token_stream
        self._stop_filter = StopFilter(stop) if stop else None
        self._early: dict[int, TokenUpdate] = {}  # came before an earlier one
        self._new_text: list[str] = []
        self._new_tokens: list[tuple[int, TokenLogprobs]] = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def restart(self) -> None:
        """It is taken up again behind its last token: what came before its turn comes again."""
        self._early.clear()

    def in_order(self, update: TokenUpdate) -> Iterable[TokenUpdate]:
        """The updates that can be pushed now that this one is here: none while an earlier one is missing.

        Decode's first token may overtake prefill's. One that was here before is dropped.
        """
        if update.index >= len(self.token_ids):
            self._early[update.index] = update
        if update.index == 0:
            self.num_cached_tokens = update.num_cached
        while len(self.token_ids) in self._early:
            yield self._early.pop(len(self.token_ids))

    def push(self, update: TokenUpdate) -> int:
        """Takes the tokens that an update stands for, here one, and returns how many these are. Sets `finish` with the
        last one, or where a stop string is complete."""
        self.token_ids.append(update.token_id)
        if update.logprobs is not None:
            self._new_tokens.append((update.token_id, update.logprobs))
        if update.finish is FinishReason.STOP:
            text = self._token_stream.flush()  # the token that ended it is no part of the text
            if update.token_id in self.sampling.stop_token_ids:
                self.stop_reason = update.token_id
        else:
            text = self._token_stream.push(update.token_id)
            if update.finish is not None:
                text += self._token_stream.flush()
        self.finish = update.finish
        if self._stop_filter is not None:
            text = self._until_stop(self._stop_filter, text)
        if text:
            self._new_text.append(text)
        return 1

    def take_text(self) -> str:
        text = "".join(self._new_text)
        self._new_text.clear()
        return text

    def take_tokens(self) -> list[tuple[int, TokenLogprobs]]:
        """Tokens with their log-probabilities; empty unless the request asked for them."""
        tokens, self._new_tokens = self._new_tokens, []
        return tokens

    def _until_stop(self, stop_filter: StopFilter, text: str) -> str:
        if self.num_tokens <= self.sampling.min_tokens and self.finish is None:
            return text
        text, stop = stop_filter.push(text)
        if stop is not None:
            self.finish = FinishReason.STOP
            self.stop_reason = stop
        elif self.finish is not None:
            text += stop_filter.flush()
        return text
