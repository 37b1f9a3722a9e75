"""A picture in another size, format or compression: what happens to its pixels.

The encoders' settings are the fastest that cost little, see scripts/bench/renditions.py. Of a picture of 1024x1024,
WebP's method 0 takes a quarter of the time of its default, for files up to a quarter larger or smaller; PNG's
run-length strategy takes a seventh of the time of its default, for files as small of photographs and a tenth larger of
drawings. Of photographs with much grain WebP's method 0 is only 0.92 like its default (SSIM; 0.97 of smooth ones), and
0.01 less like the original; method 2 would be 0.96 like it, and take half as long again.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Mapping
from types import MappingProxyType

from PIL import Image, ImageCms

from cacheserver.errors import InvalidRequestError
from cacheserver.images import CONTENT_TYPES, ImageFacts, decoding, opened
from cacheserver.model import ImageBytes, Rendition
from cacheserver.renditions import metadata
from cacheserver.renditions.metadata import Metadata

DEFAULT_COMPRESSION = 80
"""The `output_compression` of jpeg and webp where none is asked for."""

FORMATS = ("png", "jpeg", "webp")
"""The formats a rendition may have."""

_LOSSY = frozenset({"jpeg", "webp"})
_MAX_WEBP_SIDE = 16_383

_DRAFT = 2.0
"""A JPEG may be decoded smaller than it is, but no smaller than so many times what is wanted."""

_REDUCING_GAP = 1.0
"""A picture is made smaller by plain averages as far as a whole number divides it, and by LANCZOS from there.

Halving one of 1536x1024 takes 3 ms like this and 27 ms by LANCZOS alone; they are 0.99 alike (SSIM).
"""

_ORIENTATION = 0x0112
_TURNS: Mapping[int, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
"""What sets a picture upright, by its EXIF orientation; 1 is upright."""

_LYING = frozenset({5, 6, 7, 8})

_SPACES: Mapping[str, bytes] = MappingProxyType(
    {"L": b"GRAY", "LA": b"GRAY", "RGB": b"RGB ", "RGBA": b"RGB ", "CMYK": b"CMYK"}
)
"""How an ICC profile spells the colours of each mode."""

_MODES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "png": frozenset({"L", "LA", "RGB", "RGBA"}),
        "jpeg": frozenset({"L", "RGB", "CMYK"}),
        "webp": frozenset({"RGB", "RGBA"}),
    }
)
"""What each format can hold."""


def check(rendition: Rendition) -> None:
    """Return if such a rendition can be had of some picture.

    Raises:
        InvalidRequestError: it cannot.
    """
    wrong: dict[str, str] = {}
    for name, side in (("width", rendition.width), ("height", rendition.height)):
        if side is not None and side < 1:
            wrong[name] = "must be at least 1 pixel"
    if rendition.output_format is not None and rendition.output_format not in FORMATS:
        wrong["format"] = f"must be one of {', '.join(FORMATS)}"
    if rendition.output_compression is not None and not 0 <= rendition.output_compression <= 100:  # noqa: PLR2004 - percent
        wrong["output_compression"] = "must be 0 to 100"
    if wrong:
        raise InvalidRequestError(wrong)


def is_master(width: int, height: int, content_type: str, rendition: Rendition) -> bool:
    """Whether a picture of this size and type is its own rendition, as far as these tell."""
    picture_format = content_type.removeprefix("image/")
    wanted = rendition.output_format or picture_format
    is_compressed = rendition.output_compression is not None and wanted in _LOSSY
    if wanted != picture_format or is_compressed or rendition.strip:
        return False
    # Turned by its EXIF orientation it would have to fit as well.
    sides = [side for side in (rendition.width, rendition.height) if side is not None]
    return all(max(width, height) <= side for side in sides)


def render(data: ImageBytes, rendition: Rendition, *, max_pixels: int, max_bytes: int) -> tuple[bytes, ImageFacts]:
    """`data` as `rendition` wants it, and what that is. Takes tens of milliseconds: call it in a thread.

    Where that changes nothing, it is `data` itself. The box is meant as the picture is shown: one that its EXIF
    orientation turns is measured turned, and is set upright where its EXIF is left out. Colours keep their profile;
    those that the format cannot hold (CMYK but in jpeg, grey in webp) become sRGB. Samples of 16 bits become 8.

    Raises:
        InvalidRequestError: this picture cannot be had like that.
        BadImageError: `data` is not a whole still image within the limits, see `images.opened`.
    """
    check(rendition)
    data = bytes(data)  # a view is copied: its containers are searched as only bytes can be
    with opened(data, max_pixels=max_pixels, max_bytes=max_bytes) as image:
        picture_format = CONTENT_TYPES[image.format or ""].removeprefix("image/")
        wanted = rendition.output_format or picture_format
        said = metadata.read(data)
        carried = Metadata() if rendition.strip else said.fitting(wanted)
        orientation = _orientation(said.exif)
        size = _within(image.size, rendition, is_lying=orientation in _LYING)
        turn = None if carried.exif is not None else _TURNS.get(orientation)
        is_compressed = rendition.output_compression is not None and wanted in _LOSSY
        if size == image.size and wanted == picture_format and not is_compressed:
            if not rendition.strip:
                return data, _facts(data, wanted, size)
            # What MPO appends has metadata of its own.
            bare = metadata.stripped(data) if turn is None and image.format != "MPO" else None
            if bare is not None:
                return bare, _facts(bare, wanted, size)
        if wanted == "webp" and max(size) > _MAX_WEBP_SIDE:
            raise InvalidRequestError({"format": f"webp holds at most {_MAX_WEBP_SIDE} pixels a side; ask for less"})
        with decoding(max_pixels=max_pixels):
            box = _draft(image, size)
            image.load()
        picture, profile = _in_mode_of(image, wanted)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=_REDUCING_GAP)
    if turn is not None:
        picture = picture.transpose(turn)
    made = metadata.embed(
        _encoded(picture, wanted, rendition.output_compression, profile),
        carried,
        width=picture.width,
        height=picture.height,
    )
    return made, _facts(made, wanted, picture.size)


def _facts(data: bytes, image_format: str, size: tuple[int, int]) -> ImageFacts:
    return ImageFacts(f"image/{image_format}", *size, hashlib.sha256(data).hexdigest())


def _orientation(exif: bytes | None) -> int:
    """The EXIF orientation, 1 where there is none to be read."""
    if exif is None:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        orientation = tags.get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - hostile EXIF makes Pillow raise anything; then it says nothing
        return 1
    return orientation if isinstance(orientation, int) else 1


def _within(size: tuple[int, int], rendition: Rendition, *, is_lying: bool) -> tuple[int, int]:
    """The size of a picture made to fit the box, never enlarged and in its shape: to the nearest pixel, 1 at least."""
    width, height = size
    most_width, most_height = rendition.width or max(size), rendition.height or max(size)
    if is_lying:
        most_width, most_height = most_height, most_width
    if width <= most_width and height <= most_height:
        return size
    if most_width * height <= most_height * width:  # its width decides
        return most_width, max(1, (2 * height * most_width + width) // (2 * width))
    return max(1, (2 * width * most_height + height) // (2 * height)), most_height


def _draft(image: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Have a JPEG decoded smaller where it is to be much smaller; where in what is decoded the picture lies."""
    drafted = image.draft(None, (int(size[0] * _DRAFT), int(size[1] * _DRAFT))) if size != image.size else None
    return (0, 0, *image.size) if drafted is None else drafted[1]


def _in_mode_of(image: Image.Image, wanted: str) -> tuple[Image.Image, bytes | None]:
    """The picture in a mode that the format holds, and the profile of its colours if they have one."""
    profile = image.info.get("icc_profile")
    picture = _simple(image)
    if picture.mode in {"LA", "RGBA"} and picture.getextrema()[-1] == (255, 255):
        picture = picture.convert(picture.mode[:-1])
    if wanted == "jpeg" and picture.mode in {"LA", "RGBA"}:
        raise InvalidRequestError({"format": "jpeg has no transparency and this picture does; ask for png or webp"})
    if profile is not None and profile[16:20] != _SPACES[picture.mode]:
        profile = None  # it speaks of other colours than these
    if picture.mode in _MODES[wanted] and (profile is None or len(profile) <= metadata.MAX_METADATA_BYTES):
        return picture, profile
    return _in_srgb(picture, profile), None


def _simple(image: Image.Image) -> Image.Image:
    """The picture in L, LA, RGB, RGBA or CMYK, 8 bits a sample."""
    if image.mode.startswith("I"):  # samples of 16 bits
        return image.point(lambda sample: sample / 256).convert("L")
    if image.mode in _SPACES and not image.has_transparency_data:
        return image
    if image.mode in {"1", "L"}:
        return image.convert("LA" if image.has_transparency_data else "L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    alpha = picture.getchannel("A") if picture.mode in {"LA", "RGBA"} else None
    opaque = picture if alpha is None else picture.convert(picture.mode[:-1])
    coloured = None if profile is None else _transformed(opaque, profile)
    coloured = coloured or opaque.convert("RGB")
    if alpha is not None:
        coloured.putalpha(alpha)
    return coloured


def _transformed(picture: Image.Image, profile: bytes) -> Image.Image | None:
    """In sRGB as its profile has it; None if the profile is damaged."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(picture, theirs, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _encoded(picture: Image.Image, wanted: str, compression: int | None, profile: bytes | None) -> bytes:
    quality = DEFAULT_COMPRESSION if compression is None else compression
    settings: dict[str, object] = {"icc_profile": profile} if profile else {}
    match wanted:
        case "png":
            settings |= {"compress_level": 1, "compress_type": zlib.Z_RLE}
        case "jpeg":
            settings |= {"quality": max(1, quality)}  # 0 is Pillow's word for its default
        case _:
            settings |= {"quality": quality, "method": 0}
    picture.info = {}  # of what the file said, nothing comes along but by `settings`
    out = io.BytesIO()
    picture.save(out, wanted.upper(), **settings)
    return out.getvalue()
