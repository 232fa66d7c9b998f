"""Which container a video file is, and whether the file ends where its structure says, without a look at any frame.

FFmpeg reads the beginning of a truncated file without a word, so this has to be found out beforehand.
"""

from collections.abc import Callable, Iterator

# By the name that FFmpeg gives it. It recognises many more by itself, among them playlists, which name other files
# to read: it is always told what to expect.
MP4, MATROSKA, AVI, GIF = "mp4", "matroska", "avi", "gif"

_MP4_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
_EBML_HEADER = b"\x1a\x45\xdf\xa3"
_EBML_SEGMENT, _EBML_CLUSTER = 0x18538067, 0x1F43B675
_EBML_UNKNOWN = -1

_GIF_EXTENSION, _GIF_IMAGE, _GIF_TRAILER = 0x21, 0x2C, 0x3B


class TruncatedError(Exception):
    """The file ends within one of its parts."""


def container_of(data: bytes) -> str | None:
    """None if it is none of those that are served."""
    if data[4:8] in _MP4_FIRST_BOXES:
        return MP4
    if data[:4] == _EBML_HEADER:
        return MATROSKA
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return AVI
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return GIF
    return None


def check_whole(container: str, data: bytes) -> None:
    """Raises TruncatedError if the file is shorter than its parts say.

    A cut between two parts of a stream that names no total (a fragmented MP4, a live WebM) makes a whole, shorter file.
    """
    parts: dict[str, Callable[[bytes], Iterator[int]]] = {
        MP4: _mp4_boxes,
        MATROSKA: _ebml_elements,
        AVI: _riff_chunks,
        GIF: _gif_blocks,
    }
    end = 0
    for end in parts[container](data):
        if end > len(data):
            raise TruncatedError(f"it ends {end - len(data)} bytes too early")
    if end == 0:
        raise TruncatedError("it ends within its header")


# ---- each yields the ends of the file's parts, one after the other


def _mp4_boxes(data: bytes) -> Iterator[int]:
    """ISO 14496-12: 32 bits of size, a name, and 64 bits more of size where the first say 1. 0: up to the end."""
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        header = 8
        if size == 1:
            header, size = 16, int.from_bytes(data[start + 8 : start + 16], "big")
        elif size == 0 and start + header <= len(data):
            size = len(data) - start
        start += max(size, header)
        yield start


def _ebml_elements(data: bytes) -> Iterator[int]:
    """RFC 8794. Segments and clusters may have no size; what is in them is then walked as if it stood outside."""
    start, end = 0, len(data)
    while start < end:
        name, start = _ebml_number(data, start, keep_marker=True)
        size, start = _ebml_number(data, start, keep_marker=False)
        if name == _EBML_SEGMENT:
            if size != _EBML_UNKNOWN:
                end = min(end, start + size)  # whatever stands behind it is no part of the video
                yield start + size
        elif size != _EBML_UNKNOWN:
            start += size
        elif name != _EBML_CLUSTER:
            raise TruncatedError("an element without a size")
        yield start


def _ebml_number(data: bytes, start: int, *, keep_marker: bool) -> tuple[int, int]:
    """(value, where it ends). As many leading zero bits as there are bytes behind the first, then a marker."""
    first = data[start] if start < len(data) else 0
    length = 9 - first.bit_length()
    if not 1 <= length <= 8:
        raise TruncatedError("an element without a header" if start < len(data) else "it ends within a header")
    end = start + length
    if end > len(data):
        raise TruncatedError("it ends within a header")
    value = int.from_bytes(data[start:end], "big")
    if keep_marker:
        return value, end
    value &= (1 << 7 * length) - 1
    return (_EBML_UNKNOWN if value == (1 << 7 * length) - 1 else value), end


def _riff_chunks(data: bytes) -> Iterator[int]:
    """A file beyond 1 GB has several, one behind the other."""
    start = 0
    while data[start : start + 4] == b"RIFF":
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if size == 0:
            raise TruncatedError("it was never finished")
        yield start + 8 + size
        start += 8 + size + size % 2


def _gif_blocks(data: bytes) -> Iterator[int]:
    """GIF89a, 1990: a header, a table of colours, then blocks up to a trailer."""
    start = 13 + _gif_table(data, 10)
    yield start
    while True:
        kind = data[start] if start < len(data) else None
        yield start + 1
        if kind == _GIF_TRAILER:
            return
        if kind == _GIF_EXTENSION:
            start += 2  # its label
        elif kind == _GIF_IMAGE:
            start += 10 + _gif_table(data, start + 9) + 1  # the code size
        else:
            raise TruncatedError(f"a block of unknown kind {kind}")
        while start < len(data) and data[start]:
            start += 1 + data[start]
        start += 1  # the empty sub-block
        yield start


def _gif_table(data: bytes, flags_at: int) -> int:
    """Bytes of the table of colours that these flags announce."""
    flags = data[flags_at] if flags_at < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
