"""Sizes in whole merged patches, in pixels, rounded in the order in which transformers rounds."""

import math

from triptych.errors import ConfigError

MOST_RATIO = 200  # of the sides: the server refuses more, whatever the model


def fit_area(width: int, height: int, side: int, min_pixels: int, max_pixels: int) -> int:
    """Squares of `side` pixels that a picture becomes, with an area between the bounds."""
    rows, columns = round(height / side), round(width / side)
    area = rows * side * columns * side
    if area > max_pixels:
        return _shrunk(width, height, side, math.sqrt(height * width / max_pixels))
    if area < min_pixels:
        return _grown(width, height, side, math.sqrt(min_pixels / (height * width)))
    return rows * columns


def fit_volume(frames: int, width: int, height: int, side: int, length: int, min_pixels: int, max_pixels: int) -> int:
    """Squares of each slice, where the bounds count the pixels of all frames together."""
    if height < side or width < side:
        scale = max(side / height, side / width)
        width, height = int(width * scale), int(height * scale)
    rows, columns = round(height / side), round(width / side)
    volume = round(frames / length) * length * rows * side * columns * side
    if volume > max_pixels:
        return _shrunk(width, height, side, math.sqrt(frames * height * width / max_pixels))
    if volume < min_pixels:
        return _grown(width, height, side, math.sqrt(min_pixels / (frames * height * width)))
    return rows * columns


def _shrunk(width: int, height: int, side: int, factor: float) -> int:
    return max(1, math.floor(height / factor / side)) * max(1, math.floor(width / factor / side))


def _grown(width: int, height: int, side: int, factor: float) -> int:
    return math.ceil(height * factor / side) * math.ceil(width * factor / side)


def check_ratio(width: int, height: int) -> None:
    """Raises ConfigError for a picture or a video that no server takes."""
    if max(width, height) > MOST_RATIO * min(width, height):
        raise ConfigError(
            f"{width}x{height}: one side is more than {MOST_RATIO} times the other, which the server refuses"
        )
