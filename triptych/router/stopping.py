"""Stop strings over text that arrives in pieces. Knows no tokens and no requests."""


class StopFilter:
    """Lets text through up to the first stop string.

    Text that may be the beginning of a stop string is held back until it is known, so a stop string is never cut in
    half; what is let through does not depend on how the text was cut into pieces. Of several stop strings the one
    that is complete first wins, of those complete at the same character the longest.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that was reached, if one was."""
        text = self._held + text
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            _, start, stop = min(hits)
            self._held = ""
            return text[:start], stop
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
