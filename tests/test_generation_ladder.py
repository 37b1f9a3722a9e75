"""The rungs below a request: cheaper requests of the same picture, dearest first."""

from __future__ import annotations

from dataclasses import replace

from cacheserver.generation.ladder import Ladder
from cacheserver.model import ImageRequest

PRICES = {
    ("gpt-image-2", "auto"): 211,
    ("gpt-image-2", "hd"): 300,
    ("gpt-image-2", "high"): 211,
    ("gpt-image-2", "medium"): 53,
    ("gpt-image-2", "low"): 6,
    ("mini", "low"): 5,
    ("mini", "high"): 90,
}
REQUEST = ImageRequest("a red fox", "gpt-image-2", size="1024x1024", seed=7)


def ladder(*rungs: str, is_priced: bool = True) -> Ladder:
    return Ladder(rungs, estimate_microusd=lambda request: PRICES[request.model, request.quality] if is_priced else 0)


def below(of: Ladder, quality: str, model: str = "gpt-image-2") -> list[tuple[str, str]]:
    return [(rung.model, rung.quality) for rung in of.below(replace(REQUEST, quality=quality, model=model))]


def test_a_request_falls_to_the_rungs_below_its_own() -> None:
    of = ladder("high", "medium", "low")
    assert below(of, "high") == [("gpt-image-2", "medium"), ("gpt-image-2", "low")]
    assert below(of, "medium") == [("gpt-image-2", "low")]
    assert below(of, "low") == []


def test_a_rung_differs_in_quality_and_model_alone() -> None:
    assert ladder("high", "low").below(replace(REQUEST, quality="high")) == [replace(REQUEST, quality="low")]


def test_what_stands_on_no_rung_falls_to_those_that_cost_less() -> None:
    of = ladder("high", "medium", "low")
    assert below(of, "auto") == [("gpt-image-2", "medium"), ("gpt-image-2", "low")]
    assert below(of, "hd") == [("gpt-image-2", "high"), ("gpt-image-2", "medium"), ("gpt-image-2", "low")]


def test_a_rung_of_another_model_counts_if_it_costs_less() -> None:
    of = ladder("high", "mini:high", "mini:low")
    assert below(of, "high") == [("mini", "high"), ("mini", "low")]
    assert below(of, "low") == [("mini", "low")]


def test_without_prices_the_ladders_order_is_what_there_is() -> None:
    of = ladder("high", "medium", "low", is_priced=False)
    assert below(of, "medium") == [("gpt-image-2", "low")]
    assert below(of, "hd") == [("gpt-image-2", "high"), ("gpt-image-2", "medium"), ("gpt-image-2", "low")]
