import random
import re
import string

from hypothesis import given
from hypothesis import strategies as st

from triptych.demo.facts import MAX_PICTURES, Facts, Thing, random_facts
from triptych.demo.questions import KIND_SHARES, Question, ask, describe
from triptych.demo.wordings import HELD_OUT, SEEN

seeds = st.integers(0, 2**32)


def make_question(seed: int, held_out: bool = False) -> tuple[list[Facts], Question]:
    rng = random.Random(seed)
    facts = [random_facts(rng) for _ in range(rng.randint(1, MAX_PICTURES))]
    return facts, ask(facts, rng, held_out)


@given(seeds, st.booleans())
def test_the_same_seed_asks_the_same_question(seed: int, held_out: bool) -> None:
    assert make_question(seed, held_out) == make_question(seed, held_out)


@given(seeds)
def test_the_answer_is_true_of_the_picture_that_is_named(seed: int) -> None:
    facts, question = make_question(seed)
    if question.picture is None or not question.names_picture:
        return
    about = facts[question.picture]
    shapes, colours = {thing.shape for thing in about.things}, {thing.colour for thing in about.things}
    assert question.answer in shapes | colours | {str(about.count), str(about.digit), describe(about)}


@given(seeds)
def test_which_picture_has_one_answer(seed: int) -> None:
    facts, question = make_question(seed)
    if question.kind != "which":
        return
    words = set(re.findall(r"[a-z]+|\d", question.text.lower()))
    fitting = [i for i, picture in enumerate(facts, start=1) if _shows(picture, words)]
    assert question.answer == f"picture {fitting[0]}" and len(fitting) == 1


@given(seeds)
def test_a_thing_asked_for_its_colour_occurs_once_in_the_picture(seed: int) -> None:
    facts, question = make_question(seed)
    if question.kind == "colour" and question.picture is not None:
        shapes = [thing.shape for thing in facts[question.picture].things]
        assert len(shapes) == len(set(shapes))


def test_wordings_that_are_held_out_are_never_used_in_training() -> None:
    for kind in KIND_SHARES:
        assert not set(SEEN[kind]) & set(HELD_OUT[kind])


def test_all_words_of_held_out_wordings_occur_in_training() -> None:
    seen = {word for templates in SEEN.values() for template in templates for word in _words(template)}
    for templates in HELD_OUT.values():
        for template in templates:
            assert set(_words(template)) <= seen, template


def test_two_things_are_described_in_one_order() -> None:
    star, circle = Thing("star", "red"), Thing("circle", "blue")
    assert describe(Facts((star, circle))) == describe(Facts((circle, star))) == "a blue circle and a red star"


def test_without_pictures_there_is_small_talk() -> None:
    kinds = {ask([], random.Random(seed)).kind for seed in range(100)}
    assert kinds == {"small talk", "pictures"}


def _shows(facts: Facts, words: set[str]) -> bool:
    """An independent reading of a "which" question: everything that its words name must be in the picture."""
    if facts.digit is not None:
        named = "digit" in words and str(facts.digit) in words
        return named or ("something" in words and facts.things[0].colour in words)
    counts = {"two": 2, "three": 3, "four": 4}
    if "digit" in words or any(word in words and facts.count != count for word, count in counts.items()):
        return False
    return any(
        (thing.colour in words or not words & _COLOURS)
        and ("something" in words or thing.shape in words or f"{thing.shape}s" in words or f"{thing.shape}es" in words)
        for thing in facts.things
    )


_COLOURS = {"red", "green", "blue", "yellow", "purple", "black", "white"}


def _words(template: str) -> list[str]:
    bare = re.sub(r"{\w+}", " ", template).lower()
    return bare.translate(str.maketrans("", "", string.punctuation)).split()
