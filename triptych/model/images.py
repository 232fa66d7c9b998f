"""From the bytes of a picture to its size (from the header alone) and to its pixels.

Both ends agree on two things: a picture is upright, that is, its EXIF orientation is applied (as transformers' and
vLLM's loaders do), and whatever is transparent lies on white.
"""

import io

from PIL import ExifTags, Image, UnidentifiedImageError

from triptych.errors import RequestError

Image.init()  # otherwise only some of the formats are known

# Pillow reads many more; some of them run other programs or have readers that nobody looks after.
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)

# The server bounds the number of pixels from the header, and by its own flag: Pillow's bound must not get in the way.
Image.MAX_IMAGE_PIXELS = None

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})


def read_header(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) of the upright picture, without decoding a pixel.

    Raises RequestError for bytes that are no picture, or one of a format that is not served.
    """
    image = _open(data)
    width, height = _upright_size(image, _orientation(image))
    if width < 1 or height < 1:
        raise _invalid(f"its header says {width} x {height} pixels")
    return str(image.format), width, height


def decode_image(data: bytes) -> Image.Image:
    """The upright picture (of an animation the first frame) in RGB, of the size that its header says.

    Raises RequestError if it is broken anywhere.
    """
    image = _open(data)
    orientation = _orientation(image)
    size = _upright_size(image, orientation)
    try:
        image.load()
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        image = _on_white(image)
    except Exception as error:  # Pillow's readers raise almost anything on broken data
        raise _invalid(str(error) or type(error).__name__) from error
    if image.size != size:  # the prompt was laid out for the size in the header
        raise _invalid(f"its header says {size} pixels, but it has {image.size}")
    return image


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise _invalid(f"not a picture of one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise almost anything on broken data
        raise _invalid(str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF has them; 1 is upright, and what a broken EXIF block counts as. Call it before `load`.

    A PNG's EXIF block counts if it stands before the pixels: looking for a later one would decode them.
    """
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    try:
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # it may be any garbage, and the picture is still good
        return 1


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if orientation in _SWAPS_SIDES else (width, height)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _invalid(reason: str) -> RequestError:
    return RequestError(f"the image cannot be decoded: {reason}", code="invalid_image")
