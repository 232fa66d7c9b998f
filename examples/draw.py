"""Draws a picture to ask about: python examples/draw.py red circle picture.png (or: blue digit7 seven.png)"""

import argparse
import sys

from PIL import Image, ImageDraw, ImageFont

SHAPES = {
    "circle": lambda pen, ink: pen.ellipse([60, 40, 180, 160], fill=ink),
    "square": lambda pen, ink: pen.rectangle([65, 45, 175, 155], fill=ink),
    "triangle": lambda pen, ink: pen.polygon([(120, 30), (190, 160), (50, 160)], fill=ink),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ink", help="a colour, such as red")
    parser.add_argument("what", help=f"{', '.join(SHAPES)}, or digit0 to digit9")
    parser.add_argument("path", help="file for the picture")
    options = parser.parse_args()
    try:
        drawn(options.ink, options.what).save(options.path)
    except (OSError, ValueError) as error:
        sys.exit(f"{options.path}: {error}")


def drawn(ink: str, what: str) -> Image.Image:
    picture = Image.new("RGB", (240, 200), "white" if ink != "white" else "black")
    pen = ImageDraw.Draw(picture)
    if what in SHAPES:
        SHAPES[what](pen, ink)
    else:
        pen.text((90, 30), what.removeprefix("digit"), fill=ink, font=ImageFont.load_default(120))
    return picture


main()
