"""Media files that are broken, lie about themselves, or are far larger inside than outside."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

from PIL import Image

from tests.model.clips import clip
from tests.model.sounds import encoded, noise, wav_header

MIME = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav"}
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@cache
def whole_files(modality: str) -> dict[str, bytes]:
    """Good ones, by kind."""
    if modality == "image":
        kinds = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
        return {kind: _picture(kind) for kind in kinds} | {"animated": _animated("GIF"), "moving": _animated("WEBP")}
    if modality == "video":
        kinds = ("mp4", "mp4 mpeg4", "mp4 fragments", "webm vp9", "webm vp8", "avi", "gif")
        return {kind: clip(kind, num_frames=4, width=32, height=32) for kind in kinds}
    kinds = ("wav", "mp3", "flac", "opus", "m4a", "webm")
    return {kind: encoded(kind, noise(12_000), 48_000) for kind in kinds}


def broken_file(modality: str, rng: random.Random) -> tuple[str, bytes]:
    """What it is, and its bytes. Some changes do no harm, so that the file may still be good."""
    if rng.random() < 0.25:
        bombs = _BOMBS[modality]
        name = rng.choice(sorted(bombs))
        return name, bombs[name]()
    other = rng.choice([modality, modality, modality, "image", "video", "audio"])
    files = whole_files(other)
    kind = rng.choice(sorted(files))
    data = bytearray(files[kind])
    changes = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        change = rng.choice(_CHANGES)
        changes.append(change.__name__)
        change(data, rng)
    return f"{other} {kind} {changes}", bytes(data)


def _picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((48, 40), 90).convert("RGB").save(out, kind)
    return out.getvalue()


def _animated(kind: str) -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


# ---- changes


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def cut_the_beginning(data: bytearray, rng: random.Random) -> None:
    del data[: rng.randrange(1, 64)]


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 20)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_the_head(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 6)):
        if data:
            data[rng.randrange(min(len(data), 80))] = rng.randrange(256)


def exaggerate(data: bytearray, rng: random.Random) -> None:
    """A number somewhere, mostly in the header, as small or as large as can be."""
    place = rng.randrange(min(len(data), 200) + 1) if rng.random() < 0.7 else rng.randrange(len(data) + 1)
    data[place : place + 4] = struct.pack(rng.choice([">I", "<I"]), rng.choice(_EXTREMES))


def empty_a_part(data: bytearray, rng: random.Random) -> None:
    place, length = rng.randrange(len(data) + 1), rng.randrange(1, 200)
    data[place : place + length] = bytes(len(data[place : place + length]))


def repeat_a_part(data: bytearray, rng: random.Random) -> None:
    place, length = rng.randrange(len(data) + 1), rng.randrange(1, 400)
    data[place:place] = data[place : place + length] * rng.choice([1, 2, 100])


def append(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice([1, 100, 10_000]))


def splice(data: bytearray, rng: random.Random) -> None:
    """Goes on as another file."""
    files = list(whole_files(rng.choice(["image", "video", "audio"])).values())
    other = rng.choice(files)
    del data[rng.randrange(len(data) + 1) :]
    data += other[rng.randrange(len(other)) :]


_CHANGES = (cut, cut_the_beginning, flip, flip_the_head, exaggerate, empty_a_part, repeat_a_part, append, splice)


# ---- files that are small outside


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (header, *chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


@cache
def _zeros(num_bytes: int) -> bytes:
    return zlib.compress(bytes(num_bytes), 9)


def _jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(_picture("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _gif_of(width: int, height: int) -> bytes:
    data = bytearray(_picture("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def _bmp_of(width: int, height: int) -> bytes:
    data = bytearray(_picture("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def _webp_of(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x1c\0\0\0" + size + size


_BOMBS: dict[str, dict[str, Callable[[], bytes]]] = {
    "image": {
        "png of 60000 x 60000": lambda: png(60_000, 60_000, (b"IDAT", _zeros(1000))),
        "png of 2^31 x 2^31": lambda: png((1 << 31) - 1, (1 << 31) - 1, (b"IDAT", _zeros(1000))),
        "png of 0 x 0": lambda: png(0, 0, (b"IDAT", _zeros(10))),
        "png without pixels": lambda: png(64, 64),
        "png with too many pixels": lambda: png(64, 64, (b"IDAT", _zeros(50_000_000))),
        "png that is a line": lambda: png(900_000, 1, (b"IDAT", _zeros(2_700_001))),
        "png that is a column": lambda: png(1, 900_000, (b"IDAT", _zeros(3_600_000))),
        "png with a huge text": lambda: png(
            64, 64, (b"zTXt", b"a\0\0" + _zeros(200_000_000)), (b"IDAT", _zeros(12352))
        ),
        "png with a huge profile": lambda: png(
            64, 64, (b"iCCP", b"a\0\0" + _zeros(200_000_000)), (b"IDAT", _zeros(12352))
        ),
        "png with many chunks": lambda: png(64, 64, *[(b"tEXt", b"a\0b")] * 50_000, (b"IDAT", _zeros(12352))),
        "png that is animated without end": lambda: png(
            64, 64, (b"acTL", struct.pack(">II", (1 << 31) - 1, 0)), (b"IDAT", _zeros(12352))
        ),
        "jpeg of 65500 x 65500": lambda: _jpeg_of(65_500, 65_500),
        "jpeg of 1400 x 1400": lambda: _jpeg_of(1400, 1400),
        "jpeg of 0 x 0": lambda: _jpeg_of(0, 0),
        "gif of 65535 x 65535": lambda: _gif_of(65_535, 65_535),
        "bmp of -2^31": lambda: _bmp_of(-(1 << 31), -(1 << 31)),
        "bmp of 1000 x -1000": lambda: _bmp_of(1000, -1000),
        "webp of 16 million": lambda: _webp_of(1 << 24),
        "webp of 1000": lambda: _webp_of(1000),
        "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>',
        "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "nothing": lambda: b"",
    },
    "video": {
        "play list": lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "concat": lambda: b"ffconcat version 1.0\nfile /etc/passwd\n",
        "mp4 of boxes in boxes": lambda: b"\0\0\0\x08ftyp" + b"\0\x10\0\0moov" * 20_000,
        "mp4 of empty boxes": lambda: b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x08free" * 200_000,
        "mkv of unknown sizes": lambda: b"\x1a\x45\xdf\xa3\x80" + b"\x18\x53\x80\x67\xff" * 50_000,
        "gif of 65535 x 65535": lambda: _gif_of(65_535, 65_535),
        "gif of many frames": lambda: _gif_frames(20_000),
        "nothing": lambda: b"",
    },
    "audio": {
        "wav of 4 GB": lambda: wav_header((1 << 32) - 1, 16_000) + bytes(1000),
        "wav of 0 Hz": lambda: wav_header(1000, 0) + bytes(1000),
        "wav of 4 GHz": lambda: wav_header(1000, (1 << 32) - 1) + bytes(1000),
        "wav of 65535 channels": lambda: wav_header(1000, 16_000, channels=4095) + bytes(1000),
        "wav of 1 bit": lambda: wav_header(1000, 16_000, bits=1) + bytes(1000),
        "wav of one sample": lambda: wav_header(2, 16_000) + bytes(2),
        "wav of NaN": lambda: wav_header(8000, 16_000, kind=3, bits=32) + b"\0\0\xc0\x7f" * 2000,
        "wav of chunks": lambda: wav_header(0, 16_000)[:36] + b"LIST\0\0\0\0" * 100_000,
        "play list": lambda: b"#EXTM3U\nfile:///etc/passwd\n",
        "nothing": lambda: b"",
    },
}  # fmt: skip


def _gif_frames(num_frames: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\x02\x03\x84\x8f\x05\0"
    return b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * num_frames + b"\x3b"
