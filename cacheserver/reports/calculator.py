"""Where the page's calculator begins: this report's own figures, and list prices where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from cacheserver.reports.numbers import Report

_MONTH: Final = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Seed:
    """Where the calculator begins for one quality: what was measured, or the list price where nothing was.

    Attributes:
        share: Of all pictures answered, 0 to 1.
        price_usd: What one picture costs.
        spared: Of what its pictures would have cost, what was saved, 0 to 1.
    """

    quality: str
    share: float
    price_usd: float
    spared: float
    is_measured: bool


def seeds(report: Report, prices_microusd: Mapping[str, int]) -> list[Seed]:
    """The calculator's beginning, for every quality that was asked for or has a price."""
    measured = [
        Seed(
            quality=group.name or "auto",
            share=group.figures.answered / report.total.answered,
            price_usd=group.figures.would_cost_microusd / group.figures.answered / 1_000_000,
            spared=group.figures.spared_rate or 0.0,
            is_measured=True,
        )
        for group in report.by_quality
        if group.figures.answered
    ]
    asked = {seed.quality for seed in measured}
    rate = report.total.spared_rate or 0.0
    return measured + [
        Seed(quality, 0.0, price / 1_000_000, rate, is_measured=False)
        for quality, price in prices_microusd.items()
        if quality not in asked
    ]


def monthly_pictures(report: Report) -> int:
    """How many pictures a month of 30 days has at the pace measured since the first figures."""
    measured = report.period.since_first(report.first_time)
    return round(report.total.answered * (_MONTH / measured)) if measured else 0
