"""`POST /v1/images/edits`: pictures made from images that come with the request, as a form or as JSON.

An image is what its bytes say, never what a header calls it. It counts in the identity by its digest, so that the same
edit of the same images is answered from the cache like any other picture; its pixels are decoded where a picture has to
be made. None is fetched from anywhere: in JSON they come as `data:` URLs (RFC 2397).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from binascii import Error as NotBase64Error
from binascii import a2b_base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus

from starlette.requests import Request

from cacheserver.calls.asking import Asking
from cacheserver.calls.call import Call
from cacheserver.calls.uploads import Hold
from cacheserver.errors import InvalidRequestError
from cacheserver.http.answer import Answer
from cacheserver.http.body import read_json
from cacheserver.http.openai.multipart import FormReader
from cacheserver.http.openai.pictures import Pictures
from cacheserver.http.openai.reading import Fields, read_wanted, wrong, wrong_type
from cacheserver.http.openai.uploads import Uploads
from cacheserver.http.status import HttpError
from cacheserver.images import BadImageError, content_type_of, opened
from cacheserver.model import InputImage, InputRole, JsonValue

MAX_IMAGES = 16
MAX_IMAGE_BYTES = 50 * 1024 * 1024
MAX_MASK_BYTES = 4 * 1024 * 1024

_MAX_TEXT_BYTES = 128 * 1024
"""Of a field that is no image: the longest prompt, every character of four bytes, fits."""

_IMAGES, _MASK = ("image", "image[]"), "mask"
_MISNAMED = re.compile(r"images(?:\[[0-9]{0,3}\])?|image\[[0-9]{1,3}\]")
_LOOKED_AT_A_TIME = 2
"""To open a WebP takes memory for every pixel."""

_MAX_HEAD_CHARS = 128
"""What comes before a data: URL's content: a media type, and little more."""

_COPIES_OF_JSON = 3
"""How often the images of a JSON body are in memory while it is read: as bytes, as text, and parsed."""


@dataclass(frozen=True, slots=True)
class _Image:
    """An image as the request has it: `take` makes its bytes, and is called once, in a thread."""

    param: str
    take: Callable[[], bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Read:
    """What a body has: its parameters, and its images, not looked at yet, which are called `name` there."""

    name: str
    fields: Fields
    images: Sequence[_Image]
    mask: _Image | None


class Edits:
    """Makes pictures from pictures, or has them."""

    def __init__(self, pictures: Pictures, *, asking: Asking, uploads: Uploads, max_pixels: int) -> None:
        """`max_pixels` is the most that one input image may have."""
        self._pictures = pictures
        self._asking = asking
        self._uploads = uploads
        self._max_pixels = max_pixels
        self._turn = asyncio.Semaphore(_LOOKED_AT_A_TIME)

    async def __call__(self, request: Request, call: Call) -> Answer:
        """Answer one call."""
        with self._asking.booked(call):
            namespace = self._pictures.namespace(call)
            fields, inputs, params = await self._taken(request)
            wanted = read_wanted(fields, namespace, inputs)
            try:
                return await self._pictures.answer(request, call, namespace, wanted)
            except InvalidRequestError as error:
                raise _in_words_of(params, error) from error

    async def _taken(self, request: Request) -> tuple[Fields, tuple[InputImage, ...], list[str]]:
        """A body's parameters, its images, and what each of them is called there. Nothing else of it is kept."""
        with self._uploads.hold() as hold:
            read = await self._read(request, hold)
            inputs = await self._inputs(read)
            hold.hand_over(inputs)
        return read.fields, inputs, [image.param for image in (*read.images, read.mask) if image is not None]

    async def _read(self, request: Request, hold: Hold) -> _Read:
        content_type = request.headers.get("content-type", "")
        match content_type.partition(";")[0].strip().lower():
            case "multipart/form-data":
                return await self._read_form(request, content_type, hold)
            case "application/json":
                return await self._read_json(request, hold)
        text = "An edit comes as multipart/form-data, or as application/json; the header `content-type` says which."
        raise HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, text, code="unsupported_content_type")

    async def _read_form(self, request: Request, content_type: str, hold: Hold) -> _Read:
        reader = FormReader(content_type, max_bytes_of=_max_bytes)
        async for piece in self._uploads.pieces(request, hold):
            reader.feed(piece)
        images: list[_Image] = []
        masks: list[_Image] = []
        texts: dict[str, JsonValue] = {}
        for part in reader.end():
            if part.name in _IMAGES:
                images.append(_Image("image", part.take))
            elif part.name == _MASK:
                masks.append(_Image(_MASK, part.take))
            elif part.name in texts:
                raise wrong(part.name, f"Duplicate parameter: '{part.name}'.", "duplicate_parameter")
            else:
                texts[part.name] = _text(part.name, part.take())
        if len(masks) > 1:
            raise wrong(_MASK, "Duplicate parameter: 'mask'.", "duplicate_parameter")
        return _Read("image", Fields(texts, are_text=True), images, masks[0] if masks else None)

    async def _read_json(self, request: Request, hold: Hold) -> _Read:
        pieces = [piece async for piece in self._uploads.pieces(request, hold, copies=_COPIES_OF_JSON)]
        values = await asyncio.to_thread(_read_large_json, request, pieces)
        if values.get("image") is not None:
            text = """JSON has its images in 'images', each as {"image_url": "data:image/png;base64,..."}."""
            raise wrong("image", f"Unknown parameter: 'image'. {text}", "unknown_parameter")
        images = values.pop("images", None) or []
        mask = values.pop(_MASK, None)
        if not isinstance(images, list):
            raise wrong_type("images", list, images)
        return _Read(
            "images",
            Fields(values),
            [_image_in_json(f"images[{index}]", image) for index, image in enumerate(images)],
            _image_in_json(_MASK, mask) if mask is not None else None,
        )

    async def _inputs(self, read: _Read) -> tuple[InputImage, ...]:
        """The images in their order, then the mask."""
        if not read.images:
            raise wrong(read.name, f"Missing required parameter: '{read.name}'.", "missing_required_parameter")
        if len(read.images) > MAX_IMAGES:
            text = f"Invalid '{read.name}': expected at most {MAX_IMAGES} images, but got {len(read.images)}."
            raise wrong(read.name, text, "array_above_max_length")
        found = [await self._looked_at(image, InputRole.IMAGE) for image in read.images]
        if read.mask is not None:
            mask, size = await self._looked_at(read.mask, InputRole.MASK)
            _check_mask(mask, size, of=found[0][1])
            found.append((mask, size))
        return tuple(image for image, _ in found)

    async def _looked_at(self, image: _Image, role: InputRole) -> tuple[InputImage, tuple[int, int]]:
        look = partial(_look, image, role, max_pixels=self._max_pixels)
        try:
            async with self._turn:
                return await asyncio.to_thread(look)
        except BadImageError as error:
            raise wrong(image.param, f"Invalid '{image.param}': {error}.", "invalid_image_file") from None


def _look(image: _Image, role: InputRole, *, max_pixels: int) -> tuple[InputImage, tuple[int, int]]:
    """The image, and its width and height. Takes milliseconds, for a large one tens of them."""
    data = image.take()
    max_bytes = MAX_MASK_BYTES if role is InputRole.MASK else MAX_IMAGE_BYTES
    with opened(data, max_pixels=max_pixels, max_bytes=max_bytes) as found:
        size = found.size
    return InputImage(role, hashlib.sha256(data).hexdigest(), content_type_of(data), data), size


def _in_words_of(params: Sequence[str], error: InvalidRequestError) -> InvalidRequestError:
    """The error with its input images called what the request calls them."""
    called = {f"spec.inputs[{index}].data": param for index, param in enumerate(params)}
    return InvalidRequestError({called.get(path, path): text for path, text in error.violations.items()})


def _check_mask(mask: InputImage, size: tuple[int, int], *, of: tuple[int, int]) -> None:
    text = ""
    if mask.content_type != "image/png":
        text = f"it is {mask.content_type}, and a mask is image/png"
    elif size != of:
        text = f"it is {size[0]}x{size[1]} and the first image {of[0]}x{of[1]}; they have to be of one size"
    if text:
        raise wrong(_MASK, f"Invalid 'mask': {text}.", "invalid_image_file")


def _max_bytes(name: str) -> int:
    """How large the part of a form may be. Raises HttpError for images by a name that they have elsewhere."""
    if _MISNAMED.fullmatch(name):
        text = "A form has its images as files in 'image' or 'image[]'."
        raise wrong(name, f"Unknown parameter: '{name}'. {text}", "unknown_parameter")
    if name in _IMAGES:
        return MAX_IMAGE_BYTES
    return MAX_MASK_BYTES if name == _MASK else _MAX_TEXT_BYTES


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise wrong(name, f"Invalid '{name}': it is not UTF-8, and no file is taken there.", "invalid_value") from None


def _read_large_json(request: Request, pieces: list[bytes]) -> dict[str, JsonValue]:
    """The object that a body is, which it takes: nearly all of it is images. For a thread. Raises HttpError."""
    body = b"".join(pieces)
    pieces.clear()
    return read_json(request, body)


def _image_in_json(param: str, value: JsonValue) -> _Image:
    """An image of a JSON body, whose URL has all of it."""
    if not isinstance(value, dict):
        raise wrong_type(param, dict, value)
    url = value.get("image_url")
    if not isinstance(url, str):
        text = f"Invalid '{param}': only 'image_url' with a data: URL is taken; no files are kept here."
        raise wrong(param, text, "unsupported_value")
    head, comma, _ = url[:_MAX_HEAD_CHARS].partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        text = f"Invalid '{param}.image_url': expected 'data:image/png;base64,...'; nothing is fetched from anywhere."
        raise wrong(f"{param}.image_url", text, "unsupported_value")
    return _Image(f"{param}.image_url", partial(_from_base64, url, len(head) + 1))


def _from_base64(url: str, begin: int) -> bytes:
    try:
        return a2b_base64(url[begin:], strict_mode=True)
    except (NotBase64Error, ValueError):
        raise BadImageError("the URL's content is not base64") from None
