"""What was answered, as metrics: whoever scrapes them sees what counters and histograms of Prometheus would say."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cacheserver.accounting.books import CounterBooks, ToldApart
from cacheserver.figures import LATENCY_BOUNDS_S
from cacheserver.model import Outcome, TierName
from tests.fakes import FakeClock


class Answered(NamedTuple):
    """One picture that was answered."""

    namespace: str
    outcome: Outcome
    tier: TierName | None
    seconds: float
    saved_microusd: int
    is_degraded: bool
    quality: str


ANSWERED = st.builds(
    Answered,
    st.sampled_from(["default", "shop"]),
    st.sampled_from(Outcome),
    st.sampled_from([None, TierName.MEMORY, TierName.UPSTREAM]),
    st.sampled_from([0.0, 0.25, 1.5, 301.0, *LATENCY_BOUNDS_S]),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(["high", "low"]),
)


def counted(answers: list[Answered]) -> CollectorRegistry:
    """What Prometheus's own metrics make of it, counted one by one."""
    registry = CollectorRegistry()
    labels = ("namespace", "outcome", "tier")
    requests = Counter("cacheserver_requests", "Pictures asked for", labels, registry=registry)
    seconds = Histogram(
        "cacheserver_request_seconds",
        "Time to answer a picture",
        labels[1:],
        registry=registry,
        buckets=LATENCY_BOUNDS_S,
    )
    saved = Counter("cacheserver_saved_microusd", "Not paid thanks to a hit, in micro-dollars", registry=registry)
    text = "Of it, by pictures made from another one that was stored"
    derived_saved = Counter("cacheserver_derived_saved_microusd", text, ("namespace",), registry=registry)
    text = "Pictures answered at a lower quality than asked for"
    degraded = Counter("cacheserver_degraded", text, ("namespace",), registry=registry)
    for each in answers:
        requests.labels(each.namespace, each.outcome, each.tier or "").inc()
        seconds.labels(each.outcome, each.tier or "").observe(each.seconds)
        saved.inc(each.saved_microusd)
        if each.saved_microusd and each.outcome is Outcome.DERIVED:
            derived_saved.labels(each.namespace).inc(each.saved_microusd)
        if each.is_degraded:
            degraded.labels(each.namespace).inc()
    return registry


def scraped(registry: CollectorRegistry, names: set[str] | None = None) -> dict[str, object]:
    """What a scrape says: type, help, and each sample but for when its metric was made."""
    return {
        family.name: (
            family.type,
            family.documentation,
            {
                (sample.name, *sorted(sample.labels.items())): round(sample.value, 6)
                for sample in family.samples
                if not sample.name.endswith("_created")
            },
        )
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        if not family.name.endswith("_created") and (names is None or family.name in names)
    }


TOLD_APART = ToldApart(frozenset(), frozenset({"high"}))


@given(st.lists(ANSWERED, max_size=12), st.lists(ANSWERED, max_size=12), st.sampled_from([None, TOLD_APART]))
def test_the_books_say_what_counters_would(
    first: list[Answered], then: list[Answered], told_apart: ToldApart | None
) -> None:
    registry = CollectorRegistry()
    books = CounterBooks(clock=FakeClock(), registry=registry, told_apart=told_apart)
    for part in (first, then):
        for each in part:
            books.answered(
                each.namespace,
                each.outcome,
                each.tier,
                seconds=each.seconds,
                saved_microusd=each.saved_microusd,
                quality=each.quality,
                is_degraded=each.is_degraded,
            )
        if part is first:
            books.take()
    books.spent("unasked", 7)  # what was paid is no request
    expected = scraped(counted([*first, *then]))
    assert scraped(registry, {*expected}) == expected
