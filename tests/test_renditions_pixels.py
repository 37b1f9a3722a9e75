"""A picture in another size, format or compression looks like itself."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageStat

from cacheserver.errors import InvalidRequestError
from cacheserver.images import BadImageError, ImageFacts
from cacheserver.model import Rendition
from cacheserver.renditions import metadata, pixels
from tests.renditions_pictures import decoded, encoded, scene

FORMATS = ("png", "jpeg", "webp")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def render(data: bytes, *, max_pixels: int = 1_000_000, **wanted: Any) -> tuple[bytes, ImageFacts]:
    return pixels.render(data, Rendition(**wanted), max_pixels=max_pixels, max_bytes=10_000_000)


def difference(one: Image.Image, other: Image.Image) -> float:
    """How many levels (of 255) two pictures are apart in the mean, where they are most."""
    return max(ImageStat.Stat(ImageChops.difference(one.convert("RGB"), other.convert("RGB"))).mean)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("stored", FORMATS)
def test_a_smaller_picture_of_any_format_looks_as_pillow_makes_it(stored: str, wanted: str) -> None:
    image = scene(300, 200)
    made, facts = render(encoded(image, stored.upper(), quality=95), width=150, output_format=wanted)
    assert (facts.content_type, facts.width, facts.height) == (f"image/{wanted}", 150, 100)
    assert decoded(made).size == (150, 100)
    assert difference(decoded(made), image.resize((150, 100), Image.Resampling.LANCZOS)) < 4


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    most_width=st.none() | st.integers(1, 100),
    most_height=st.none() | st.integers(1, 100),
)
def test_a_picture_fits_its_box_keeps_its_shape_and_never_grows(
    width: int, height: int, most_width: int | None, most_height: int | None
) -> None:
    made, facts = render(encoded(Image.new("L", (width, height))), width=most_width, height=most_height)
    assert decoded(made).size == (facts.width, facts.height)
    assert 1 <= facts.width <= min(width, most_width or width)
    assert 1 <= facts.height <= min(height, most_height or height)
    by_width = facts.height == 1 or abs(facts.height - height * facts.width / width) <= 0.5
    by_height = facts.width == 1 or abs(facts.width - width * facts.height / height) <= 0.5
    assert by_width or by_height
    fits = (most_width or width) >= width and (most_height or height) >= height
    assert fits or facts.width == most_width or facts.height == most_height


@pytest.mark.parametrize("stored", FORMATS)
def test_what_would_change_nothing_is_the_master_itself(stored: str) -> None:
    data = encoded(scene(60, 40), stored.upper(), exif=exif(1))
    for wanted in ({}, {"width": 60}, {"width": 900, "height": 900}, {"output_format": stored}):
        assert render(data, **wanted)[0] is data


def test_png_has_no_compression_to_ask_for() -> None:
    data = encoded(scene(60, 40))
    assert render(data, output_compression=30)[0] is data


@pytest.mark.parametrize("wanted", ["jpeg", "webp"])
def test_more_compression_makes_a_smaller_file(wanted: str) -> None:
    data = encoded(scene(120, 120))
    sizes = [len(render(data, output_format=wanted, output_compression=share)[0]) for share in (0, 30, 80, 100)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    assert len(render(data, output_format=wanted)[0]) == sizes[2]


def test_a_lossy_picture_can_be_compressed_further() -> None:
    data = encoded(scene(120, 120), "WEBP", quality=95)
    assert len(render(data, output_compression=20)[0]) < len(data)


@pytest.mark.parametrize("wanted", ["png", "webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_kept(mode: str, wanted: str) -> None:
    image = scene(64, 64, mode)
    image.putalpha(Image.linear_gradient("L").resize((64, 64)))
    made = decoded(render(encoded(image), width=32, output_format=wanted)[0])
    expected = image.resize((32, 32), Image.Resampling.LANCZOS).getchannel("A")
    assert difference(made.getchannel("A"), expected) < 4


def test_jpeg_has_no_transparency() -> None:
    image = scene(8, 8, "RGBA")
    image.putpixel((3, 3), (1, 2, 3, 254))
    with pytest.raises(InvalidRequestError, match="format: jpeg has no transparency"):
        render(encoded(image), output_format="jpeg")


@pytest.mark.parametrize("wanted", FORMATS)
def test_an_alpha_channel_that_hides_nothing_is_dropped(wanted: str) -> None:
    made = decoded(render(encoded(scene(64, 64, "RGBA")), width=32, output_format=wanted)[0])
    assert made.mode == "RGB"


@pytest.mark.parametrize("wanted", FORMATS)
def test_a_palette_becomes_the_colours_it_stands_for(wanted: str) -> None:
    image = scene(64, 64).quantize(64)
    made = decoded(render(encoded(image), width=32, output_format=wanted, output_compression=95)[0])
    assert difference(made, image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)) < 4


def test_a_transparent_colour_of_a_palette_stays_transparent() -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 32, 64))
    made = decoded(render(encoded(image, transparency=0), width=32, output_format="png")[0])
    assert (made.getpixel((4, 4)), made.getpixel((28, 4))[3]) == ((255, 0, 0, 255), 0)


@pytest.mark.parametrize("wanted", FORMATS)
def test_sixteen_bits_become_eight(wanted: str) -> None:
    deep = Image.new("I;16", (64, 64), 40_000)
    made = decoded(render(encoded(deep), width=32, output_format=wanted)[0])
    assert difference(made, Image.new("L", (32, 32), 40_000 // 256)) <= 1


@pytest.mark.parametrize("wanted", FORMATS)
def test_black_and_white_becomes_grey(wanted: str) -> None:
    image = Image.new("1", (64, 64), 1)
    made = decoded(render(encoded(image), width=32, output_format=wanted)[0])
    assert difference(made, Image.new("L", (32, 32), 255)) <= 1


def test_cmyk_stays_cmyk_in_jpeg_and_becomes_rgb_elsewhere() -> None:
    data = encoded(scene(64, 64, "CMYK"), "JPEG", quality=95)
    kept = decoded(render(data, width=32)[0])
    assert kept.mode == "CMYK"
    made = decoded(render(data, width=32, output_format="png")[0])
    assert made.mode == "RGB"
    assert difference(made, kept.convert("RGB")) < 6


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("wanted", FORMATS)
def test_the_colour_profile_is_always_kept(wanted: str, strip: bool) -> None:  # noqa: FBT001 - a parameter of the test
    data = encoded(scene(64, 64), icc_profile=SRGB)
    made = render(data, width=32, output_format=wanted, strip=strip)[0]
    assert decoded(made).info["icc_profile"] == SRGB
    assert decoded(render(data, strip=True)[0]).info["icc_profile"] == SRGB


def test_a_profile_of_other_colours_than_the_pictures_is_left_out() -> None:
    made = render(encoded(scene(64, 64, "L"), icc_profile=SRGB), width=32)[0]
    assert "icc_profile" not in decoded(made).info


def test_colours_that_the_format_cannot_hold_are_those_of_their_profile_in_srgb() -> None:
    grey = bytearray(SRGB)
    grey[16:20] = b"GRAY"  # no profile of grey, though it says so: then the plain way is taken
    made = decoded(render(encoded(scene(64, 64, "L"), icc_profile=bytes(grey)), output_format="webp")[0])
    assert "icc_profile" not in made.info
    assert difference(made, scene(64, 64, "L")) < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_measured_as_it_is_shown(orientation: int) -> None:
    """With its EXIF it stays as it lies; without, it is set upright."""
    lying = scene(60, 40)
    data = encoded(lying, "JPEG", quality=95, exif=exif(orientation))
    shown = pixels._TURNS.get(orientation)
    upright = lying if shown is None else lying.transpose(shown)
    bare = decoded(render(data, width=20, strip=True, output_format="png")[0])
    small = upright.resize(bare.size, Image.Resampling.LANCZOS)
    assert bare.width == 20
    assert difference(bare, small) < 5
    kept = decoded(render(data, width=20, output_format="png")[0])
    assert kept.getexif()[0x0112] == orientation
    again = kept if shown is None else kept.transpose(shown)
    assert again.size == bare.size
    assert difference(again, small) < 5


@pytest.mark.parametrize("hostile", [b"", b"MM", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0" + b"\xff" * 60])
def test_hostile_exif_says_nothing(hostile: bytes) -> None:
    chunk = struct.pack(">I4s", len(hostile), b"eXIf") + hostile
    data = encoded(scene(60, 40))
    at = data.index(b"IDAT") - 4
    made, facts = render(data[:at] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + data[at:], width=30)
    assert decoded(made).size == (facts.width, facts.height) == (30, 20)


@pytest.mark.parametrize("stored", FORMATS)
def test_stripping_alone_leaves_the_pixels_as_they_are(stored: str) -> None:
    image = scene(60, 40)
    plain, told = (encoded(image, stored.upper(), quality=80, **more) for more in ({}, {"exif": exif(1)}))
    bare, facts = render(told, strip=True)
    assert metadata.read(bare) == metadata.Metadata()
    assert len(bare) < len(told)
    assert decoded(bare).tobytes() == decoded(plain).tobytes()
    assert (facts.content_type, facts.width, facts.height) == (f"image/{stored}", 60, 40)


def test_texts_and_comments_do_not_come_along() -> None:
    told = encoded(scene(60, 40), "JPEG", comment=b"a secret")
    assert b"a secret" not in render(told, strip=True)[0]
    assert b"a secret" not in render(told, width=30)[0]


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"width": 0}, "width"),
        ({"height": -1}, "height"),
        ({"output_format": "gif"}, "format"),
        ({"output_compression": 101}, "output_compression"),
    ],
)
def test_a_rendition_that_cannot_be_is_refused_by_its_field(wanted: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(encoded(scene(8, 8)), **wanted)
    assert list(caught.value.violations) == [field]


def test_webp_that_cannot_be_so_large_is_refused() -> None:
    data = encoded(Image.new("L", (16_384, 1)))
    with pytest.raises(InvalidRequestError, match="16383 pixels a side"):
        render(data, output_format="webp")


def test_a_picture_of_too_many_pixels_is_not_decoded() -> None:
    with pytest.raises(BadImageError, match="at most 99 pixels"):
        render(encoded(scene(10, 10)), max_pixels=99, width=5)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"\xff\xd8\xff", encoded(scene(60, 40))[:-20]])
def test_what_is_no_whole_picture_is_refused(data: bytes) -> None:
    with pytest.raises(BadImageError):
        render(data, width=5)
