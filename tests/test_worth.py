"""What a stored picture would cost now: by its own tokens and today's table, at the cheapest upstream."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.generation.pool import Lane, Pool, PriceStep, Terms
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.worth import _REMEMBERED, Worth
from cacheserver.model import GeneratedImage, Usage
from tests.fakes import FakeClock
from tests.provider import FakeUpstream

MODEL = "gpt-image-2"
IMAGE = GeneratedImage(
    data=b"",
    content_type="image/png",
    width=1024,
    height=1024,
    sha256="",
    model=MODEL,
    size="1024x1024",
    quality="medium",
    background="auto",
    paid_microusd=1,
)
TOKENS = Usage(input_tokens=10, input_text_tokens=10, output_tokens=1_000, total_tokens=1_010)


def worth(clock: FakeClock, *terms: Terms, spent: int = 0, table: PriceTable | None = None, **theirs: str) -> Worth:
    books = CounterBooks(clock=clock, registry=CollectorRegistry())
    lanes = [Lane(FakeUpstream(str(n)), each, has_succeeded=True) for n, each in enumerate(terms)]
    pool = Pool(lanes, clock=clock, books=books, month_spend_microusd=lambda _: spent)
    names = theirs or {MODEL: MODEL}
    return Worth(pool=pool, prices=(table or PriceTable.load()).naming(names), theirs=names)


def terms(factor: float = 1, *, model: str = MODEL, steps: tuple[PriceStep, ...] = ()) -> Terms:
    return Terms(models=(model,), limit_group="g", price_factor=Decimal(str(factor)), price_steps=steps)


def test_a_picture_is_worth_its_own_tokens_at_todays_price(clock: FakeClock) -> None:
    # 10 tokens of text at 5 and 1,000 of pictures at 30 micro-dollars
    assert worth(clock, terms()).microusd(replace(IMAGE, usage=TOKENS), MODEL) == 30_050


def test_without_tokens_it_is_worth_what_the_table_says_of_its_size_and_quality(clock: FakeClock) -> None:
    assert worth(clock, terms()).microusd(IMAGE, MODEL) == 53_000


def test_the_cheapest_upstream_that_serves_the_model_counts(clock: FakeClock) -> None:
    priced = worth(clock, terms(0.5), terms(2), terms(0.1, model="other"))
    assert priced.microusd(IMAGE, MODEL) == 26_500


@pytest.mark.parametrize(("spent", "microusd"), [(0, 53_000), (999, 53_000), (1_000, 26_500)])
def test_a_price_that_steps_with_what_was_paid_counts_as_it_is_now(clock: FakeClock, spent: int, microusd: int) -> None:
    step = PriceStep(1_000, Decimal("0.5"))
    assert worth(clock, terms(steps=(step,)), spent=spent).microusd(IMAGE, MODEL) == microusd


@pytest.mark.parametrize(
    "image",
    [replace(IMAGE, quality="auto"), replace(IMAGE, size="64x64"), replace(IMAGE, model="unheard-of")],
    ids=["quality", "size", "model"],
)
def test_where_no_price_is_known_it_is_worth_what_was_paid(clock: FakeClock, image: GeneratedImage) -> None:
    assert worth(clock, terms()).microusd(image, "") == 1


def test_a_model_that_nobody_serves_any_more_is_worth_what_was_paid(clock: FakeClock) -> None:
    assert worth(clock, terms(model="another")).microusd(IMAGE, MODEL) == 1


def test_our_name_of_a_model_is_priced_as_what_the_provider_calls_it(clock: FakeClock) -> None:
    priced = worth(clock, terms(model="fine"), fine="gpt-image-2")
    assert priced.microusd(replace(IMAGE, model="gpt-image-2-2026-04-21"), "fine") == 53_000
    # Asked for by its key, so that only what the provider called it is known.
    assert priced.microusd(replace(IMAGE, model="gpt-image-2-2026-04-21"), "") == 53_000


def test_another_price_table_changes_what_is_saved_from_now_on(clock: FakeClock, tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(
        'as_of = "2026-12-01"\n[models."gpt-image-2"]\n'
        "usd_per_million_tokens = { text_input = 1, image_output = 10 }\n"
        "usd_per_image.medium = { 1024x1024 = 0.02 }\n"
    )
    priced = worth(clock, terms(), table=PriceTable.load(file))
    assert priced.microusd(IMAGE, MODEL) == 20_000
    assert priced.microusd(replace(IMAGE, usage=TOKENS), MODEL) == 10_010


def test_what_is_remembered_is_bounded(clock: FakeClock) -> None:
    priced = worth(clock, terms())
    for count in range(1, _REMEMBERED + 50):
        assert priced.microusd(replace(IMAGE, usage=replace(TOKENS, output_tokens=count)), MODEL) == 50 + 30 * count
    assert len(priced._known) == _REMEMBERED
