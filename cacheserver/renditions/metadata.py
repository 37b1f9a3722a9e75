"""What an image file says of itself beside its pixels, carried from one container into another.

EXIF, XMP and C2PA, where each format keeps them:

            EXIF                     XMP                              C2PA manifest store
    PNG     eXIf                     iTXt "XML:com.adobe.xmp"         caBX
    JPEG    APP1 "Exif"              APP1 of Adobe's namespace        APP11 "JP", in as many segments as it takes
    WebP    EXIF                     "XMP "                           C2PA

after PNG third edition, Exif 3.0, XMP part 3, ISO/IEC 19566-5 annex D, the WebP container and C2PA 2.1 (embedding
manifests). A JPEG holds at most 65,527 bytes of EXIF and 65,504 of XMP; what does not fit is left out, as is what goes
beyond MAX_METADATA_BYTES in all. Extended XMP and JUMBF boxes that are not C2PA's are left out, too.

A C2PA manifest is bound to the very bytes it was signed for. In a file made from those, a validator finds the manifest
and its signature, tells who signed what, and reports that the content does not match (assertion.dataHash.mismatch):
the provenance of the master, not a valid credential of the rendition. Only whoever holds a signing key could make one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

MAX_METADATA_BYTES = 4 * 1024 * 1024
"""Most that is carried over in all."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP_KEYWORD = b"XML:com.adobe.xmp"
_PNG_SPEAKS_OF_ITSELF = frozenset({b"eXIf", b"iTXt", b"tEXt", b"zTXt", b"tIME", b"caBX"})

_SOI, _TEM, _SOS, _EOI, _APP0, _APP1, _APP11, _APP13, _COM = 0xD8, 0x01, 0xDA, 0xD9, 0xE0, 0xE1, 0xEB, 0xED, 0xFE
_RESTARTS = range(0xD0, 0xD8)
_JPEG_SPEAKS_OF_ITSELF = frozenset({_APP1, _APP11, _APP13, _COM})
_EXIF_HEADER = b"Exif\0\0"
_XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
_MAX_SEGMENT_BYTES = 65_535 - 2
"""Most that a JPEG segment holds: its length counts itself."""

_JUMBF_MARK = b"JP"
_SEQUENCE_BYTES = 8
"""Of an APP11 segment: the mark, the number of the box and that of the segment."""

_BOX_HEADER_BYTES, _LARGE_BOX_HEADER_BYTES = 8, 16
_C2PA_UUID = bytes.fromhex("6332706100110010800000aa00389b71")

_RIFF_HEADER_BYTES = 12
_VP8X_BYTES = 10
_HAS_EXIF, _HAS_XMP = 0x08, 0x04
_WEBP_SPEAKS_OF_ITSELF = frozenset({b"EXIF", b"XMP ", b"C2PA"})


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a file says of itself; None where it says nothing. `exif` begins with its TIFF header."""

    exif: bytes | None = None
    xmp: bytes | None = None
    c2pa: bytes | None = None

    def fitting(self, image_format: str) -> Metadata:
        """As much of it as a file of this format ("png", "jpeg" or "webp") can hold."""
        left = MAX_METADATA_BYTES
        parts: list[bytes | None] = []
        in_segment = image_format == "jpeg"
        for part, header in ((self.exif, _EXIF_HEADER), (self.xmp, _XMP_HEADER), (self.c2pa, None)):
            most = left if header is None or not in_segment else min(left, _MAX_SEGMENT_BYTES - len(header))
            fits = part is not None and len(part) <= most
            parts.append(part if fits else None)
            left -= len(part) if part is not None and fits else 0
        return Metadata(*parts)


def read(data: bytes) -> Metadata:
    """What the file says of itself, as far as its container can be read. Raises nothing, whatever the bytes are."""
    found: dict[str, bytes] = {}
    # What is damaged ends the reading; what came before it counts.
    with suppress(_DamagedError):
        for name, part in _found(data):
            found.setdefault(name, part)
    return Metadata(**found)


def embed(data: bytes, metadata: Metadata, *, width: int, height: int) -> bytes:
    """An image as one of our encoders made it, without metadata, with `metadata` in it.

    `metadata` is `fitting` for the format. `width` and `height` are the image's.
    """
    if metadata == Metadata():
        return data
    if data.startswith(_PNG_SIGNATURE):
        return _with_png_chunks(data, metadata)
    if data.startswith(b"RIFF"):
        return _with_webp_chunks(data, metadata, width=width, height=height)
    return _with_jpeg_segments(data, metadata)


def stripped(data: bytes) -> bytes | None:
    """The same file, pixels as they are, without what it says of itself; None if its container is damaged.

    Comments and texts go, too. The colour profile stays.
    """
    try:
        if data.startswith(_PNG_SIGNATURE):
            kept = (chunk for name, chunk, _ in _png_chunks(data) if name not in _PNG_SPEAKS_OF_ITSELF)
            return _PNG_SIGNATURE + b"".join(kept)
        if data.startswith(b"RIFF"):
            return _stripped_webp(data)
        return _stripped_jpeg(data)
    except _DamagedError:
        return None


class _DamagedError(ValueError):
    """A container that cannot be read on."""


def _found(data: bytes) -> Iterator[tuple[str, bytes]]:
    if data.startswith(_PNG_SIGNATURE):
        return _found_in_png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _found_in_webp(data)
    if data.startswith(b"\xff\xd8"):
        return _found_in_jpeg(data)
    return iter(())


# ── PNG ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Each chunk: its name, all of it, and what it holds. Ends with IEND."""
    at = len(_PNG_SIGNATURE)
    name = b""
    while name != b"IEND":
        length = int.from_bytes(data[at : at + 4])
        end = at + 12 + length
        if at + 12 > len(data) or end > len(data):
            raise _DamagedError
        name = data[at + 4 : at + 8]
        yield name, data[at:end], data[at + 8 : end - 4]
        at = end


def _found_in_png(data: bytes) -> Iterator[tuple[str, bytes]]:
    for name, _, held in _png_chunks(data):
        match name:
            case b"eXIf":
                yield "exif", held.removeprefix(_EXIF_HEADER)
            case b"iTXt" if (xmp := _xmp_in_text(held)) is not None:
                yield "xmp", xmp
            case b"caBX" if (store := _manifest_store(held)) is not None:
                yield "c2pa", store


def _xmp_in_text(held: bytes) -> bytes | None:
    """The XMP in an iTXt chunk: keyword, whether and how it is compressed, language, keyword in it, text."""
    keyword, _, rest = held.partition(b"\0")
    if keyword != _XMP_KEYWORD:
        return None
    is_compressed, texts = rest[:1] == b"\1", rest[2:]
    text = texts.partition(b"\0")[2].partition(b"\0")[2]
    return _unzipped(text) if is_compressed else text


def _unzipped(packed: bytes) -> bytes | None:
    unzip = zlib.decompressobj()
    try:
        plain = unzip.decompress(packed, MAX_METADATA_BYTES)
    except zlib.error:
        return None
    return plain if unzip.eof else None


def _with_png_chunks(data: bytes, metadata: Metadata) -> bytes:
    added = []
    if metadata.exif is not None:
        added.append(_png_chunk(b"eXIf", metadata.exif))
    if metadata.xmp is not None:
        added.append(_png_chunk(b"iTXt", _XMP_KEYWORD + bytes(5) + metadata.xmp))
    if metadata.c2pa is not None:
        added.append(_png_chunk(b"caBX", metadata.c2pa))
    parts = [_PNG_SIGNATURE]
    for name, chunk, _ in _png_chunks(data):
        if name == b"IDAT" and added:
            parts += added
            added = []
        parts.append(chunk)
    return b"".join(parts)


def _png_chunk(name: bytes, held: bytes) -> bytes:
    return b"".join((len(held).to_bytes(4), name, held, zlib.crc32(name + held).to_bytes(4)))


# ── JPEG ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Each segment before the first scan: its marker, where it begins and where it ends. The last is the scan's."""
    at, marker = 2, _SOI
    while marker != _SOS:
        if data[at : at + 1] != b"\xff":
            raise _DamagedError
        while data[at + 1 : at + 2] == b"\xff":  # any number of them may come before a marker
            at += 1
        marker = data[at + 1] if at + 1 < len(data) else _EOI
        if marker in (_EOI, _SOI, 0):
            raise _DamagedError
        is_bare = marker == _TEM or marker in _RESTARTS
        end = at + 2 + (0 if is_bare else int.from_bytes(data[at + 2 : at + 4]))
        if end > len(data) or (not is_bare and end < at + 4):
            raise _DamagedError
        yield marker, at, end
        at = end


def _found_in_jpeg(data: bytes) -> Iterator[tuple[str, bytes]]:
    boxes: dict[bytes, list[tuple[int, bytes]]] = {}
    for marker, begin, end in _jpeg_segments(data):
        held = data[begin + 4 : end]
        if marker == _APP1 and held.startswith(_EXIF_HEADER):
            yield "exif", held.removeprefix(_EXIF_HEADER)
        elif marker == _APP1 and held.startswith(_XMP_HEADER):
            yield "xmp", held.removeprefix(_XMP_HEADER)
        elif marker == _APP11 and held.startswith(_JUMBF_MARK):
            boxes.setdefault(held[2:4], []).append((int.from_bytes(held[4:8]), held[_SEQUENCE_BYTES:]))
    for pieces in boxes.values():
        store = _manifest_store(_joined(pieces))
        if store is not None:
            yield "c2pa", store


def _joined(pieces: list[tuple[int, bytes]]) -> bytes:
    """The box whose pieces these are: each begins with the header of the whole box. Empty if one is missing."""
    pieces.sort()
    if [number for number, _ in pieces] != list(range(1, len(pieces) + 1)):
        return b""
    first = pieces[0][1]
    header = _header_bytes(first)
    return b"".join([first, *(piece[header:] for _, piece in pieces[1:])])


def _header_bytes(box: bytes) -> int:
    return _LARGE_BOX_HEADER_BYTES if box[:4] == b"\0\0\0\1" else _BOX_HEADER_BYTES


def _manifest_store(box: bytes) -> bytes | None:
    """The C2PA manifest store that `box` begins with; None if it is none, or cut short.

    It is a JUMBF superbox, whose first box describes it and begins with C2PA's UUID.
    """
    header = _header_bytes(box)
    length = int.from_bytes(box[8:16]) if header == _LARGE_BOX_HEADER_BYTES else int.from_bytes(box[:4])
    length = length or len(box)  # 0: to the end
    described = box[header : header + _BOX_HEADER_BYTES + len(_C2PA_UUID)]
    is_store = box[4:8] == b"jumb" and described[4:8] == b"jumd" and described[_BOX_HEADER_BYTES:] == _C2PA_UUID
    return box[:length] if is_store and length <= len(box) else None


def _with_jpeg_segments(data: bytes, metadata: Metadata) -> bytes:
    added: list[bytes] = []
    if metadata.exif is not None:
        added.append(_jpeg_segment(_APP1, _EXIF_HEADER + metadata.exif))
    if metadata.xmp is not None:
        added.append(_jpeg_segment(_APP1, _XMP_HEADER + metadata.xmp))
    if metadata.c2pa is not None:
        added += _jumbf_segments(metadata.c2pa)
    marker, _, end = next(_jpeg_segments(data))
    at = end if marker == _APP0 else 2  # JFIF's own segment comes first
    return b"".join((data[:at], *added, data[at:]))


def _jumbf_segments(box: bytes) -> Iterable[bytes]:
    header = box[: _header_bytes(box)]
    step = _MAX_SEGMENT_BYTES - _SEQUENCE_BYTES - len(header)
    for number, begin in enumerate(range(len(header), len(box), step), start=1):
        piece = box[begin : begin + step]
        yield _jpeg_segment(_APP11, b"".join((_JUMBF_MARK, b"\0\1", number.to_bytes(4), header, piece)))


def _jpeg_segment(marker: int, held: bytes) -> bytes:
    return b"".join((b"\xff", marker.to_bytes(1), (len(held) + 2).to_bytes(2), held))


def _stripped_jpeg(data: bytes) -> bytes:
    parts = [data[:2]]
    end = 2
    for marker, begin, end in _jpeg_segments(data):
        if marker not in _JPEG_SPEAKS_OF_ITSELF:
            parts.append(data[begin:end])
    return b"".join((*parts, data[end:]))


# ── WebP ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Each chunk: its name, all of it, and what it holds."""
    at = _RIFF_HEADER_BYTES
    whole = min(len(data), int.from_bytes(data[4:8], "little") + 8)
    while at < whole:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + length
        if at + 8 > whole or end > whole:
            raise _DamagedError
        yield data[at : at + 4], data[at:end] + bytes(length % 2), data[at + 8 : end]
        at = end + length % 2


def _found_in_webp(data: bytes) -> Iterator[tuple[str, bytes]]:
    for name, _, held in _webp_chunks(data):
        match name:
            case b"EXIF":
                yield "exif", held.removeprefix(_EXIF_HEADER)
            case b"XMP ":
                yield "xmp", held
            case b"C2PA" if (store := _manifest_store(held)) is not None:
                yield "c2pa", store


def _with_webp_chunks(data: bytes, metadata: Metadata, *, width: int, height: int) -> bytes:
    chunks = {name: chunk for name, chunk, _ in _webp_chunks(data)}
    # Only a file in the extended format may hold more than pixels; what its first chunk says of them stays.
    head = chunks.pop(b"VP8X", None) or _webp_chunk(b"VP8X", bytes(4) + _less_one(width) + _less_one(height))
    flags = int(head[8])
    added = []
    if metadata.exif is not None:
        flags |= _HAS_EXIF
        added.append(_webp_chunk(b"EXIF", metadata.exif))
    if metadata.xmp is not None:
        flags |= _HAS_XMP
        added.append(_webp_chunk(b"XMP ", metadata.xmp))
    if metadata.c2pa is not None:
        added.append(_webp_chunk(b"C2PA", metadata.c2pa))
    return _webp_of([head[:8] + flags.to_bytes(1) + head[9:], *chunks.values(), *added])


def _stripped_webp(data: bytes) -> bytes:
    parts = []
    for name, chunk, held in _webp_chunks(data):
        if name == b"VP8X":
            if len(held) < _VP8X_BYTES:
                raise _DamagedError
            parts.append(chunk[:8] + (chunk[8] & ~(_HAS_EXIF | _HAS_XMP)).to_bytes(1) + chunk[9:])
        elif name not in _WEBP_SPEAKS_OF_ITSELF:
            parts.append(chunk)
    return _webp_of(parts)


def _webp_of(chunks: list[bytes]) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _webp_chunk(name: bytes, held: bytes) -> bytes:
    return b"".join((name, len(held).to_bytes(4, "little"), held, bytes(len(held) % 2)))


def _less_one(side: int) -> bytes:
    return (side - 1).to_bytes(3, "little")
