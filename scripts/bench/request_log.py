"""A request log like those of teams that make images: for `cacheserver estimate`, and for measuring it.

    python -m scripts.bench.request_log --rows 1000000 --out log.jsonl.gz

Made up, seeded, and in proportions that logs in public show: a shop's pages ask for products with Zipf's exponent
0.83, and spell their prompts now and then another way; nightly scans ask for products once, with an article number in
the prompt; people type prompts, and half of them type the same again within minutes (a lognormal gap, median 200 s).
"""

from __future__ import annotations

import gzip
import heapq
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

_EXPONENT = 0.83
_PAGES, _SCANS = 0.45, 0.75
"""Up to the first share rows are page views, up to the second scans, and the rest is typed."""
_REROLL_SHARE = 0.5
_REROLL_MEDIAN_S, _REROLL_SIGMA = 200.0, 1.2
_MAX_PENDING = 10_000
_START_S = 1_780_000_000.0
_SPELLED_OTHERWISE = 0.1
_WITHOUT_SETTINGS = 0.02


def _listed(words: str) -> list[str]:
    return words.split(", ")


_PRODUCTS = _listed("shoe, boot, jacket, coat, shirt, scarf, lamp, chair, sofa, table, mirror, mug, vase, rug, bag")
_COLOURS = _listed("red, blue, green, black, white, grey, beige, brown, yellow, pink, purple, navy, olive, silver")
_MATERIALS = _listed("leather, wool, cotton, linen, oak, steel, glass, ceramic, bamboo, marble, velvet, denim, paper")
_SCENES = _listed("forest, harbour, desert, city, valley, island, castle, bridge, market, meadow, glacier, lagoon")
_STYLES = _listed("watercolour, oil painting, pencil sketch, photograph, low poly, isometric, pixel art, charcoal")
_BEASTS = _listed("fox, owl, cat, whale, heron, wolf, bear, horse, raven, hare, lynx, otter, stag, crane, moth")
_DOINGS = _listed("sleeping under, running through, looking at, flying over, dancing near, hiding from, painted on")


@dataclass(frozen=True, slots=True)
class Mix:
    """How much of everything: rows, and seconds from the first to the last; products whose pages are viewed."""

    rows: int
    span_s: float
    products: int


def requests(mix: Mix, seed: int) -> Iterator[dict[str, Any]]:
    """The log's rows, in the order of time; the same seed gives the same."""
    draw = Random(seed)  # noqa: S311 - a workload
    weights = [*itertools.accumulate(rank**-_EXPONENT for rank in range(1, mix.products + 1))]
    pending: list[tuple[float, int, dict[str, Any]]] = []
    numbers = itertools.count()
    scanned = itertools.count(100_000)
    now_s = _START_S
    for _ in range(mix.rows):
        now_s += draw.expovariate(mix.rows / mix.span_s)
        if pending and pending[0][0] <= now_s:
            at_s, _, row = heapq.heappop(pending)
            row = {**row, "time": round(at_s, 3)}
        elif (kind := draw.random()) < _PAGES:
            row = _page_view(draw, draw.choices(range(mix.products), cum_weights=weights)[0], now_s)
        elif kind < _SCANS:
            row = _scan(draw, next(scanned), now_s)
        else:
            row = _typed(draw, now_s)
        if row["caller"].startswith("person") and draw.random() < _REROLL_SHARE and len(pending) < _MAX_PENDING:
            gap_s = draw.lognormvariate(math.log(_REROLL_MEDIAN_S), _REROLL_SIGMA)
            heapq.heappush(pending, (row["time"] + gap_s, next(numbers), row))
        yield row


def _page_view(draw: Random, product: int, now_s: float) -> dict[str, Any]:
    of = Random(product)  # noqa: S311 - the product's own words, always the same
    prompt = (
        f"Studio photo of a {of.choice(_COLOURS)} {of.choice(_MATERIALS)} {of.choice(_PRODUCTS)}, "
        f"model {product}, soft light, white background"
    )
    if draw.random() < _SPELLED_OTHERWISE:
        prompt = draw.choice((str.lower, "{}.".format, " {} ".format))(prompt)
    quality = of.choices(("low", "medium", "high"), (6, 3, 1))[0]
    return _row(draw, now_s, prompt, quality, f"page-{draw.randrange(40)}")


def _scan(draw: Random, number: int, now_s: float) -> dict[str, Any]:
    material, product = _MATERIALS[number // 300 % len(_MATERIALS)], _PRODUCTS[number // 4_200 % len(_PRODUCTS)]
    prompt = f"Catalogue picture of a {material} {product}, sku {number}, front view, plain background"
    return _row(draw, now_s, prompt, "low", "scan")


def _typed(draw: Random, now_s: float) -> dict[str, Any]:
    prompt = (
        f"a {draw.choice(_COLOURS)} {draw.choice(_BEASTS)} {draw.choice(_DOINGS)} the {draw.choice(_SCENES)} "
        f"with {draw.randrange(2, 40)} {draw.choice(_MATERIALS)} {draw.choice(_PRODUCTS)}s, {draw.choice(_STYLES)}"
    )
    return _row(draw, now_s, prompt, draw.choice(("low", "medium", "high")), f"person-{draw.randrange(5_000)}")


def _row(draw: Random, now_s: float, prompt: str, quality: str, caller: str) -> dict[str, Any]:
    row = {"time": round(now_s, 3), "prompt": prompt, "model": "gpt-image-2", "size": "1024x1024", "quality": quality}
    if draw.random() < _WITHOUT_SETTINGS:
        row = {"time": row["time"], "prompt": prompt}
    return {**row, "caller": caller}


def write_log(file: Path, mix: Mix, seed: int) -> None:
    """The log as JSON lines; packed where the name ends in .gz."""
    with _opened(file) as out:
        for row in requests(mix, seed):
            out.write(json.dumps(row).encode() + b"\n")


def _opened(file: Path) -> gzip.GzipFile | BufferedWriter:
    return gzip.open(file, "wb", compresslevel=1) if file.suffix == ".gz" else file.open("wb")


def main(
    *,
    out: Annotated[Path, typer.Option(help="File to write; packed if it ends in .gz.")],
    rows: Annotated[int, typer.Option(min=1, help="How many pictures are asked for.")] = 1_000_000,
    days: Annotated[float, typer.Option(min=0.01, help="From the first to the last.")] = 14.0,
    products: Annotated[int, typer.Option(min=1, help="Products whose pages are viewed.")] = 200_000,
    seed: Annotated[int, typer.Option(help="Another seed, another log.")] = 1,
) -> None:
    """Write a request log."""
    write_log(out, Mix(rows=rows, span_s=days * 86_400, products=products), seed)


if __name__ == "__main__":
    typer.run(main)
