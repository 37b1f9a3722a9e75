"""A stand-in for a provider: paints a landscape from the prompt, here, at once and for nothing."""

from __future__ import annotations

import asyncio
import colorsys
import hashlib
import io
import json
import math
import random
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cacheserver.errors import UpstreamInvalidError
from cacheserver.generation.images import inspect
from cacheserver.interfaces import Clock
from cacheserver.model import Delivery, GeneratedImage, ImageRequest, PartialImage

MODEL = "painter"
"""The one model the painter serves: its pictures are never taken for a real model's."""

_DEFAULT_SIZE = (1024, 1024)
_MAX_PIXELS = 3840 * 2160
_SCENE_PIXELS = 1_500_000
_MAX_BYTES = 64 * 1024 * 1024
_SIZE = re.compile(r"(\d{2,4})x(\d{2,4})")
_CAPTION_CHARACTERS = 120
_COARSEST_FIELD, _FINEST_FIELD = 64, 8
"""Sides, in pixels, of the fields of a picture that is not finished."""

Colour = tuple[int, int, int]


class PainterUpstream:
    """An Upstream without a network: the same request and variant give the same bytes, another variant others.

    "Same" holds for one version of Pillow. Every picture says PLACEHOLDER.
    """

    def __init__(self, *, clock: Clock, delay_s: float = 0.0) -> None:
        """`delay_s` makes each call take at least so many seconds, to show what a miss costs."""
        self._clock = clock
        self._delay_s = delay_s

    @property
    def name(self) -> str:
        """Its name in config, metrics and logs."""
        return MODEL

    async def generate(  # noqa: PLR0913 - what a call to an upstream is made of
        self,
        request: ImageRequest,
        variants: Sequence[int],
        *,
        price_factor: Decimal = Decimal(1),  # noqa: ARG002 - it costs nothing
        most_microusd: int = 0,  # noqa: ARG002 - as above
        partial_images: int = 0,
        on_partial: Callable[[PartialImage], None] | None = None,
    ) -> Delivery:
        """One picture for each of `variants`; of a single one first `partial_images` coarse ones."""
        started_s = self._clock.monotonic_s()
        size = _size(request)
        if _is_transparent(request) and request.output_format == "jpeg":
            raise UpstreamInvalidError("painter: jpeg has no transparency; ask for png or webp.", field="background")
        partials = partial_images if on_partial is not None and len(variants) == 1 else 0
        if on_partial is not None and partials:
            painted = await asyncio.to_thread(_picture, request, variants[0], size)
            for index in range(partials):
                await self._take_time(partials + 1)
                on_partial(PartialImage(await asyncio.to_thread(_coarse, painted, request, index), index))
        await self._take_time(partials + 1)
        images = [await asyncio.to_thread(_paint, request, variant, size) for variant in variants]
        seconds = self._clock.monotonic_s() - started_s
        return Delivery(tuple(replace(image, generation_s=seconds) for image in images))

    async def _take_time(self, parts: int) -> None:
        """Wait for one of so many parts of the time that a call takes."""
        if self._delay_s > 0:
            await self._clock.sleep(self._delay_s / parts)

    async def check(self) -> None:
        """Return: a painter is always there."""

    async def aclose(self) -> None:
        """Nothing to let go of."""


def _size(request: ImageRequest) -> tuple[int, int]:
    match = _SIZE.fullmatch(request.size)
    if match is None:
        if request.size == "auto":
            return _DEFAULT_SIZE
        raise UpstreamInvalidError("painter: size has to be auto or WIDTHxHEIGHT.", field="size")
    width, height = int(match[1]), int(match[2])
    if width * height > _MAX_PIXELS:
        raise UpstreamInvalidError(f"painter: at most {_MAX_PIXELS} pixels, as 3840x2160.", field="size")
    return width, height


def _paint(request: ImageRequest, variant: int, size: tuple[int, int]) -> GeneratedImage:
    """The picture of one variant, encoded. Takes a few hundred milliseconds: call it in a thread."""
    data = _encode(_picture(request, variant, size), request)
    facts = inspect(
        data,
        max_pixels=_MAX_PIXELS,
        max_bytes=_MAX_BYTES,
        expect_format=request.output_format,
        expect_size=size,
    )
    return GeneratedImage(
        data=data,
        content_type=facts.content_type,
        width=facts.width,
        height=facts.height,
        sha256=facts.sha256,
        model=MODEL,
        size=f"{facts.width}x{facts.height}",
        quality=request.quality,
        background="transparent" if _is_transparent(request) else "opaque",
        seed=request.seed,
        upstream=MODEL,
    )


def _picture(request: ImageRequest, variant: int, size: tuple[int, int]) -> Image.Image:
    picture = _landscape(_chance(request, variant), size, transparent=_is_transparent(request))
    _write(picture, request.prompt)
    return picture


def _coarse(picture: Image.Image, request: ImageRequest, index: int) -> bytes:
    """The picture as it might look before it is finished: in fields, at each index half as wide as before."""
    field = max(_FINEST_FIELD, _COARSEST_FIELD >> index)
    width, height = picture.size
    few = picture.resize((max(1, width // field), max(1, height // field)), Image.Resampling.BOX)
    return _encode(few.resize(picture.size, Image.Resampling.NEAREST), request)


def _is_transparent(request: ImageRequest) -> bool:
    return request.background == "transparent"


def _chance(request: ImageRequest, variant: int) -> random.Random:
    """Chance that falls the same way for the same picture asked for, whatever its size and format."""
    asked: list[object] = [request.prompt, variant, request.quality, request.seed, dict(request.extra)]
    asked += [(image.role, image.sha256) for image in request.inputs]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode("ascii")).digest()
    return random.Random(digest)  # noqa: S311 - a picture, not a secret


def _landscape(chance: random.Random, size: tuple[int, int], *, transparent: bool) -> Image.Image:
    """Sky, sun and hills. Painted at one resolution for all sizes, so that cost and look stay the same."""
    scale = math.sqrt(_SCENE_PIXELS / (size[0] * size[1]))
    width, height = (max(1, round(side * scale)) for side in size)
    hue = chance.random()
    horizon = _colour(hue + 0.08, 0.35, 0.98)
    sky = ImageOps.colorize(
        Image.linear_gradient("L").resize((width, height)),
        black=_colour(hue + 0.62, 0.75, 0.45),
        mid=_colour(hue + 0.85, 0.50, 0.85),
        white=horizon,
    ).convert("RGBA")
    if transparent:
        sky.putalpha(0)
    _paint_sun(sky, chance, _colour(hue + 0.12, 0.25, 1.0), glowing=not transparent)
    _paint_hills(sky, chance, hue + chance.uniform(0.35, 0.65), horizon)
    return sky.resize(size, Image.Resampling.LANCZOS)


def _paint_sun(scene: Image.Image, chance: random.Random, colour: Colour, *, glowing: bool) -> None:
    width, height = scene.size
    x, y = chance.uniform(0.15, 0.85) * width, chance.uniform(0.15, 0.45) * height
    radius = chance.uniform(0.05, 0.13) * min(width, height)
    if glowing:
        glow = round(radius * 10)
        mask = ImageOps.invert(Image.radial_gradient("L")).point(lambda level: max(0, level - 75)).resize((glow, glow))
        scene.paste(colour, (round(x - glow / 2), round(y - glow / 2)), mask)
    ImageDraw.Draw(scene).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _paint_hills(scene: Image.Image, chance: random.Random, hue: float, haze: Colour) -> None:
    """Ranges from the far, pale one to the near, dark one."""
    width, height = scene.size
    draw = ImageDraw.Draw(scene)
    ranges = chance.randint(4, 7)
    for index in range(ranges):
        nearness = (index + 1) / ranges
        near = _colour(hue, 0.65, 0.30)
        colour = tuple(round(far + (close - far) * nearness) for far, close in zip(haze, near, strict=True))
        waves = [(chance.uniform(1, 4) * k, chance.uniform(0, math.tau), 0.065 / k) for k in (1, 2, 5)]
        base = 0.42 + 0.45 * nearness
        ridge = [
            (x, height * (base + sum(tall * math.sin(math.tau * often * x / width + at) for often, at, tall in waves)))
            for x in range(0, width + 8, 8)
        ]
        draw.polygon([(0, height), *ridge, (width, height)], fill=colour)


def _write(picture: Image.Image, prompt: str) -> None:
    """The word that keeps it from being taken for a real picture, and the beginning of the prompt."""
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    shadow = max(1, width // 300)

    def centred(text: str, y: float, points: float) -> None:
        font = ImageFont.load_default(size=max(6.0, points))
        draw.text((width / 2 + shadow, y + shadow), text, font=font, anchor="mm", fill=(0, 0, 0, 160))
        draw.text((width / 2, y), text, font=font, anchor="mm", fill=(255, 255, 255, 255))

    centred("PLACEHOLDER", height * 0.72, width / 9)
    # Pillow's own font has Latin letters only.
    latin = " ".join(
        "".join(letter if " " <= letter <= "~" else " " for letter in prompt[:_CAPTION_CHARACTERS]).split()
    )
    for line, text in enumerate(textwrap.wrap(latin, width=44)):
        centred(text, height * 0.72 + width * (0.09 + 0.045 * line), width / 32)


def _encode(picture: Image.Image, request: ImageRequest) -> bytes:
    file = io.BytesIO()
    finished = picture if _is_transparent(request) else picture.convert("RGB")
    if request.output_format == "png":
        finished.save(file, format="PNG")
    else:
        finished.save(file, format=request.output_format, quality=request.output_compression)
    return file.getvalue()


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)
