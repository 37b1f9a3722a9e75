"""What the pictures of a shop's catalogue cost, and how long they take.

It is 300,000 products a day, 10 % of them at high quality, 30 % at medium and 60 % at low.

Computed, from the service's own price table: what a day costs if everything is made at high quality at the list price
(without the service), and what is saved by quality by use, by repeats, by a relay that takes 0.6 of the list price,
and by volume: 5 % from $1,000 paid in a month on, 10 % from $5,000 on. Each saves on what those before it left; the
steps are those of a month of 30 such days, and a day is a thirtieth of it. The same at the prices of the article that
this product grew from, whose model is gone: it goes from $51,000 to $18,000.

Measured, for each share of repeats: a batch of products in random order through the real service before an emulated
relay, so that some repeats find a picture and some join a call that runs. Its hits, joined calls, upstream calls and
dollars are scaled to 300,000 products. Hits and joins depend on timing, their sum does not; at full size nearly all
would be hits. Pictures are small, but billed as 1024x1024: calls and money are measured here, not bytes.

The pool is 12 deployments of 150 images a minute each (1,800), at real speed; and once, without repeats, 20 of 250
(5,000), at 0.4 of it, so that one service on a small machine keeps up: what several replicas do is another bench's
matter. The rate is that of the calls' beginnings, without the first and the last tenth of them. How long a picture
takes does not change the rate, so it is short (2 s at medium), to end soon.

Against: no call fails, each picture is paid for once, the service's books and the provider's bill agree to the
micro-dollar, what was spent and saved is what all products would have cost, the pool is used to nine tenths, and the
1,800 finish the day's products in 4 hours, as the article claims.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated

import typer

from cacheserver.generation.pool import PriceStep
from cacheserver.generation.prices import PriceTable
from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.cases import MODEL, Answer, Bills, Deployments, open_stage
from scripts.bench.figures import BusyCores, print_table, print_verdict, write_json
from scripts.bench.provider_config import Latency
from scripts.bench.provider_ledger import Call

PRODUCTS = 300_000
MIX = {"high": Decimal("0.1"), "medium": Decimal("0.3"), "low": Decimal("0.6")}
USES = {"high": "detail", "medium": "list", "low": "thumbnail"}
SIZE = "1024x1024"

REPEATS = {
    0: "none",
    10: "assumed",
    23: "the article's similar prompts in shops, if the same",
    31: "its similar prompts in content, if the same",
    70: "its text shared by templates, which are no hits: a bound",
}
"""Per cent of the products that ask for what another asked for, and what that stands for."""

RELAY = Decimal("0.6")
STEPS = (PriceStep(1_000_000_000, Decimal("0.95")), PriceStep(5_000_000_000, Decimal("0.9")))
DAYS = 30

ARTICLE_USD = {"high": Decimal("0.17"), "medium": Decimal("0.04"), "low": Decimal("0.01")}
ARTICLE_PAID_USD = 18_000
ARTICLE_HOURS = 4
USED_LIMIT = 0.9
AGREEMENT_LIMIT = 0.02

_LATENCY = Latency(mean_s=2.0, spread="uniform")
_NAMESPACE = "shop"
_FEWEST_CALLS = 10
"""For a rate to mean anything."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Deployments with limits of their own, how fast their time passes, and how many products are asked for at a time.

    Enough of these that some always wait for a turn.
    """

    deployments: int
    images_per_minute_each: int
    compression: float
    at_a_time: int

    @property
    def images_per_minute(self) -> int:
        """The limit of all together."""
        return self.deployments * self.images_per_minute_each

    @property
    def parts(self) -> Deployments:
        """What the emulator runs."""
        return Deployments(
            count=self.deployments,
            concurrent=100,
            latency=_LATENCY,
            images_per_minute=self.images_per_minute_each,
            price_factor=RELAY,
        )


POOL = Pool(deployments=12, images_per_minute_each=150, compression=1.0, at_a_time=160)
LARGE_POOL = Pool(deployments=20, images_per_minute_each=250, compression=0.4, at_a_time=400)


# ── money ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Split:
    """A day's dollars: without the service, what each means saves, in this order, and what is left to pay."""

    without: float
    by_tiering: float
    by_hits: float
    by_joining: float
    by_relay: float
    by_volume: float
    paid: float

    @classmethod
    def of(cls, *, all_high: Decimal, tiered: Decimal, hits: Decimal, joined: Decimal) -> Split:
        """From micro-dollars a day at the list price: all at high quality, as used, and of that what repeats spare."""
        bought = tiered - hits - joined
        paid = paid_microusd(bought * DAYS) / DAYS
        parts = (all_high, all_high - tiered, hits, joined, bought * (1 - RELAY), bought * RELAY - paid, paid)
        return cls(*(float(part / 1_000_000) for part in parts))


def paid_microusd(list_microusd: Decimal) -> Decimal:
    """What the relay takes in a month for so much at the list price: each step holds from its moment on."""
    left, paid = list_microusd, Decimal(0)
    factors = [RELAY, *(RELAY * step.factor for step in STEPS)]
    for step, factor in zip(STEPS, factors, strict=False):
        part = min(left, (step.from_microusd - paid) / factor)
        left, paid = left - part, paid + part * factor
    return paid + left * factors[-1]


def list_usd() -> dict[str, Decimal]:
    """The price of a picture by quality, of the service's own price table."""
    by_quality = PriceTable.load().models[MODEL].usd_per_image
    return {quality: by_quality[quality][SIZE] for quality in MIX}


def computed(usd: Mapping[str, Decimal], repeats_percent: int) -> Split:
    """A day by arithmetic; that a repeat joins a running call and that it is a hit saves the same."""
    day = PRODUCTS * Decimal(1_000_000)
    tiered = day * sum((share * usd[quality] for quality, share in MIX.items()), Decimal(0))
    hits = tiered * repeats_percent / 100
    return Split.of(all_high=day * usd["high"], tiered=tiered, hits=hits, joined=Decimal(0))


# ── a batch through the service ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Product:
    """One product: which picture it asks for, and at what quality, which its use decides."""

    picture: str
    quality: str


def batch(count: int, repeats_percent: int, rng: Random) -> list[Product]:
    """About so many products in random order; of each quality the same share asks for what another asked for."""
    products: list[Product] = []
    for quality, share in MIX.items():
        asking = round(count * share)
        distinct = asking - round(asking * repeats_percent / 100)
        numbers = [*range(distinct), *rng.choices(range(distinct), k=asking - distinct)]
        products += [Product(f"{USES[quality]} {number}", quality) for number in numbers]
    rng.shuffle(products)
    return products


def request_of(product: Product) -> pb.GetImageRequest:
    """What the shop asks; the namespace knows which quality the use takes."""
    spec = pb.ImageSpec(prompt=f"product {product.picture}, a studio photograph on a white table")
    use = USES[product.quality]
    return pb.GetImageRequest(namespace=_NAMESPACE, spec=spec, use=use, priority=pb.PRIORITY_BATCH)


@dataclass(slots=True)
class Run:
    """One batch as it went."""

    repeats_percent: int
    pool: Pool
    products: Sequence[Product]
    answers: Sequence[Answer]
    calls: Sequence[Call]
    stats: pb.GetStatsResponse
    cores: float

    def figures(self) -> Figures:
        """What it shows."""
        billed = {call.request_id: call.billed_microusd for call in self.calls}
        high = [call.billed_microusd for call in self.calls if call.quality == "high" and call.billed_microusd]
        total = self.stats.total
        return Figures(
            repeats_percent=self.repeats_percent,
            limit_per_minute=self.pool.images_per_minute,
            requests=len(self.answers),
            distinct=len(set(self.products)),
            failed=sum(bool(answer.failure) for answer in self.answers),
            hits=sum(row.requests for row in self.stats.rows if row.outcome == pb.OUTCOME_HIT),
            joined=sum(row.requests for row in self.stats.rows if row.outcome == pb.OUTCOME_COLLAPSED),
            saved_microusd=total.saved_microusd,
            joined_microusd=total.coalesced_microusd,
            worth_microusd=sum(billed.get(answer.call_id, 0) for answer in self.answers),
            high_microusd=fmean(high) if high else math.nan,
            bills=Bills.of(self.calls, self.stats),
            reached_per_minute=rate_per_minute([call.started_s for call in self.calls if call.started_s is not None]),
            cores=self.cores,
        )


@dataclass(frozen=True, slots=True)
class Figures:
    """What one batch showed. Money is what the relay took: 0.6 of the list price."""

    repeats_percent: int
    limit_per_minute: int
    requests: int
    distinct: int
    failed: int
    hits: int
    joined: int
    saved_microusd: int
    joined_microusd: int
    """Of saved: by joining a call that ran."""
    worth_microusd: int
    """What the pictures of all products cost, counted once for each product."""
    high_microusd: float
    """What a call at high quality cost."""
    bills: Bills
    reached_per_minute: float
    cores: float

    @property
    def calls_a_day(self) -> float:
        """Upstream calls for all products of a day."""
        return self.bills.calls / self.requests * PRODUCTS

    @property
    def needed_per_minute(self) -> float:
        """The rate at which these end when the article says they do."""
        return self.calls_a_day / (ARTICLE_HOURS * 60)

    @property
    def split(self) -> Split:
        """A day's dollars at this batch's prices and repeats."""
        to_a_day = PRODUCTS / RELAY / self.requests  # and to the list price
        return Split.of(
            all_high=PRODUCTS * Decimal(self.high_microusd) / RELAY,
            tiered=(self.bills.spent_microusd + self.saved_microusd) * to_a_day,
            hits=(self.saved_microusd - self.joined_microusd) * to_a_day,
            joined=self.joined_microusd * to_a_day,
        )

    def hours(self, per_minute: float) -> float:
        """How long a day's products take at so many calls a minute."""
        return self.calls_a_day / per_minute / 60

    def shortfalls(self) -> list[str]:
        """What is not as it should be, one line each."""
        booked = self.bills.spent_microusd + self.saved_microusd
        expected = computed(list_usd(), self.repeats_percent).paid
        paid = self.split.paid
        hours = self.hours(self.reached_per_minute)
        is_short = {
            f"{self.failed} requests failed": self.failed > 0,
            f"{self.bills.calls} calls were made for {self.distinct} pictures": self.bills.calls != self.distinct,
            f"spent and saved are {booked} microdollars, all pictures {self.worth_microusd}": (
                booked != self.worth_microusd
            ),
            f"${paid:,.0f} a day, by arithmetic ${expected:,.0f}": not abs(paid - expected)
            <= AGREEMENT_LIMIT * expected,
            f"only {self.reached_per_minute:,.0f} of {self.limit_per_minute:,} images/min were reached": (
                not self.reached_per_minute >= USED_LIMIT * self.limit_per_minute
            ),
            f"{hours:.1f} h for a day's products, above {ARTICLE_HOURS}": not hours <= ARTICLE_HOURS,
        }
        lines = [line for line, short in is_short.items() if short] + self.bills.shortfalls()
        return [f"{self.repeats_percent} % at {self.limit_per_minute:,}/min: {line}" for line in lines]


def rate_per_minute(started_s: Sequence[float]) -> float:
    """Calls a minute, without the first and the last tenth: a pool that fills up or runs dry is no steady one."""
    ordered = sorted(started_s)
    if len(ordered) < _FEWEST_CALLS:
        return math.nan
    first, last = len(ordered) // 10, len(ordered) * 9 // 10
    return (last - first) / (ordered[last] - ordered[first]) * 60


async def measure(pool: Pool, repeats_percent: int, *, count: int, seed: int) -> Figures:
    """One batch, with a service and a relay of its own."""
    products = batch(count, repeats_percent, Random(seed))  # noqa: S311 - an order
    by_use = ", ".join(f'{use} = "{quality}"' for quality, use in USES.items())
    settings = f"[namespaces.{_NAMESPACE}]\nquality_by_use = {{ {by_use} }}"
    async with open_stage(pool.parts, settings, compression=pool.compression, seed=seed) as stage:
        busy = BusyCores()
        answers = await stage.ask_at_most([request_of(each) for each in products], at_a_time=pool.at_a_time)
        cores = busy.read()
        return Run(
            repeats_percent=repeats_percent,
            pool=pool,
            products=products,
            answers=answers,
            calls=await stage.provider.calls(),
            stats=await stage.stats(),
            cores=cores,
        ).figures()


def main(
    *,
    count: Annotated[int, typer.Option("--products", help="Products in each batch.")] = 1_000,
    seed: Annotated[int, typer.Option(help="Of the order and the provider's latencies.")] = 1,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of README and nothing else.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Cost and time of a shop's catalogue."""
    results = [_measured(POOL, repeats_percent, count=count, seed=seed) for repeats_percent in REPEATS]
    large = _measured(LARGE_POOL, min(REPEATS), count=count, seed=seed)
    shortfalls = [line for result in (*results, large) for line in result.shortfalls()]
    if markdown:
        print(markdown_table(results, large))
        for line in shortfalls:
            print(f"FALLS SHORT  {line}", file=sys.stderr)
    else:
        _print_computed()
        _print_measured([*results, large])
        _print_day(results, large)
        print_verdict(shortfalls)
    rows = [asdict(result) | {"split": asdict(result.split)} for result in (*results, large)]
    write_json(json, "catalogue", {"batches": rows, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


def _measured(pool: Pool, repeats_percent: int, *, count: int, seed: int) -> Figures:
    print(f"{repeats_percent} % repeats at {pool.images_per_minute:,} images/min …", file=sys.stderr, flush=True)
    return asyncio.run(measure(pool, repeats_percent, count=count, seed=seed))


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────

_DAY = (
    *("repeats", "calls", "needed/min", "reached/min", "hours at 1,800/min", "hours at 5,000/min", "without"),
    *("tiering", "hits", "joined", "relay", "volume", "with"),
)


def day_rows(results: Sequence[Figures], large: Figures) -> list[tuple[str, ...]]:
    """A day for each share of repeats, measured, in the columns of README's table."""
    return [
        (
            f"{each.repeats_percent} %: {REPEATS[each.repeats_percent]}",
            f"{each.calls_a_day:,.0f}",
            f"{each.needed_per_minute:,.0f}",
            f"{each.reached_per_minute:,.0f}",
            f"{each.hours(each.reached_per_minute):.1f}",
            f"{each.hours(large.reached_per_minute):.1f}",
            *_split(each.split),
        )
        for each in results
    ]


def markdown_table(results: Sequence[Figures], large: Figures) -> str:
    """The table of README."""
    head = ["| " + " | ".join(_DAY) + " |", "|:---|" + "---:|" * (len(_DAY) - 1)]
    body = ["| " + " | ".join(row) + " |" for row in day_rows(results, large)]
    return "\n".join(head + body)


def _print_computed() -> None:
    prices = {MODEL: list_usd(), "the article's": ARTICLE_USD}
    print_table(
        f"Computed: {PRODUCTS:,} products, dollars a day, what each means saves on what those before it left",
        ("prices", "repeats", "without", "tiering", "hits", "joined", "relay", "volume", "with", "of without"),
        [
            (name, f"{percent} %", *_split(split), f"{split.paid / split.without:.0%}")
            for name, usd in prices.items()
            for percent in REPEATS
            for split in [computed(usd, percent)]
        ],
    )
    article = computed(ARTICLE_USD, 0)
    print(
        f"The article goes from ${article.without:,.0f} to ${ARTICLE_PAID_USD:,}; its own prices and qualities alone "
        f"leave ${article.without - article.by_tiering:,.0f}, before any repeat, relay or volume."
    )


def _print_measured(results: Sequence[Figures]) -> None:
    print_table(
        "Measured: each batch as it was, dollars as the relay billed and the service booked them",
        (
            *("repeats", "limit/min", "reached/min", "requests", "hits", "joined", "calls", "failed", "429"),
            *("billed", "booked", "saved", "cores busy"),
        ),
        [
            (
                f"{each.repeats_percent} %",
                f"{each.limit_per_minute:,}",
                f"{each.reached_per_minute:,.0f}",
                f"{each.requests:,}",
                f"{each.hits:,}",
                f"{each.joined:,}",
                f"{each.bills.calls:,}",
                str(each.failed),
                str(each.bills.refused_by_limit),
                f"${each.bills.billed_microusd / 1e6:.6f}",
                f"${each.bills.spent_microusd / 1e6:.6f}",
                f"${each.saved_microusd / 1e6:.6f}",
                f"{each.cores:.2f}",
            )
            for each in results
        ],
    )


def _print_day(results: Sequence[Figures], large: Figures) -> None:
    print_table(
        f"A day of {PRODUCTS:,} products by these measurements; needed: images/min to finish in {ARTICLE_HOURS} h",
        _DAY,
        day_rows(results, large),
    )


def _split(split: Split) -> tuple[str, ...]:
    saved = (split.by_tiering, split.by_hits, split.by_joining, split.by_relay, split.by_volume)
    return (f"${split.without:,.0f}", *(f"{-round(each):,}" for each in saved), f"${split.paid:,.0f}")


if __name__ == "__main__":
    typer.run(main)
