from hypothesis import given
from hypothesis import strategies as st

from triptych.router.stopping import StopFilter

TEXTS = st.text("ab", max_size=20)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """What the filter is specified to give: the stop string that is complete first, then the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(TEXTS, max_size=8), STOPS)
def test_the_result_does_not_depend_on_how_the_text_was_cut(pieces: list[str], stops: tuple[str, ...]) -> None:
    stop_filter = StopFilter(stops)
    shown, reached = "", None
    for piece in pieces:
        released, reached = stop_filter.push(piece)
        shown += released
        if reached is not None:
            break
    if reached is None:
        shown += stop_filter.flush()
    assert (shown, reached) == cut("".join(pieces), stops)


def test_only_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    stop_filter = StopFilter(("\n\nUser",))
    assert stop_filter.push("Hello\n") == ("Hello", None)
    assert stop_filter.push("\nYou") == ("\n\nYou", None)
    assert stop_filter.push("!") == ("!", None)
