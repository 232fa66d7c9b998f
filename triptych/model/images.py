"""From the bytes of a picture to its size (from the header alone) and to its pixels.

Both ends agree on two things: a picture is upright, that is, its EXIF orientation is applied (as transformers' and
vLLM's loaders do), and whatever is transparent lies on white.
"""

import io
import struct
from collections.abc import Iterator

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

# WebP, RFC 9649. Flags of the extended header, and the metadata chunks that they announce.
_WEBP_METADATA = {b"EXIF": (0x08, "exif"), b"XMP ": (0x04, "xmp")}
_MAX_WEBP_CHUNKS = 10_000


def read_header(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) of the upright picture, without decoding a pixel.

    Raises RequestError for bytes that are no picture, or one of a format that is not served.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and "WEBP" in FORMATS:
        name, image = "WEBP", _webp_header(data)  # where Pillow's `open` decodes
    else:
        image = _open(data)
        name = str(image.format)
    width, height = _upright_size(image.size, _orientation(image))
    if width < 1 or height < 1:
        raise _invalid(f"its header says {width} x {height} pixels")
    return name, width, height


def decode_image(data: bytes) -> Image.Image:
    """The upright picture (of an animation the first frame) in RGB, of the size that its header says.

    Raises RequestError if it is broken anywhere.
    """
    size = read_header(data)[1:]
    image = _open(data)
    orientation = _orientation(image)
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


def _webp_header(data: bytes) -> Image.Image:
    """A picture without pixels, of the size and with the metadata that the file names."""
    kind, head = data[12:16], data[20:30]
    image = Image.Image()
    try:
        if kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
            width, height = struct.unpack("<HH", head[6:10])
            image._size = (width & 0x3FFF, height & 0x3FFF)  # the upper two bits ask for a scaled display
        elif kind == b"VP8L" and head[:1] == b"\x2f":
            (bits,) = struct.unpack("<I", head[1:5])
            image._size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif kind == b"VP8X" and len(head) == 10:
            image._size = (int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1)
            image.info.update(_webp_metadata(data, flags=head[0]))
        else:
            raise _invalid("a WebP file without a header that is known")
    except struct.error:
        raise _invalid("a WebP file that ends within its header") from None
    return image


def _webp_metadata(data: bytes, flags: int) -> dict[str | tuple[int, int], bytes]:
    """Metadata chunks that the flags announce, the first of each kind, under Pillow's names for them."""
    wanted = {name: key for name, (flag, key) in _WEBP_METADATA.items() if flags & flag}
    found: dict[str | tuple[int, int], bytes] = {}
    if wanted:
        for name, start, end in _webp_chunks(data):
            if name in wanted:
                found[wanted.pop(name)] = data[start:end]
                if not wanted:
                    break
    return found


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each complete chunk of a RIFF file."""
    position, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    for _ in range(_MAX_WEBP_CHUNKS):
        start = position + 8
        length = int.from_bytes(data[position + 4 : start], "little")
        if start + length > end:
            return
        yield data[position : position + 4], start, start + length
        position = start + length + length % 2
    raise _invalid(f"more than {_MAX_WEBP_CHUNKS} chunks")


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


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    width, height = size
    return (height, width) if orientation in _SWAPS_SIDES else (width, height)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _invalid(reason: str) -> RequestError:
    return RequestError(f"the image cannot be decoded: {reason}", code="invalid_image")
