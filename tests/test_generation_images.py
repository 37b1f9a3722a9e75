"""Images are decoded to the end before they are believed, and within limits."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cacheserver.errors import UpstreamBadImageError
from cacheserver.generation.images import asked_size, inspect, inspect_in_thread
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.providers.openai import Endpoint, OpenAIUpstream
from cacheserver.images import BadImageError, ImageFacts
from cacheserver.model import ImageRequest
from tests.fakes import FakeClock
from tests.provider import API_KEY, OpenAIStandIn, large_png, small_image

FORMATS = ("png", "jpeg", "webp")
PICTURES = {image_format: small_image(7, image_format) for image_format in FORMATS}


def look(data: bytes, *, max_pixels: int = 10_000, max_bytes: int = 1_000_000, expect: str | None = None) -> ImageFacts:
    return inspect(data, max_pixels=max_pixels, max_bytes=max_bytes, expect_format=expect)


def encoded(picture: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=image_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("image_format", FORMATS)
def test_facts_come_from_the_decoded_picture(image_format: str) -> None:
    data = PICTURES[image_format]
    facts = look(data, expect=image_format)
    assert facts == ImageFacts(f"image/{image_format}", 64, 48, hashlib.sha256(data).hexdigest())


async def test_the_thread_helper_says_the_same() -> None:
    data = PICTURES["png"]
    assert await inspect_in_thread(data, max_pixels=10_000, max_bytes=1_000) == look(data)


@given(image_format=st.sampled_from(FORMATS), kept=st.floats(0, 1, exclude_max=True))
def test_every_cut_off_file_is_refused(image_format: str, kept: float) -> None:
    data = PICTURES[image_format]
    with pytest.raises(BadImageError):
        look(data[: int(len(data) * kept)])


@pytest.mark.parametrize("image_format", FORMATS)
def test_losing_only_the_last_byte_is_noticed(image_format: str) -> None:
    with pytest.raises(BadImageError):
        look(PICTURES[image_format][:-1])


def test_a_large_file_cut_in_the_middle_is_refused() -> None:
    data = large_png(1, 300_000)
    with pytest.raises(BadImageError):
        look(data[: len(data) // 2], max_pixels=1_000_000)


@given(position=st.integers(min_value=60), flip=st.integers(1, 255))
def test_a_flipped_byte_in_a_png_is_refused_or_leaves_the_size_alone(position: int, flip: int) -> None:
    damaged = bytearray(PICTURES["png"])
    damaged[position % len(damaged)] ^= flip
    try:
        facts = look(bytes(damaged))
    except BadImageError:
        return
    assert (facts.width, facts.height) == (64, 48)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_image_are_refused_without_quoting_them(data: bytes) -> None:
    with pytest.raises(BadImageError) as caught:
        look(data)
    assert str(caught.value) == "the bytes are not a whole PNG, JPEG or WebP image"
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("image_format", ["gif", "bmp", "tiff", "ppm"])
def test_other_formats_are_refused(image_format: str) -> None:
    with pytest.raises(BadImageError):
        look(encoded(Image.new("RGB", (8, 8)), image_format))


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_picture_with_too_many_pixels_is_refused(image_format: str) -> None:
    with pytest.raises(BadImageError, match="at most 3071 pixels"):
        look(PICTURES[image_format], max_pixels=64 * 48 - 1)


def test_a_header_that_claims_a_gigapixel_is_refused_before_decoding() -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(BadImageError, match="pixels"):
        look(bomb + PICTURES["png"][33:])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_size_between_our_limit_and_pillows_is_refused_by_ours() -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    large = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(BadImageError, match="10000x10000"):
        look(large + PICTURES["png"][33:])


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"icc_profile": b"x" * 128}])
def test_the_size_of_a_webp_is_read_before_its_decoder_is_made(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.new("RGB", (300, 200)), "webp", **options)
    assert look(data, max_pixels=60_000).width == 300
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded all the same"))
    with pytest.raises(BadImageError, match="300x200"):
        look(data, max_pixels=59_999)


def test_a_webp_of_a_kind_nobody_knows_is_refused() -> None:
    with pytest.raises(BadImageError):
        look(b"RIFF\x16\0\0\0WEBPVP9 " + bytes(14))


def test_a_file_with_too_many_bytes_is_refused() -> None:
    data = PICTURES["png"]
    assert look(data, max_bytes=len(data))
    with pytest.raises(BadImageError, match="at most"):
        look(data, max_bytes=len(data) - 1)


def test_a_picture_of_another_format_than_asked_for_is_refused() -> None:
    with pytest.raises(BadImageError, match="image/webp; image/png was asked for"):
        look(PICTURES["webp"], expect="png")


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_animations_are_refused(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    with pytest.raises(BadImageError, match="animation"):
        look(encoded(frames[0], image_format, save_all=True, append_images=frames[1:]))


def test_a_progressive_jpeg_is_taken_whole_and_refused_without_its_last_scan() -> None:
    noise = Image.effect_noise((64, 48), 50).convert("RGB")
    data = encoded(noise, "jpeg", progressive=True)
    assert look(data, expect="jpeg").width == 64
    with pytest.raises(BadImageError):
        look(data[: data.rfind(b"\xff\xda")])


def test_a_phones_jpeg_with_a_second_picture_is_a_jpeg() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "mpo", save_all=True, append_images=frames[1:])
    assert look(data, expect="jpeg").content_type == "image/jpeg"


# --- what was asked for


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_picture_of_another_size_than_asked_for_is_refused(image_format: str) -> None:
    data = PICTURES[image_format]
    assert inspect(data, max_pixels=10_000, max_bytes=10_000, expect_size=(64, 48)).width == 64
    with pytest.raises(BadImageError, match="the image is 64x48; 48x64 was asked for"):
        inspect(data, max_pixels=10_000, max_bytes=10_000, expect_size=(48, 64))


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ("1024x1536", (1024, 1536)),
        ("auto", None),
        ("", None),
        ("square", None),
        ("1024", None),
        ("0x64", None),
        ("64x48 ", None),
        ("100000x1", None),
        ("\uff16\uff14x48", None),
    ],
)
def test_a_size_is_asked_for_where_the_request_names_one(size: str, pixels: tuple[int, int] | None) -> None:
    assert asked_size(size) == pixels


def hidden(colours: Image.Image) -> Image.Image:
    """Any colours, none of which is to be seen."""
    colours.putalpha(0)
    return colours


def palette_of_one_colour() -> Image.Image:
    picture = Image.new("P", (64, 48))
    picture.putpalette([9, 9, 9] * 256)
    picture.paste(7, (0, 0, 32, 48))
    return picture


BLANK: Mapping[str, Image.Image] = {
    "white": Image.new("RGB", (64, 48), "white"),
    "grey": Image.new("L", (640, 480), 77),
    "one pixel": Image.new("RGBA", (1, 1), "red"),
    "half transparent": Image.new("RGBA", (64, 48), (1, 2, 3, 128)),
    "nothing to be seen": hidden(Image.effect_noise((64, 48), 50).convert("RGB")),
    "no grey to be seen": hidden(Image.effect_noise((64, 48), 50)),
    "sixteen bits": Image.new("I;16", (64, 48), 40_000),
    "two entries of a palette": palette_of_one_colour(),
}


def look_for_blank(data: bytes) -> ImageFacts:
    return inspect(data, max_pixels=1_000_000, max_bytes=1_000_000, allow_blank=False)


@pytest.mark.parametrize("picture", BLANK.values(), ids=BLANK.keys())
def test_a_blank_picture_is_refused_where_it_matters(picture: Image.Image) -> None:
    data = encoded(picture, "png")
    with pytest.raises(BadImageError, match="blank"):
        look_for_blank(data)
    assert look(data, max_pixels=1_000_000).width == picture.width


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
@pytest.mark.parametrize("colour", ["white", "grey", "black"])
@pytest.mark.parametrize("quality", [30, 75, 100])
def test_a_blank_picture_is_noticed_in_lossy_formats(image_format: str, colour: str, quality: int) -> None:
    with pytest.raises(BadImageError, match="blank"):
        look_for_blank(encoded(Image.new("RGB", (500, 333), colour), image_format, quality=quality))


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_pale_picture_is_no_blank(image_format: str) -> None:
    pale = Image.new("RGB", (64, 48), (250, 250, 250))
    pale.paste((240, 240, 240), (0, 0, 32, 48))
    assert look_for_blank(encoded(pale, image_format)).width == 64


def test_a_key_colour_that_hides_every_pixel_leaves_a_blank() -> None:
    with pytest.raises(BadImageError, match="blank"):
        look_for_blank(encoded(Image.new("RGB", (64, 48), "white"), "png", transparency=(255, 255, 255)))


@given(x=st.integers(0, 399), y=st.integers(0, 299), mode=st.sampled_from(["1", "L", "LA", "RGB", "RGBA", "I;16"]))
def test_a_single_other_pixel_makes_a_picture(x: int, y: int, mode: str) -> None:
    picture = Image.new(mode, (400, 300))
    picture.putpixel((x, y), (1, 2, 3, 4)[: len(picture.getbands())] if len(picture.getbands()) > 1 else 1)
    assert look_for_blank(encoded(picture, "png")).width == 400


def test_a_silhouette_is_no_blank() -> None:
    silhouette = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    silhouette.paste((0, 0, 0, 255), (10, 10, 20, 20))
    assert look_for_blank(encoded(silhouette, "png")).width == 64


@pytest.mark.parametrize(
    ("answered", "wrong"),
    [
        (small_image(1, size=(48, 64)), "48x64; 64x48 was asked for"),
        (encoded(Image.new("RGB", (64, 48)), "png"), "blank"),
    ],
    ids=["another size", "blank"],
)
async def test_a_provider_must_answer_with_the_size_asked_for_and_not_with_a_blank(
    clock: FakeClock, answered: bytes, wrong: str
) -> None:
    request = ImageRequest("a red fox", "qwen-image", size="64x48")
    async with OpenAIStandIn() as provider:
        endpoint = Endpoint(
            name="main", base_url=provider.base_url, api_key=lambda: API_KEY, models={request.model: request.model}
        )
        upstream = OpenAIUpstream(endpoint, prices=PriceTable.load(), clock=clock)
        item = {"b64_json": base64.b64encode(answered).decode()}
        provider.edit_next(lambda answer: answer.update(data=[item]))
        with pytest.raises(UpstreamBadImageError, match=wrong):
            await upstream.generate(request, [0])
        [image] = await upstream.generate(request, [0])
        assert (image.width, image.height) == (64, 48)
        await upstream.aclose()
