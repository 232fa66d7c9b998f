"""How processors that keep the shape of a picture find its size in whole merged patches.

All numbers are pixels; `side` is the side of a merged patch. Sides are rounded to whole merged patches, and scaled if
the area (of a video: the volume) leaves its bounds then. The order of the roundings is transformers'.
"""

import math


def fit_area(width: int, height: int, side: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(rows, columns) of merged patches, for each picture or frame by itself."""
    rows, columns = round(height / side), round(width / side)
    area = rows * side * columns * side
    if area > max_pixels:
        return _shrunk(width, height, side, math.sqrt(height * width / max_pixels))
    if area < min_pixels:
        return _grown(width, height, side, math.sqrt(min_pixels / (height * width)))
    return rows, columns


def fit_volume(
    num_frames: int, width: int, height: int, side: int, slice_length: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(rows, columns) of merged patches, where bounds count the pixels of all frames together."""
    if height < side or width < side:
        scale = max(side / height, side / width)
        width, height = int(width * scale), int(height * scale)
    rows, columns = round(height / side), round(width / side)
    volume = round(num_frames / slice_length) * slice_length * rows * side * columns * side
    if volume > max_pixels:
        return _shrunk(width, height, side, math.sqrt((num_frames * height * width) / max_pixels))
    if volume < min_pixels:
        return _grown(width, height, side, math.sqrt(min_pixels / (num_frames * height * width)))
    return rows, columns


def _shrunk(width: int, height: int, side: int, factor: float) -> tuple[int, int]:
    return max(1, math.floor(height / factor / side)), max(1, math.floor(width / factor / side))


def _grown(width: int, height: int, side: int, factor: float) -> tuple[int, int]:
    return math.ceil(height * factor / side), math.ceil(width * factor / side)
