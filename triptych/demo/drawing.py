"""Draws the picture that a `Facts` describes: size, background, place, font and shade are chosen at random.

Everything is a function of the given `random.Random`. Does not know questions or the model.
"""

from __future__ import annotations

import functools
import math
import random

from PIL import Image, ImageDraw, ImageFont

from triptych.demo.facts import Facts, Thing

Rgb = tuple[int, int, int]
Point = tuple[float, float]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MIN_SIDE, MAX_SIDE, MAX_ASPECT = 60, 400, 2.2

_INKS: dict[str, Rgb] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 220, 40),
    "purple": (150, 40, 175),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
_BACKGROUNDS: tuple[Rgb, ...] = (
    (250, 250, 250),
    (225, 225, 225),
    (180, 180, 180),
    (90, 90, 90),
    (25, 25, 25),
    (250, 240, 215),
    (205, 225, 245),
    (215, 240, 215),
    (245, 215, 225),
    (45, 55, 75),
)
_MIN_CONTRAST = 90
_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansCondensed.ttf",
    "",  # the font inside Pillow, also used where the others are not installed
    "",
)


def draw(facts: Facts, rng: random.Random) -> Image.Image:
    width, height = _random_size(rng)
    scale = 2 if max(width, height) <= 200 and rng.random() < 0.6 else 1  # 2: drawn twice as large, then smoothed
    canvas = _Canvas(_background(facts, width * scale, height * scale, rng), rng)
    if facts.digit is not None:
        canvas.digit(facts.digit, facts.things[0].colour)
    elif facts.is_pair:
        canvas.pair(facts.things)
    elif facts.count > 1:
        canvas.many(facts.things[0], facts.count)
    else:
        canvas.one(facts.things[0])
    return canvas.image.resize((width, height), Image.Resampling.BICUBIC) if scale > 1 else canvas.image


class _Canvas:
    def __init__(self, image: Image.Image, rng: random.Random) -> None:
        self.image, self._rng, self._pen = image, rng, ImageDraw.Draw(image)
        self._width, self._height = image.size
        self._short, self._long = min(image.size), max(image.size)

    def one(self, thing: Thing) -> None:
        diameter = self._short * self._rng.uniform(0.5, 0.8)
        self._paint(thing, self._anywhere(diameter), diameter)

    def pair(self, things: tuple[Thing, ...]) -> None:
        """Side by side along the longer axis, in random order."""
        flat = self._width >= self._height
        diameter = min(self._short * 0.8, self._long * 0.43) * self._rng.uniform(0.85, 1)
        for i, thing in enumerate(self._rng.sample(things, 2)):
            along = self._long * ((i + 0.5) / 2 + self._rng.uniform(-0.02, 0.02))
            across = diameter / 2 + self._rng.uniform(0.2, 0.8) * (self._short - diameter)
            self._paint(thing, (along, across) if flat else (across, along), diameter)

    def many(self, thing: Thing, count: int) -> None:
        area = self._width * self._height
        diameter = min(self._short * 0.6, 0.56 * math.sqrt(area / count)) * self._rng.uniform(0.86, 1)
        spots: list[Point] = []
        while len(spots) < count:
            spots = self._scatter(count, diameter)
            diameter *= 0.95
        for spot in spots:
            self._paint(thing, spot, diameter / 0.95)

    def digit(self, digit: int, colour: str) -> None:
        font = _font(self._rng.choice(_FONTS), int(self._short * self._rng.uniform(0.85, 1.2)))
        left, top, right, bottom = self._pen.textbbox((0, 0), str(digit), font=font)
        x = self._rng.uniform(0.08, 0.92) * (self._width - (right - left))
        y = self._rng.uniform(0.08, 0.92) * (self._height - (bottom - top))
        self._pen.text((x - left, y - top), str(digit), font=font, fill=self._ink(colour))

    def _paint(self, thing: Thing, centre: Point, diameter: float) -> None:
        radius, ink = diameter / 2, self._ink(thing.colour)
        if thing.shape == "circle":
            x, y = centre
            self._pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        else:
            turn = math.radians(self._rng.uniform(-8, 8))
            self._pen.polygon(_outline(thing.shape, centre, radius, turn), fill=ink)

    def _anywhere(self, diameter: float) -> Point:
        x, y = (self._rng.uniform(0.54 * diameter, side - 0.54 * diameter) for side in self.image.size)
        return x, y

    def _scatter(self, count: int, diameter: float) -> list[Point]:
        """Up to `count` places that do not touch one another; fewer where they were not found."""
        spots: list[Point] = []
        for _ in range(60):
            spot = self._anywhere(diameter)
            if all(math.dist(spot, other) > diameter * 1.25 for other in spots):
                spots.append(spot)
            if len(spots) == count:
                break
        return spots

    def _ink(self, colour: str) -> Rgb:
        return _jitter(_INKS[colour], 12, self._rng)


def _random_size(rng: random.Random) -> tuple[int, int]:
    width = MIN_SIDE * (MAX_SIDE / MIN_SIDE) ** rng.random()
    height = width * MAX_ASPECT ** rng.uniform(-1, 1)
    width, height = (min(max(side, MIN_SIDE), MAX_SIDE) for side in (width, height))
    return round(width), round(height)


def _background(facts: Facts, width: int, height: int, rng: random.Random) -> Image.Image:
    """Plain, or fading from one shade to another, always far in colour from the things in front."""
    inks = [_INKS[thing.colour] for thing in facts.things]
    shades = [shade for shade in _BACKGROUNDS if min(math.dist(shade, ink) for ink in inks) > _MIN_CONTRAST]
    first, second = (_jitter(shade, 6, rng) for shade in (rng.choice(shades), rng.choice(shades)))
    plain = Image.new("RGB", (width, height), first)
    if rng.random() < 0.7 or _between(first, second, inks) < _MIN_CONTRAST:
        return plain
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
    return Image.composite(Image.new("RGB", (width, height), second), plain, ramp)


def _between(first: Rgb, second: Rgb, inks: list[Rgb]) -> float:
    """The smallest distance of an ink from any shade on the way between two."""
    steps = [[a + (b - a) * t / 8 for a, b in zip(first, second, strict=True)] for t in range(9)]
    return min(math.dist(step, ink) for step in steps for ink in inks)


def _jitter(colour: Rgb, by: int, rng: random.Random) -> Rgb:
    red, green, blue = (max(0, min(255, value + rng.randint(-by, by))) for value in colour)
    return red, green, blue


def _outline(shape: str, centre: Point, radius: float, turn: float) -> list[Point]:
    up = -math.pi / 2
    if shape == "square":
        polar = [(math.pi / 4 + k * math.pi / 2, 1.2) for k in range(4)]
    elif shape == "triangle":
        polar = [(up + k * 2 * math.pi / 3, 1.12) for k in range(3)]
    elif shape == "star":
        polar = [(up + k * math.pi / 5, 0.45 if k % 2 else 1.1) for k in range(10)]
    else:
        polar = _cross()
    return [
        (centre[0] + radius * r * math.cos(angle + turn), centre[1] + radius * r * math.sin(angle + turn))
        for angle, r in polar
    ]


def _cross(arm: float = 1.0, half: float = 0.33) -> list[tuple[float, float]]:
    corners = ((half, -arm), (half, -half), (arm, -half))
    points = [(x, y) for x, y in corners]
    for _ in range(3):  # the other three arms, each a quarter turn further
        points += [(-y, x) for x, y in points[-3:]]
    return [(math.atan2(y, x), math.hypot(x, y)) for x, y in points]


@functools.lru_cache(maxsize=512)
def _font(name: str, size: int) -> Font:
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return ImageFont.load_default(size)
