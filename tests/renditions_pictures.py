"""Pictures to make renditions of."""

from __future__ import annotations

import io
from dataclasses import replace
from random import Random
from typing import Any

from PIL import Image

from cacheserver.model import GeneratedImage
from tests.tier_contract import make_entry, with_data


def scene(width: int, height: int, mode: str = "RGB", *, seed: int = 1) -> Image.Image:
    """A picture with large shapes and some detail, less of it in its colours, as photographs have."""
    random = Random(seed)  # noqa: S311 - no secret
    image: Image.Image | None = None
    for side in (4, 12, 32):
        noise = Image.frombytes("RGB", (side, side), random.randbytes(3 * side * side))
        layer = noise.resize((width, height), Image.Resampling.BICUBIC)
        image = layer if image is None else Image.blend(image, layer, 0.2)
    assert image is not None
    return Image.blend(image.convert("L").convert("RGB"), image, 0.4).convert(mode)


def encoded(image: Image.Image, image_format: str = "PNG", **settings: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **settings)
    return out.getvalue()


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def generated(data: bytes) -> GeneratedImage:
    """`data` as an upstream made it."""
    image = decoded(data)
    made = with_data(make_entry(), data).image
    return replace(
        made,
        content_type=Image.MIME[image.format or ""],
        width=image.width,
        height=image.height,
        size=f"{image.width}x{image.height}",
    )
