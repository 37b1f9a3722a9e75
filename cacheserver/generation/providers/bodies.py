"""What is sent to an OpenAI-shaped provider: a generation as JSON, an edit as a form."""

from __future__ import annotations

import json
from collections.abc import Mapping

from cacheserver.generation.providers.exchanges import FilePart, Form
from cacheserver.model import ImageRequest, InputImage, InputRole, JsonValue

_AUTO = "auto"
_IMAGES, _MASK = "image[]", "mask"


def fields_of(request: ImageRequest, n: int, *, model: str | None, partial_images: int = 0) -> dict[str, JsonValue]:
    """What goes out: what differs from the provider's defaults, and what decides the bytes.

    Never `response_format`: GPT image models refuse it, and both ways of answering are read. `model` None leaves it
    out. With `partial_images` the answer is to be a stream.
    """
    fields: dict[str, JsonValue] = {name: _whole_numbers(value) for name, value in request.extra.items()}
    for name in ("size", "quality", "background", "moderation"):
        if (value := getattr(request, name)) != _AUTO:
            fields[name] = value
    if request.output_format != "png" and request.output_compression != 100:  # noqa: PLR2004 - the API's default
        fields["output_compression"] = request.output_compression
    if request.seed is not None:
        fields["seed"] = request.seed
    if model is not None:
        fields["model"] = model
    if partial_images:
        fields |= {"stream": True, "partial_images": partial_images}
    # The format is sent though it is the default: not every server of this shape has the same one.
    return fields | {"prompt": request.prompt, "n": n, "output_format": request.output_format}


def body_of(fields: Mapping[str, JsonValue], inputs: tuple[InputImage, ...]) -> bytes | Form:
    """The body of a request with these fields: JSON, or with input images a form that has them in order.

    Of those with a role of their own only the mask has a field of its own. The bytes of the images are not copied.
    """
    if not inputs:
        return json.dumps(fields).encode("ascii")
    texts = {name: _text(value) for name, value in fields.items() if value is not None}
    return Form(texts, [_file(image, index) for index, image in enumerate(inputs)])


def _file(image: InputImage, index: int) -> FilePart:
    if image.data is None:
        raise AssertionError("a request is made only with all its input images")
    name = _MASK if image.role is InputRole.MASK else _IMAGES
    return FilePart(name, f"{index}.{image.content_type.removeprefix('image/')}", image.content_type, image.data)


def _text(value: JsonValue) -> str:
    """A field of a form: text as it is, all else as JSON has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _whole_numbers(value: JsonValue) -> JsonValue:
    """Whole floats as integers, all the way down: a protobuf Struct knows no integers, providers do."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole_numbers(item) for name, item in value.items()}
    return value
