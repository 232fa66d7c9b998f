"""Pictures are upright, on white and in RGB, and whatever is no picture is a bad request."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from triptych.errors import RequestError
from triptych.model.images import FORMATS, decode_image, read_header


def make_image(width: int = 31, height: int = 17, mode: str = "RGB") -> Image.Image:
    """Smooth, so that lossy formats keep it, and different in all four corners."""
    y, x = np.mgrid[0:height, 0:width]
    rgba = np.stack([x * 255 // width, y * 255 // height, (x + y) % 64, 255 - x * 128 // width], -1)
    return Image.fromarray(rgba.astype(np.uint8), "RGBA").convert(mode)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_header_tells_format_and_size(format: str) -> None:
    data = encoded(make_image(31, 17), format)
    assert read_header(data) == (format, 31, 17)
    assert decode_image(data).size == (31, 17)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_picture_is_turned_upright_and_the_header_says_so(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(make_image(), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = decode_image(data)
    assert read_header(data)[1:] == image.size == expected.size
    assert image.tobytes() == expected.tobytes()
    if format in ("JPEG", "PNG", "TIFF"):
        assert image.size == ((17, 31) if orientation >= 5 else (31, 17))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"\0" * 40, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_broken_exif_does_not_spoil_a_good_picture(exif: bytes) -> None:
    data = encoded(make_image(), "JPEG", exif=exif)
    assert read_header(data) == ("JPEG", 31, 17)
    assert decode_image(data).size == (31, 17)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_the_rgb_that_transformers_makes_of_it(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(31 * 17, dtype=np.uint16).reshape(17, 31))
    else:
        image = make_image(mode="RGBA" if mode == "PA" else mode)
        image = image.quantize(16) if mode == "PA" else image
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    data = encoded(image, format)
    expected = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), expected)


def test_transparent_pixels_are_white() -> None:
    assert decode_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    keyed = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert decode_image(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert read_header(data)[1:] == (8, 8)
        assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_phone_pictures_with_a_second_frame_are_read() -> None:
    data = encoded(make_image(), "MPO", save_all=True, append_images=[make_image()])
    assert read_header(data)[1:] == decode_image(data).size == (31, 17)


def test_size_of_a_bomb_is_told_without_decoding_it() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    assert read_header(data) == ("PNG", 60_000, 60_000)


def make_webp(kind: str, width: int, height: int) -> bytes:
    image, exif = make_image(width, height, "RGBA" if "alpha" in kind else "RGB"), Image.Exif()
    options: dict[str, Any] = {"lossless": kind.startswith("lossless")}
    if "exif" in kind:
        exif[0x0112] = 6
        options["exif"] = exif
    if "xmp" in kind:
        options["xmp"] = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="8"/></x:xmpmeta>'
    if "animated" in kind:
        options |= {"save_all": True, "append_images": [image.rotate(180), image]}
    if "icc" in kind:
        options["icc_profile"] = b"odd"  # padded to an even length
    return encoded(image, "WEBP", **options)


WEBP_KINDS = [
    *(
        "lossy",
        "lossless",
        "lossy alpha",
        "lossless alpha",
        "lossy exif",
        "lossless exif",
        "lossy xmp",
        "lossy icc exif",
    ),
    *("lossy animated", "lossless animated exif", "lossy alpha animated xmp", "lossy alpha exif xmp"),
]


@pytest.mark.parametrize("kind", WEBP_KINDS)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (31, 17), (16, 300), (1025, 3)])
def test_webp_header_says_what_pillow_says(kind: str, width: int, height: int) -> None:
    data = make_webp(kind, width, height)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    assert read_header(data) == ("WEBP", *expected)
    assert decode_image(data).size == expected
    turned = ("exif" in kind or "xmp" in kind) and Image.open(io.BytesIO(data)).getexif().get(0x0112, 1) >= 5
    assert expected == ((height, width) if turned else (width, height))


def test_webp_metadata_that_the_header_does_not_announce_does_not_count() -> None:
    data = bytearray(make_webp("lossy alpha exif xmp", 31, 17))
    assert read_header(bytes(data))[1:] == (17, 31)
    data[20] &= ~0x0C
    assert read_header(bytes(data))[1:] == decode_image(bytes(data)).size == (31, 17)


def test_webp_header_is_read_without_the_pixels() -> None:
    data = make_webp("lossy", 640, 480)
    assert read_header(data[:40]) == ("WEBP", 640, 480)


@pytest.mark.parametrize("kind", ["lossy", "lossless", "lossy alpha exif"])
def test_webp_header_that_is_cut_or_unknown_is_a_bad_request(kind: str) -> None:
    data = make_webp(kind, 31, 17)
    for broken in (data[:12], data[:20], data[:24], data[:12] + b"JUNK" + data[16:], data[:20] + b"\xff" * 9):
        try:
            width, height = read_header(broken)[1:]
        except RequestError as error:
            assert error.code == "invalid_image"  # noqa: PT017 - an extended header of ones is a large picture
        else:
            assert broken[12:16] == b"VP8X" and min(width, height) == 1 << 24


def test_webp_of_very_many_chunks_is_refused_quickly() -> None:
    header = b"VP8X" + struct.pack("<I", 10) + bytes([0x08]) + bytes(9)
    body = b"WEBP" + header + b"JUNK\0\0\0\0" * 200_000
    with pytest.raises(RequestError, match="chunks"):
        read_header(b"RIFF" + struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize("data", [b"", b"no picture", b"%PDF-1.4", b"GIF89a", b"\xff\xd8\xff", b"<svg/>"])
def test_bytes_that_are_no_picture_are_a_bad_request(data: bytes) -> None:
    for read in (read_header, decode_image):
        with pytest.raises(RequestError) as caught:
            read(data)
        assert (caught.value.status, caught.value.code) == (400, "invalid_image")


@pytest.mark.parametrize("format", ["PPM", "EPS", "ICO", "TGA", "PCX"])
def test_formats_that_are_not_served_are_a_bad_request(format: str) -> None:
    with pytest.raises(RequestError, match="not a picture of one of the formats"):
        read_header(encoded(make_image(32, 32), format))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
def test_truncated_picture_is_a_bad_request(format: str) -> None:
    data = encoded(make_image(120, 90), format)
    for kept in (0.3, 0.6, 0.9):
        with pytest.raises(RequestError, match="cannot be decoded") as caught:
            decode_image(data[: int(len(data) * kept)])
        assert (caught.value.status, caught.value.code) == (400, "invalid_image")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0, 1))
def test_damaged_picture_is_read_or_refused_and_never_anything_else(
    format: str, damage: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(encoded(make_image(), format))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    data = data[: int(len(data) * max(kept, 0.05)) + 1]
    try:
        _, width, height = read_header(bytes(data))
        if width * height < 1_000_000:  # the server's check
            assert decode_image(bytes(data)).size == (width, height)
    except RequestError as error:
        assert error.code == "invalid_image"  # noqa: PT017 - either outcome is right, any other exception is not
