"""How long renditions take, and how they look beside what Pillow makes of the same picture.

Pictures lie on a disk tier, as a service without S3 has them, and memory holds nothing: each rendition is asked for
twice, and first its master is read and it is made, then it is read. The masters are PNGs of 1024x1024 or 1536x1024 that
look like photographs (shapes and grain of every size) or drawings (flat shapes and letters), the same pixels in files
of their own, so that none is made before. Looks are compared by the structural similarity of brightness (Wang et al.
2004, in squares of 8 pixels) with Pillow's plain way: resize by LANCZOS, save with its own settings.

Last, how much more two workers do than one: threads of one process, and processes of their own.

Against: the similarity is 0.95 at least, and the median of making one takes less than 80 ms, of a larger master than
1024x1024 as much longer as it has more pixels.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw, ImageFilter, ImageMath
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.clock import SystemClock
from cacheserver.keep import Keeper
from cacheserver.model import (
    CachedImage,
    CacheKey,
    Caller,
    GeneratedImage,
    MatchLevel,
    Namespace,
    Rendition,
    Served,
    Terms,
    TierName,
)
from cacheserver.renditions import pixels
from cacheserver.renditions.renderer import ThreadRenderer
from cacheserver.renditions.renditions import Rendered, Renditions
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.memory import MemoryCache
from scripts.bench.figures import percentile, print_table, print_verdict, write_json

ROUNDS = 40
MOST_MS = 80.0
_MEGAPIXEL = 1024 * 1024
LEAST_SSIM = 0.95

_MAX_PIXELS, _MAX_BYTES = 10_000_000, 64 * 1024 * 1024
_WINDOW = 8
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_GRAIN = 0.08
_NAMESPACE = Namespace("default", "default")
_NOBODY = Caller("bench", frozenset())


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of rendition."""

    name: str
    size: tuple[int, int]
    wanted: Rendition


CASES = (
    Case("png -> webp", (1024, 1024), Rendition(output_format="webp")),
    Case("png -> jpeg", (1024, 1024), Rendition(output_format="jpeg")),
    Case("1024x1024 -> 512x512 webp", (1024, 1024), Rendition(width=512, output_format="webp")),
    Case("1024x1024 -> 512x512 png", (1024, 1024), Rendition(width=512)),
    Case("1536x1024 -> 768x512 png", (1536, 1024), Rendition(width=768)),
)


class Rig:
    """Renditions on a disk tier, with no memory before it."""

    def __init__(self, tier: DiskTier) -> None:
        clock = SystemClock()
        memory = MemoryCache(clock=clock, max_bytes=0)
        books = CounterBooks(clock=clock, registry=CollectorRegistry())
        self._tier = tier
        self._keeper = Keeper(memory=memory, tiers=[tier], books=books, clock=clock)
        self._renderer = ThreadRenderer(max_pixels=_MAX_PIXELS, max_bytes=_MAX_BYTES)
        self._renditions = Renditions(
            memory=memory,
            tiers=[tier],
            keeper=self._keeper,
            renderer=self._renderer,
            find_master=self._find_master,
            clock=clock,
            ttl_s=3600.0,
        )

    async def put(self, data: bytes, size: tuple[int, int]) -> CacheKey:
        """Store a picture; its key."""
        digest = hashlib.sha256(data).digest()
        key = CacheKey("default", digest[:16], digest, 0)
        image = GeneratedImage(
            data=data,
            content_type="image/png",
            width=size[0],
            height=size[1],
            sha256=digest.hex(),
            model="gpt-image-2",
            size=f"{size[0]}x{size[1]}",
            quality="high",
            background="opaque",
        )
        await self._tier.put(key, CachedImage(key, image, "default", bytes(32), time.time()), replace=True)
        return key

    async def ask(self, key: CacheKey, wanted: Rendition) -> tuple[Rendered, float, float]:
        """The rendition, and how long it took, and our cores over it, in milliseconds."""
        begun_s, work_s = time.perf_counter(), time.process_time()
        rendered = await self._renditions.get(key, wanted, namespace=_NAMESPACE, caller=_NOBODY, terms=Terms())
        took_ms, work_ms = (time.perf_counter() - begun_s) * 1000, (time.process_time() - work_s) * 1000
        if not isinstance(rendered, Rendered):
            raise TypeError("nothing is on its way here")
        return rendered, took_ms, work_ms

    async def written(self, key: CacheKey) -> None:
        """Return when this rendition is on the disk: that happens behind the answer."""
        while not all(await self._tier.find([key])):  # noqa: ASYNC110 - the tier tells nobody
            await asyncio.sleep(0.001)

    async def aclose(self) -> None:
        """Write what is yet to be written, and let go of the threads."""
        await self._renditions.aclose()
        await self._renderer.aclose()
        await self._keeper.aclose(10)

    async def _find_master(self, key: CacheKey, **_: object) -> Served:
        entry = await self._tier.get(key)
        if entry is None:
            raise LookupError("the disk has lost a picture")
        return Served(entry, TierName.DISK, MatchLevel.EXACT)


async def measure(directory: Path, case: Case, picture: Image.Image, *, rounds: int) -> dict[str, Any]:
    """Make the rendition of `rounds` files of one picture, and read it once more."""
    data = encoded(picture, "PNG")
    tier = await DiskTier.open(directory, clock=SystemClock())
    rig = Rig(tier)
    made_ms: list[float] = []
    work_ms: list[float] = []
    read_ms: list[float] = []
    try:
        for number in range(rounds + 1):
            key = await rig.put(numbered(data, number), picture.size)
            first, took_ms, cores_ms = await rig.ask(key, case.wanted)
            made_ms.append(took_ms)
            work_ms.append(cores_ms)
            await rig.written(first.entry.key)
            _, took_ms, _ = await rig.ask(key, case.wanted)
            read_ms.append(took_ms)
    finally:
        await rig.aclose()
        await tier.aclose()
    image = first.entry.image
    return {
        "case": case.name,
        "master_bytes": len(data),
        "bytes": len(image.data),
        "made_p50_ms": statistics.median(made_ms[1:]),
        "made_p99_ms": percentile(made_ms[1:], 99),
        "work_p50_ms": statistics.median(work_ms[1:]),
        "read_p50_ms": statistics.median(read_ms[1:]),
        "ssim": ssim(decoded(image.data), decoded(plain(picture, case.wanted))),
        "size": image.size,
        "content_type": image.content_type,
    }


def numbered(png: bytes, number: int) -> bytes:
    """The same picture in a file of its own: with a number after its header."""
    chunk = b"tEXtComment\0%d" % number
    header_end = png.index(b"IHDR") + 21
    length, check = (len(chunk) - 4).to_bytes(4), zlib.crc32(chunk).to_bytes(4)
    return b"".join((png[:header_end], length, chunk, check, png[header_end:]))


def plain(picture: Image.Image, wanted: Rendition) -> bytes:
    """What Pillow makes of the picture when asked for no more than that."""
    if wanted.width is not None:
        height = picture.height * wanted.width // picture.width
        picture = picture.resize((wanted.width, height), Image.Resampling.LANCZOS)
    image_format = (wanted.output_format or "png").upper()
    lossy = {} if image_format == "PNG" else {"quality": pixels.DEFAULT_COMPRESSION}
    return encoded(picture, image_format, **lossy)


def ssim(one: Image.Image, other: Image.Image) -> float:
    """The mean structural similarity of two pictures' brightness, in windows of 8x8 that do not overlap."""
    if one.size != other.size:
        return 0.0
    x, y = (image.convert("L").convert("F") for image in (one, other))
    size = (one.width // _WINDOW, one.height // _WINDOW)
    within = (0, 0, size[0] * _WINDOW, size[1] * _WINDOW)

    def mean(values: Image.Image) -> Image.Image:
        return values.resize(size, Image.Resampling.BOX, box=within)

    def of(formula: Callable[[Any], Any], **images: Image.Image) -> Image.Image:
        result: Image.Image = ImageMath.lambda_eval(formula, **images)
        return result

    similar = of(
        lambda v: (
            ((2 * v["x"] * v["y"] + _C1) * (2 * (v["xy"] - v["x"] * v["y"]) + _C2))
            / (
                (v["x"] * v["x"] + v["y"] * v["y"] + _C1)
                * (v["xx"] - v["x"] * v["x"] + v["yy"] - v["y"] * v["y"] + _C2)
            )
        ),
        x=mean(x),
        y=mean(y),
        xx=mean(of(lambda v: v["a"] * v["a"], a=x)),
        yy=mean(of(lambda v: v["a"] * v["a"], a=y)),
        xy=mean(of(lambda v: v["a"] * v["b"], a=x, b=y)),
    )
    return float(similar.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))  # type: ignore[arg-type] # one band


def photograph(size: tuple[int, int]) -> Image.Image:
    """Shapes with soft edges under noise of every scale: as hard to compress as what image models draw."""
    random = Random(1)  # noqa: S311 - no secret
    noise = _noise(random, 4, size)
    for octave in range(3, min(size).bit_length()):
        noise = Image.blend(noise, _noise(random, 2**octave, size), _GRAIN)
    noise = Image.blend(noise.convert("L").convert("RGB"), noise, 0.5)  # less of it in the colours
    return Image.blend(drawing(size).filter(ImageFilter.GaussianBlur(1)), noise, 0.5)


def _noise(random: Random, side: int, size: tuple[int, int]) -> Image.Image:
    grain = Image.frombytes("RGB", (side, side), random.randbytes(3 * side * side))
    return grain.resize(size, Image.Resampling.BICUBIC)


def drawing(size: tuple[int, int]) -> Image.Image:
    """Flat shapes with hard edges, and letters."""
    random = Random(2)  # noqa: S311 - no secret
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, reach = random.randrange(size[0]), random.randrange(size[1]), random.randrange(20, 300)
        red, green, blue = random.randbytes(3)
        draw.ellipse((x, y, x + reach, y + reach), fill=(red, green, blue))
    for _ in range(200):
        draw.text((random.randrange(size[0]), random.randrange(size[1])), "a red fox", fill="black")
    return image


def scaling(picture: Image.Image, *, rounds: int) -> dict[str, float]:
    """Renditions a second, png to webp, by one thread, two threads and two processes."""
    data = encoded(picture, "PNG")
    workers: dict[str, Callable[[], Executor]] = {
        "one_thread": partial(ThreadPoolExecutor, 1),
        "two_threads": partial(ThreadPoolExecutor, 2),
        "two_processes": partial(ProcessPoolExecutor, 2),
    }
    figures = {}
    for name, make in workers.items():
        with make() as pool:
            list(pool.map(to_webp, [data] * 2))  # the pool begins
            begun_s = time.perf_counter()
            list(pool.map(to_webp, [data] * rounds))
            figures[name] = rounds / (time.perf_counter() - begun_s)
    return figures


def to_webp(data: bytes) -> bytes:
    """One rendition, on whatever worker this is."""
    return pixels.render(data, Rendition(output_format="webp"), max_pixels=_MAX_PIXELS, max_bytes=_MAX_BYTES)[0]


def encoded(picture: Image.Image, image_format: str, **settings: Any) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    picture.save(out, image_format, **settings)
    return out.getvalue()


def decoded(data: bytes) -> Image.Image:
    """The picture in a file."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def main(
    *,
    rounds: Annotated[int, typer.Option(min=2, help="Renditions of each kind.")] = ROUNDS,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Make renditions of each kind on a disk tier; fail if they are slow or look wrong."""
    found: list[dict[str, Any]] = []
    shortfalls: list[str] = []
    for look in (photograph, drawing):
        for case in CASES:
            with tempfile.TemporaryDirectory(prefix="renditions-") as directory:
                row = asyncio.run(measure(Path(directory), case, look(case.size), rounds=rounds))
            found.append({"look": look.__name__, **row})
            if row["made_p50_ms"] >= MOST_MS * max(1.0, case.size[0] * case.size[1] / _MEGAPIXEL):
                shortfalls.append(f"{look.__name__}, {case.name}: {row['made_p50_ms']:.0f} ms")
            if row["ssim"] < LEAST_SSIM:
                shortfalls.append(f"{look.__name__}, {case.name}: similarity {row['ssim']:.3f}")
    workers = scaling(photograph((1024, 1024)), rounds=rounds)
    columns = ("picture", "rendition", "KB of", "KB", "made p50 ms", "p99 ms", "work p50 ms", "read p50 ms", "SSIM")
    rows = [
        (
            row["look"],
            row["case"],
            f"{row['master_bytes'] / 1000:,.0f}",
            f"{row['bytes'] / 1000:,.0f}",
            *(f"{row[name]:.1f}" for name in ("made_p50_ms", "made_p99_ms", "work_p50_ms", "read_p50_ms")),
            f"{row['ssim']:.4f}",
        )
        for row in found
    ]
    print_table("Renditions on a disk tier", columns, rows)
    print_table("png -> webp", ("workers", "a second"), [(name, f"{rate:.1f}") for name, rate in workers.items()])
    print_verdict(shortfalls)
    write_json(json, "renditions", {"cases": found, "workers": workers, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
