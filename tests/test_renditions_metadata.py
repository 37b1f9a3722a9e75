"""What a file says of itself comes along into every format, and hostile files do no harm."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cacheserver.model import Rendition
from cacheserver.renditions import metadata, pixels
from cacheserver.renditions.metadata import Metadata
from tests.renditions_pictures import decoded, encoded, scene

FORMATS = ("png", "jpeg", "webp")
XMP = b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/">a cat</x:xmpmeta><?xpacket end="w"?>'
C2PA_UUID = bytes.fromhex("6332706100110010800000aa00389b71")


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x010E] = "a cat"
    tags[0x0112] = 6
    return tags.tobytes().removeprefix(b"Exif\0\0")


def manifest_store(size: int = 500) -> bytes:
    """A JUMBF superbox that begins as C2PA's do."""
    described = struct.pack(">I4s16s", 8 + 16 + 6, b"jumd", C2PA_UUID) + b"\3c2pa\0"
    held = described + bytes(itertools.islice(itertools.cycle(range(256)), size))
    return struct.pack(">I4s", 8 + len(held), b"jumb") + held


EVERYTHING = Metadata(exif(), XMP, manifest_store(200_000))


def with_metadata(image_format: str, told: Metadata = EVERYTHING) -> bytes:
    image = scene(60, 40)
    return metadata.embed(encoded(image, image_format.upper()), told, width=60, height=40)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize(
    "told", [EVERYTHING, Metadata(exif=exif()), Metadata(xmp=XMP), Metadata(c2pa=manifest_store(1)), Metadata()]
)
def test_what_is_embedded_is_read(image_format: str, told: Metadata) -> None:
    data = with_metadata(image_format, told)
    assert metadata.read(data) == told
    decoded(data)


@pytest.mark.parametrize("image_format", FORMATS)
def test_pillow_reads_it_too(image_format: str) -> None:
    image = decoded(with_metadata(image_format))
    assert (image.getexif()[0x010E], image.getexif()[0x0112]) == ("a cat", 6)
    assert image.info["exif"].removeprefix(b"Exif\0\0") == EVERYTHING.exif
    assert image.info["xmp"] == XMP
    assert image.tobytes() == decoded(encoded(scene(60, 40), image_format.upper())).tobytes()


@pytest.mark.parametrize("image_format", FORMATS)
def test_what_pillow_writes_is_read(image_format: str) -> None:
    written = {"pnginfo": PngInfo()} if image_format == "png" else {"xmp": XMP}
    if image_format == "png":
        written["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)  # type: ignore[attr-defined] # PngInfo
    data = encoded(scene(60, 40), image_format.upper(), exif=b"Exif\0\0" + exif(), **written)
    assert metadata.read(data) == Metadata(EVERYTHING.exif, XMP)


@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("stored", FORMATS)
def test_all_of_it_comes_along_into_another_size_and_format_unless_stripped(stored: str, wanted: str) -> None:
    data = with_metadata(stored)
    made, _ = pixels.render(data, Rendition(width=30, output_format=wanted), max_pixels=10_000, max_bytes=10_000_000)
    assert metadata.read(made) == EVERYTHING
    bare, _ = pixels.render(
        data, Rendition(width=30, output_format=wanted, strip=True), max_pixels=10_000, max_bytes=10_000_000
    )
    assert metadata.read(bare) == Metadata()


@pytest.mark.parametrize("image_format", FORMATS)
def test_with_a_profile_and_transparency_it_is_read_as_well(image_format: str) -> None:
    image = scene(60, 40, "RGB" if image_format == "jpeg" else "RGBA")
    if image.mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize((60, 40)))
    data = metadata.embed(
        encoded(image, image_format.upper(), icc_profile=b"a profile"), EVERYTHING, width=60, height=40
    )
    assert metadata.read(data) == EVERYTHING
    read = decoded(data)
    assert (read.mode, read.info["icc_profile"]) == (image.mode, b"a profile")
    bare = metadata.stripped(data)
    assert bare is not None
    assert metadata.read(bare) == Metadata()
    read = decoded(bare)
    assert (read.mode, read.info["icc_profile"]) == (image.mode, b"a profile")


def test_a_manifest_of_many_segments_is_joined_in_the_order_of_their_numbers() -> None:
    store = manifest_store(200_000)
    data = with_metadata("jpeg", Metadata(c2pa=store))
    segments = list(app11(data))
    assert len(segments) == 4
    assert all(len(segment) <= 2 + 65_535 for segment in segments)
    # Each repeats the header of the whole box: number of the box, of the segment, and length and kind of the box.
    assert [segment[4:20] for segment in segments] == [
        b"JP" + struct.pack(">HI", 1, number) + store[:8] for number in (1, 2, 3, 4)
    ]
    begin = data.index(segments[0])
    rest = data[begin + sum(map(len, segments)) :]
    assert metadata.read(data[:begin] + b"".join(reversed(segments)) + rest).c2pa == store
    for missing in range(4):
        some = b"".join(segments[:missing] + segments[missing + 1 :])
        assert metadata.read(data[:begin] + some + rest).c2pa is None


def app11(data: bytes) -> Iterator[bytes]:
    for marker, begin, end in metadata._jpeg_segments(data):
        if marker == 0xEB:
            yield data[begin:end]


def test_a_box_whose_length_takes_eight_bytes_is_read() -> None:
    small = manifest_store(200_000)
    large = struct.pack(">I4sQ", 1, b"jumb", 16 + len(small) - 8) + small[8:]
    for image_format in FORMATS:
        assert metadata.read(with_metadata(image_format, Metadata(c2pa=large))).c2pa == large


@pytest.mark.parametrize("box", [b"", b"jumb", manifest_store()[:-1], manifest_store().replace(C2PA_UUID, bytes(16))])
def test_what_is_no_manifest_store_is_none(box: bytes) -> None:
    for image_format in FORMATS:
        assert metadata.read(with_metadata(image_format, Metadata(c2pa=box))).c2pa is None


def test_what_does_not_fit_is_left_out() -> None:
    long_xmp = Metadata(exif=b"MM" + bytes(65_525), xmp=XMP + bytes(65_536), c2pa=manifest_store())
    assert long_xmp.fitting("png") == long_xmp.fitting("webp") == long_xmp
    assert long_xmp.fitting("jpeg") == Metadata(exif=long_xmp.exif, c2pa=long_xmp.c2pa)
    assert Metadata(exif=b"MM" + bytes(65_526)).fitting("jpeg") == Metadata()
    half = bytes(metadata.MAX_METADATA_BYTES // 2 + 1)
    assert Metadata(half, half, XMP).fitting("png") == Metadata(half, None, XMP)


def test_xmp_that_unpacks_to_too_much_is_left_out() -> None:
    bomb = zlib.compress(bytes(metadata.MAX_METADATA_BYTES + 1))
    held = b"XML:com.adobe.xmp\0\1\0\0\0" + bomb
    chunk = struct.pack(">I4s", len(held), b"iTXt") + held + bytes(4)
    data = encoded(scene(8, 8))
    assert metadata.read(data[:33] + chunk + data[33:]).xmp is None


@pytest.mark.parametrize("image_format", FORMATS)
@given(data=st.data())
def test_a_damaged_file_is_read_as_far_as_it_goes(image_format: str, data: st.DataObject) -> None:
    whole = bytearray(with_metadata(image_format, Metadata(exif(), XMP, manifest_store())))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)):
        whole[at] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    assert isinstance(metadata.read(cut), Metadata)
    assert isinstance(metadata.stripped(cut), bytes | None)


NAMES = st.sampled_from([b"eXIf", b"iTXt", b"caBX", b"IDAT", b"IEND", b"EXIF", b"XMP ", b"C2PA", b"VP8X", b"VP8L"])
HELD = st.binary(max_size=40) | st.just(b"XML:com.adobe.xmp\0\1\0") | st.just(manifest_store(3))
PIECES = st.lists(
    st.binary(max_size=12)
    | st.builds(lambda name, held: struct.pack(">I4s", len(held), name) + held + bytes(4), NAMES, HELD)
    | st.builds(lambda name, held: struct.pack("<4sI", name, len(held)) + held, NAMES, HELD)
    | st.builds(
        lambda marker, held: struct.pack(">BBH", 255, marker, len(held) + 2) + held,
        st.integers(0, 255),
        HELD | st.builds(lambda number, held: b"JP\0\1" + struct.pack(">I", number) + held, st.integers(0, 3), HELD),
    ),
    max_size=8,
)


@given(start=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\0\0WEBP", b"\xff\xd8", b"GIF"]), pieces=PIECES)
@example(start=b"\xff\xd8", pieces=[b"\xff" * 10_000])
@example(start=b"RIFF\xff\xff\0\0WEBP", pieces=[b"VP8X\0\0\0\0"])
def test_hostile_structures_raise_nothing(start: bytes, pieces: list[bytes]) -> None:
    data = start + b"".join(pieces)
    assert isinstance(metadata.read(data), Metadata)
    assert isinstance(metadata.stripped(data), bytes | None)


def test_a_file_of_many_tiny_chunks_takes_moments() -> None:
    chunk = struct.pack(">I4s", 0, b"tEXt") + bytes(4)
    assert metadata.read(b"\x89PNG\r\n\x1a\n" + chunk * 100_000) == Metadata()
    assert metadata.read(b"\xff\xd8" + b"\xff\xeb\0\2" * 100_000) == Metadata()


def test_a_stripped_webp_says_in_its_header_that_nothing_is_told() -> None:
    bare = metadata.stripped(with_metadata("webp"))
    assert bare is not None
    assert bare[12:16] == b"VP8X"
    assert bare[20] == 0
    assert int.from_bytes(bare[4:8], "little") == len(bare) - 8
    Image.open(io.BytesIO(bare)).load()
