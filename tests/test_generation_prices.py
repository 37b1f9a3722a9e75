"""What pictures cost, to the micro-dollar."""

from __future__ import annotations

from decimal import Decimal
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.errors import ConfigError
from cacheserver.generation.prices import PriceTable, split, token_count
from cacheserver.model import ImageRequest, InputImage, InputRole, JsonValue

TABLE = PriceTable.load()
SQUARE, PORTRAIT, LANDSCAPE = "1024x1024", "1024x1536", "1536x1024"
SIZES = (SQUARE, PORTRAIT, LANDSCAPE)
OUTPUT_TOKENS = {
    ("gpt-image-2", "low"): (196, 158, 158),
    ("gpt-image-2", "medium"): (1756, 1372, 1372),
    ("gpt-image-2", "high"): (7024, 5488, 5488),
    **{
        (model, quality): counts
        for model in ("gpt-image-1.5", "gpt-image-1-mini", "gpt-image-1")
        for quality, counts in {
            "low": (272, 408, 400),
            "medium": (1056, 1584, 1568),
            "high": (4160, 6240, 6208),
        }.items()
    },
}
"""What the providers count for a picture, by model and quality, in the order of SIZES."""

AROUND = 32
"""Tokens that an upper bound allows a provider beside those of the prompt."""


def usage(output: int, *, text: int = 0, image: int = 0, text_out: int = 0) -> dict[str, JsonValue]:
    return {
        "total_tokens": text + image + output,
        "input_tokens": text + image,
        "output_tokens": output,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens_details": {"image_tokens": output - text_out, "text_tokens": text_out},
    }


@pytest.mark.parametrize(
    ("model", "quality", "size", "microusd"),
    [
        ("gpt-image-2", "low", SQUARE, 6_000),
        ("gpt-image-2", "medium", SQUARE, 53_000),
        ("gpt-image-2", "high", SQUARE, 211_000),
        ("gpt-image-2", "low", PORTRAIT, 5_000),
        ("gpt-image-2", "high", LANDSCAPE, 165_000),
        ("gpt-image-2-2026-04-21", "high", SQUARE, 211_000),
        ("gpt-image-1.5", "high", LANDSCAPE, 200_000),
        ("gpt-image-1-mini", "medium", PORTRAIT, 15_000),
        ("gpt-image-1", "high", SQUARE, 167_000),
        ("gpt-image-1-mini", "high", SQUARE, None),
        ("gpt-image-2", "auto", SQUARE, None),
        ("gpt-image-2", "high", "2048x2048", None),
        ("gpt-image-2.6-flare", "high", SQUARE, None),
        ("qwen-image", "high", SQUARE, None),
    ],
)
def test_without_usage_the_table_says_what_one_picture_costs(
    model: str, quality: str, size: str, microusd: int | None
) -> None:
    assert TABLE.cost_microusd(model, size, quality, None, 1) == microusd
    assert TABLE.cost_microusd(model, size, quality, None, 4) == (None if microusd is None else 4 * microusd)


def test_a_factor_is_taken_before_a_cost_is_rounded_half_even_once_for_the_call() -> None:
    costs = [TABLE.cost_microusd("gpt-image-2", SQUARE, "low", usage(n), 1, Decimal("0.05")) for n in (1, 3, 5)]
    assert costs == [2, 4, 8]  # 1.5, 4.5 and 7.5
    assert TABLE.cost_microusd("gpt-image-2", SQUARE, "low", None, 3, Decimal("0.6")) == 10_800


@pytest.mark.parametrize(
    ("model", "counts", "microusd"),
    [
        ("gpt-image-2", usage(196, text=10), 10 * 5 + 196 * 30),
        ("gpt-image-2", usage(1756), 52_680),
        ("gpt-image-2", usage(7024, text=1, image=100), 5 + 800 + 210_720),
        ("gpt-image-1.5", usage(1156, text_out=100), 1056 * 32 + 100 * 10),
        ("gpt-image-1-mini", usage(272, image=3), 2184),  # 7.5 rounds half to even: 8 + 2176
        ("gpt-image-1-mini", usage(272, image=5), 2188),  # 12.5: 12 + 2176
        ("gpt-image-2.6-sunburst", usage(1000), 30_000),
        ("gpt-image-2", {"input_tokens": 10, "output_tokens": 196}, 10 * 5 + 196 * 30),
    ],
)
def test_the_providers_own_count_wins_over_the_table(model: str, counts: dict[str, JsonValue], microusd: int) -> None:
    assert TABLE.cost_microusd(model, SQUARE, "high", counts, 1) == microusd


@pytest.mark.parametrize(
    "counts",
    [
        {},
        usage(0),
        {"output_tokens": "196"},
        {"output_tokens": True},
        {"output_tokens": -1},
        {"output_tokens": 10**12},
        {"output_tokens": 196.5},
    ],
)
def test_a_count_that_cannot_be_believed_falls_back_to_the_table(counts: dict[str, JsonValue]) -> None:
    assert TABLE.cost_microusd("gpt-image-2", SQUARE, "high", counts, 2) == 422_000


def test_of_an_unknown_model_nobody_knows_the_price() -> None:
    assert TABLE.cost_microusd("qwen-image", SQUARE, "high", usage(1000), 1) is None
    assert TABLE.estimate_microusd(ImageRequest("a cat", "qwen-image"), 1) == 0


def test_a_name_of_our_own_is_priced_as_what_the_provider_calls_it() -> None:
    named = TABLE.naming(
        {"house-style": "gpt-image-1-mini", "gpt-image-2": "our-azure-deployment", "other": "qwen-image"}
    )
    assert named.cost_microusd("house-style", SQUARE, "low", None, 1) == 5_000
    assert (
        named.estimate_microusd(ImageRequest("cats", "house-style", size=SQUARE, quality="low"), 1)
        == 5_000 + (4 + AROUND) * 2
    )
    assert named.cost_microusd("gpt-image-2", SQUARE, "low", None, 1) == 6_000
    assert named.cost_microusd("other", SQUARE, "low", None, 1) is None
    assert "house-style" not in TABLE.models


@pytest.mark.parametrize(
    ("quality", "size", "microusd"),
    [
        ("high", SQUARE, 211_000),
        ("low", PORTRAIT, 5_000),
        ("low", "auto", 6_000),
        ("auto", PORTRAIT, 165_000),
        ("auto", "auto", 211_000),
        ("max", SQUARE, 211_000),
        ("high", "2048x2048", 844_000),
        ("low", "512x512", 6_000),
    ],
)
def test_an_estimate_takes_the_dearest_of_what_is_left_open(quality: str, size: str, microusd: int) -> None:
    request = ImageRequest("cats", "gpt-image-2", size=size, quality=quality)
    assert TABLE.estimate_microusd(request, 3) == 3 * microusd + (4 + AROUND) * 5


def test_a_model_with_token_prices_only_is_estimated_by_the_dearest_picture_there_is() -> None:
    request = ImageRequest("cats", "gpt-image-2.6-flare")
    assert TABLE.estimate_microusd(request, 1) == 250_000 + (4 + AROUND) * 5


@pytest.mark.parametrize(
    ("model", "quality", "size", "microusd"),
    [
        ("gpt-image-2", "medium", PORTRAIT, 1372 * 30),
        ("gpt-image-1.5", "medium", LANDSCAPE, 1568 * 32),
        ("gpt-image-1.5", "high", PORTRAIT, 200_000),
        ("gpt-image-1-mini", "low", SQUARE, 5_000),
        ("gpt-image-1-mini", "high", SQUARE, 4160 * 8),
        ("gpt-image-1-mini", "auto", SQUARE, 4160 * 8),
        ("gpt-image-1-mini", "xhigh", LANDSCAPE, 6208 * 8),
        ("gpt-image-1-mini", "auto", "auto", 6240 * 8),
    ],
)
def test_an_estimate_is_the_dearer_of_the_tables_price_and_its_token_count(
    model: str, quality: str, size: str, microusd: int
) -> None:
    request = ImageRequest("", model, size=size, quality=quality)
    text_usd = TABLE.models[model].usd_per_million_tokens["text_input"]
    assert TABLE.estimate_microusd(request, 10) == 10 * microusd + AROUND * text_usd


@pytest.mark.parametrize(("model", "quality"), sorted(OUTPUT_TOKENS))
def test_no_call_that_is_listed_costs_more_than_its_estimate(model: str, quality: str) -> None:
    counts = zip(SIZES, OUTPUT_TOKENS[model, quality], strict=True)
    for (size, tokens), n in product(counts, range(1, 11)):
        by_usage = TABLE.cost_microusd(model, size, quality, usage(tokens * n, text=4 + AROUND), n)
        by_table = TABLE.cost_microusd(model, size, quality, None, n) or 0
        for asked in (quality, "auto", "max"):
            request = ImageRequest("cats", model, size=size, quality=asked)
            assert TABLE.estimate_microusd(request, n) >= max(by_usage or 0, by_table), (size, n, asked)


def test_every_picture_of_the_table_is_among_those_of_known_token_counts() -> None:
    listed = {
        (name, quality): tuple(sizes)
        for name, price in TABLE.models.items()
        for quality, sizes in price.most_usd_per_image.items()
    }
    assert listed == dict.fromkeys(OUTPUT_TOKENS, SIZES)


@given(
    model=st.sampled_from(sorted(TABLE.models)),
    quality=st.sampled_from(["low", "medium", "high", "auto"]),
    size=st.sampled_from(SIZES),
    n=st.integers(1, 10),
)
def test_an_estimate_is_never_below_the_tables_price(model: str, quality: str, size: str, n: int) -> None:
    request = ImageRequest("cats", model, size=size, quality=quality)
    assert TABLE.estimate_microusd(request, n) >= (TABLE.cost_microusd(model, size, quality, None, n) or 0)


@given(total=st.integers(0, 10**9), n=st.integers(1, 10))
def test_shares_add_up_and_differ_by_at_most_one(total: int, n: int) -> None:
    shares = split(total, n)
    assert len(shares) == n
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


def test_a_count_is_read_through_anything_that_is_not_an_object() -> None:
    assert token_count({"input_tokens_details": [1]}, "input_tokens_details", "text_tokens") == 0
    assert token_count({"input_tokens_details": {"text_tokens": 3}}, "input_tokens_details", "text_tokens") == 3


def test_the_table_that_comes_with_us_is_dated_and_exact() -> None:
    assert TABLE.as_of == "2026-11-23"
    assert TABLE.models["gpt-image-2"].usd_per_image["medium"][SQUARE] == Decimal("0.053")


def test_a_table_of_your_own_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('as_of = "2027-01-01"\n[models.house.usd_per_image.auto]\nauto = 0.0001\n')
    assert PriceTable.load(path).cost_microusd("house", "auto", "auto", None, 3) == 300


def edit(inputs: int, model: str = "gpt-image-2") -> ImageRequest:
    given = tuple(InputImage(InputRole.IMAGE, f"{number:064x}") for number in range(inputs))
    return ImageRequest("cats", model, size=SQUARE, quality="low", inputs=given)


@pytest.mark.parametrize(
    ("model", "most", "microusd_per_token"),
    [
        ("gpt-image-2", 1_536, 8),  # patches of 32 pixels
        ("gpt-image-1", 65 + 16 * 129 + 6_144, 10),  # tiles of 512 pixels, and high fidelity
        ("gpt-image-2.6-flare", 8_273, 8),  # nobody knows: as the dearest
    ],
)
def test_an_edits_estimate_has_the_most_that_its_input_images_can_cost(
    model: str, most: int, microusd_per_token: int
) -> None:
    plain = TABLE.estimate_microusd(edit(0, model), 1)
    images = (TABLE.estimate_microusd(edit(3, model), 1) - plain) / 3
    assert images == most * microusd_per_token + 64 * 5  # and some text around each


def test_each_picture_of_an_edit_counts_its_input_images_anew() -> None:
    text = 64 * 5
    one, two = (TABLE.estimate_microusd(edit(1), n) - TABLE.estimate_microusd(edit(0), n) - text for n in (1, 2))
    assert two == 2 * one


@given(inputs=st.integers(0, 16), text=st.integers(0, 100), partials=st.integers(0, 3))
def test_no_bill_of_an_edit_is_above_its_estimate(inputs: int, text: int, partials: int) -> None:
    counted = usage(196 + 100 * partials, text=4 + min(text, 60) * inputs, image=1_536 * inputs)
    cost = TABLE.cost_microusd("gpt-image-2", SQUARE, "low", counted, 1)
    assert cost is not None
    assert cost <= TABLE.estimate_microusd(edit(inputs), 1, partial_images=partials)


def test_without_usage_input_images_and_partial_pictures_count_as_much_as_they_may_cost() -> None:
    cost = TABLE.cost_microusd("gpt-image-2", SQUARE, "low", None, 2, inputs=3, partial_images=2)
    assert cost == 2 * 6_000 + 3 * (64 * 5 + 2 * 1_536 * 8) + 2 * 100 * 30
    assert TABLE.cost_microusd("gpt-image-1-mini", SQUARE, "low", None, 1, Decimal("0.5"), partial_images=1) == 2_900


@pytest.mark.parametrize(
    ("counts", "input_microusd"),
    [
        ({"output_tokens": 196, "input_tokens": 1_100}, 1_100 * 8),
        (usage(196, text=1_100), 1_100 * 8),
        (usage(196, text=76, image=1_024), 76 * 5 + 1_024 * 8),
        ({"output_tokens": 196}, 2 * (64 * 5 + 1_536 * 8)),
    ],
    ids=["no-kinds", "text-alone", "told", "no-input"],
)
def test_what_the_usage_of_an_edit_does_not_tell_counts_as_much_as_it_may_cost(
    counts: dict[str, JsonValue], input_microusd: int
) -> None:
    assert TABLE.cost_microusd("gpt-image-2", SQUARE, "low", counts, 1, inputs=2) == input_microusd + 196 * 30


def test_a_partial_picture_counts_a_hundred_output_tokens() -> None:
    request = edit(0)
    more = TABLE.estimate_microusd(request, 1, Decimal("0.5"), partial_images=3) - TABLE.estimate_microusd(
        request, 1, Decimal("0.5")
    )
    assert more == 3 * 100 * 30 / 2
    assert TABLE.tokens(request, 1, partial_images=3) - TABLE.tokens(request, 1) == 300


def test_token_counts_alone_are_enough_for_an_estimate(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(
        'as_of = "2027-01-01"\n'
        "[models.house]\nusd_per_million_tokens.image_output = 10\noutput_tokens_per_image.low.64x64 = 20\n"
    )
    table = PriceTable.load(path)
    assert table.has_images_of("house")
    assert table.estimate_microusd(ImageRequest("cats", "house", size="64x64", quality="low"), 3) == 600
    assert table.cost_microusd("house", "64x64", "low", None, 3) is None


@pytest.mark.parametrize(
    "text",
    [
        "not toml =",
        'as_of = "2027-01-01"',
        'as_of = "x"\nmodels = 3',
        'as_of = "x"\n[models.a]\nusd_per_image = { low = 3 }',
        'as_of = "x"\n[models.a.usd_per_image.low]\nauto = -1',
        'as_of = "x"\n[models.a.usd_per_image.low]\nauto = "much"',
        'as_of = "x"\n[models.a.usd_per_image.low]\nauto = nan',
        'as_of = "x"\n[models.a.output_tokens_per_image.low]\nauto = 196',
        'as_of = "x"\n[models.a]\nusd_per_million_tokens.image_output = 30\noutput_tokens_per_image.low = 3',
    ],
)
def test_a_broken_table_is_a_configuration_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"prices\.toml"):
        PriceTable.load(path)
    with pytest.raises(ConfigError, match="absent"):
        PriceTable.load(tmp_path / "absent.toml")
