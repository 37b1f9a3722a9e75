"""The bench of renditions measures what it says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from cacheserver.images import BadImageError
from cacheserver.model import Rendition
from cacheserver.renditions import pixels
from scripts.bench import renditions
from scripts.bench.renditions import Case


def test_a_picture_is_like_itself_and_less_like_a_blurred_one() -> None:
    picture = renditions.photograph((64, 64))
    blurred = picture.filter(ImageFilter.GaussianBlur(2))
    assert renditions.ssim(picture, picture) == pytest.approx(1)
    assert renditions.ssim(picture, blurred) < 0.9
    assert renditions.ssim(picture, Image.new("RGB", (64, 64))) < 0.1
    assert renditions.ssim(picture, picture.resize((32, 32))) == 0


def test_numbered_files_hold_the_same_whole_picture() -> None:
    picture = renditions.drawing((64, 64))
    data = renditions.encoded(picture, "PNG")
    files = [renditions.numbered(data, number) for number in range(3)]
    assert len({data, *files}) == 4
    for file in files:
        assert renditions.decoded(file).tobytes() == picture.tobytes()
        with pytest.raises(BadImageError):
            pixels.render(file[:-20], Rendition(width=8), max_pixels=10_000, max_bytes=100_000)


async def test_each_rendition_is_made_once_and_read_once(tmp_path: Path) -> None:
    case = Case("small", (64, 64), Rendition(width=32))
    row = await renditions.measure(tmp_path, case, renditions.photograph(case.size), rounds=2)
    assert (row["size"], row["content_type"]) == ("32x32", "image/png")
    assert row["ssim"] > 0.95
    assert row["made_p50_ms"] > 0 < row["read_p50_ms"]
    files = await asyncio.to_thread(lambda: list(tmp_path.rglob("v1.*")))
    assert len(files) == 2 * 3
