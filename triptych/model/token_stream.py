"""Text of tokens that arrive one by one."""

from tokenizers import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no UTF-8, or not yet


class TokenStream:
    """What `push` and `flush` return, put together, is what decoding all tokens at once gives,
    without special tokens.

    A piece never ends inside a UTF-8 character: such tokens are held back until the rest of it came. (Tokenizers with
    byte-fallback tokens take back a whole run of bytes once one of them is wrong; what was said of it stays said.)

        ids:  0 ... context ... said ... len(ids)
              decoded and    decoded    held back
              forgotten      again
    """

    __slots__ = ("_context", "_context_text", "_ids", "_said", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # decoding starts here: what a token says may depend on the tokens before it
        self._said = 0
        self._context_text = ""  # of ids[context:said]

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._context)
        if len(text) <= len(self._context_text) or text.endswith(_BROKEN):
            return ""
        return self._say(text)

    def flush(self) -> str:
        """What was held back, with replacement characters for what never became one."""
        return self._say(self._decode(self._context))

    def _say(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._context, self._said = self._said, len(self._ids)
        self._context_text = self._decode(self._context)
        return new

    def _decode(self, start: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:], skip_special_tokens=True)
        return text
