"""Questions about a list of pictures and their one right answer, drawn from a `random.Random`.

Knows facts and wordings; does not know pixels, tokens or the model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from triptych.demo.facts import (
    SHAPES,
    Facts,
    Thing,
    colour_fact,
    count_fact,
    digit_fact,
    pair_fact,
    shape_fact,
)
from triptych.demo.wordings import (
    CLOSERS,
    HELD_OUT,
    NAMES,
    NOUNS,
    ONLY_NAMES,
    OPENERS,
    ORDINALS,
    SEEN,
    SMALL_TALK,
)

KIND_SHARES: Mapping[str, float] = {
    "colour": 0.18,
    "shape": 0.1,
    "shape by colour": 0.08,
    "count": 0.18,
    "digit": 0.18,
    "which": 0.18,
    "describe": 0.07,
    "pictures": 0.03,
}
_COUNT_WORDS = ("no", "a", "two", "three", "four")


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    text: str
    answer: str
    picture: int | None = None  # the one that it is about, counted from 0
    sought: tuple[int, ...] = ()  # the facts that its words name, for example that of "circle"
    found: tuple[int, ...] = ()  # the facts that answer it, for example that of "red circle"

    @property
    def names_picture(self) -> bool:
        """Whether the wording says which picture it is about; otherwise the answer does."""
        return self.kind != "which"


def ask(
    pictures: Sequence[Facts],
    rng: random.Random,
    held_out: bool = False,
    shares: Mapping[str, float] = KIND_SHARES,
) -> Question:
    """A question that has exactly one right answer for these pictures."""
    if not pictures:
        return _small_talk(rng)
    while True:
        kind = rng.choices(list(shares), list(shares.values()))[0]
        subject = _choose(kind, pictures, rng)
        if subject is not None:
            return _worded(kind, pictures, subject, rng, held_out)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is asked about: a picture, what fills the wording's slots, and the answer."""

    picture: int
    slots: dict[str, str]
    answer: str
    sought: tuple[int, ...] = ()
    found: tuple[int, ...] = ()


def describe(facts: Facts) -> str:
    if facts.digit is not None:
        return f"the digit {facts.digit} in {facts.things[0].colour}"
    if facts.count > 1:
        thing = facts.things[0]
        return f"{_COUNT_WORDS[facts.count]} {thing.colour} {_plural(thing.shape)}"
    return " and ".join(f"a {thing.colour} {thing.shape}" for thing in _in_order(facts))


def _choose(kind: str, pictures: Sequence[Facts], rng: random.Random) -> _Subject | None:
    """None where no picture allows such a question."""
    if kind == "pictures":
        return _Subject(0, {}, str(len(pictures)))
    if kind == "which":
        return _choose_which(pictures, rng)
    fitting = [i for i, facts in enumerate(pictures) if _fits(kind, facts)]
    if not fitting:
        return None
    picture = rng.choice(fitting)
    facts = pictures[picture]
    thing = rng.choice(facts.things)
    if kind == "colour":
        many = facts.count > 1
        verbs = {"is": "are", "does": "do", "has": "have"} if many else {"is": "is", "does": "does", "has": "has"}
        slots = {"s": _plural(thing.shape) if many else thing.shape, **verbs}
        return _Subject(picture, slots, thing.colour, (shape_fact(thing.shape),), (pair_fact(thing),))
    answers = {
        "shape": thing.shape,
        "shape by colour": thing.shape,
        "count": str(facts.count),
        "digit": str(facts.digit),
        "describe": describe(facts),
    }
    sought = {"count": (shape_fact(thing.shape),), "shape by colour": (colour_fact(thing.colour),)}
    slots = {"ss": _plural(thing.shape), "c": thing.colour}
    found = (pair_fact(thing),) if kind == "shape by colour" else ()
    return _Subject(picture, slots, answers[kind], sought.get(kind, ()), found)


def _fits(kind: str, facts: Facts) -> bool:
    if kind == "digit":
        return facts.digit is not None
    if kind == "shape":
        return facts.digit is None and not facts.is_pair
    return facts.digit is None or kind in ("colour", "describe")


def _choose_which(pictures: Sequence[Facts], rng: random.Random) -> _Subject | None:
    """Something that exactly one of at least two pictures shows."""
    picture = rng.randrange(len(pictures))
    sights = [_sights(facts) for facts in pictures]
    unique = [
        (facts, wording)
        for facts, wording in sights[picture].items()
        if sum(facts in other for other in sights) == 1 and len(pictures) > 1
    ]
    if not unique:
        return None
    sought, wording = rng.choice(unique)
    return _Subject(picture, {"x": wording}, f"picture {picture + 1}", sought)


def _sights(facts: Facts) -> dict[tuple[int, ...], str]:
    """Everything a picture shows -> how to say it. Equal keys mean that both pictures answer the question."""
    sights: dict[tuple[int, ...], str] = {}
    for thing in facts.things:
        sights[(colour_fact(thing.colour),)] = f"something {thing.colour}"
        if facts.digit is not None:
            sights[(digit_fact(facts.digit),)] = f"the digit {facts.digit}"
            continue
        shape = thing.shape if facts.count == 1 else _plural(thing.shape)
        article = "a " if facts.count == 1 else ""
        sights[(shape_fact(thing.shape),)] = f"{article}{shape}"
        sights[(pair_fact(thing),)] = f"{article}{thing.colour} {shape}"
        if facts.count > 1:
            sights[shape_fact(thing.shape), count_fact(facts.count)] = f"{_COUNT_WORDS[facts.count]} {shape}"
    return sights


def _worded(kind: str, pictures: Sequence[Facts], subject: _Subject, rng: random.Random, held_out: bool) -> Question:
    template = rng.choice((HELD_OUT if held_out else SEEN)[kind])
    if len(pictures) == 1 and rng.random() < 0.25:
        template = template.replace(" in {p}", "", 1) if kind in ("colour", "count") else template
    text = template.format(p=_name(subject.picture, len(pictures), rng), **subject.slots)
    about = None if kind == "pictures" else subject.picture
    return Question(
        kind, _loosened(text[0].upper() + text[1:], rng), subject.answer, about, subject.sought, subject.found
    )


def _name(picture: int, num_pictures: int, rng: random.Random) -> str:
    if num_pictures == 1 and rng.random() < 0.5:
        return rng.choice(ONLY_NAMES)
    return rng.choice(NAMES).format(noun=rng.choice(NOUNS), k=picture + 1, ordinal=ORDINALS[picture])


def _loosened(text: str, rng: random.Random) -> str:
    """People also add a word before or after, forget the question mark, and do not care for capitals."""
    if rng.random() < 0.15:
        text = rng.choice(OPENERS) + text[0].lower() + text[1:]
    if rng.random() < 0.1:
        text += rng.choice(CLOSERS)
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    return text.lower() if rng.random() < 0.2 else text


def _small_talk(rng: random.Random) -> Question:
    if rng.random() < 0.15:
        return Question("pictures", rng.choice(SEEN["pictures"]), "0")
    questions, answer = rng.choice(SMALL_TALK)
    return Question("small talk", rng.choice(questions), answer)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _in_order(facts: Facts) -> Sequence[Thing]:
    """Two things are told in one fixed order, since the picture has none that matters."""
    return sorted(facts.things, key=lambda thing: SHAPES.index(thing.shape))
