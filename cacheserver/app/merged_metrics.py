"""The metrics pages of several workers as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_SUMMED = frozenset({"counter", "histogram", "summary"})


class MergedMetrics:
    """What all workers counted together, those that have ended included: so no sum ever falls.

    Counters and histograms are sums; a gauge stands once for each worker that lives, told apart by the label `worker`.
    What a worker that was killed counted since it was last `take`n is lost.
    """

    def __init__(self) -> None:
        self._pages: dict[str, list[Metric]] = {}
        self._ended: dict[str, Metric] = {}

    def take(self, worker: str, page: bytes) -> None:
        """Take the page of a worker in the place of its last one."""
        self._pages[worker] = list(text_string_to_metric_families(page.decode()))

    def ended(self, worker: str) -> None:
        """The worker has ended: whoever comes next under its name counts from nothing."""
        summed = (each for each in self._pages.pop(worker, ()) if each.type in _SUMMED)
        self._ended = _merged([*self._ended.values(), *summed])

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        families = [*self._ended.values()]
        for worker, page in self._pages.items():
            families += (each if each.type in _SUMMED else _of(worker, each) for each in page if not _is_birth(each))
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(_merged(families).values()))
        return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families

    def describe(self) -> list[Metric]:
        return []


def _is_birth(family: Metric) -> bool:
    """Whether it says since when a worker counts, which is nothing to say of a sum."""
    return family.type == "gauge" and family.name.endswith("_created")


def _of(worker: str, family: Metric) -> Metric:
    own = Metric(family.name, family.documentation, family.type)
    own.samples = [each._replace(labels={**each.labels, "worker": worker}) for each in family.samples]
    return own


def _merged(families: Iterable[Metric]) -> dict[str, Metric]:
    """One family of each name, and in it one sample of each set of labels: the sum."""
    merged: dict[str, Metric] = {}
    samples: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], Sample]] = {}
    for family in families:
        merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        known = samples.setdefault(family.name, {})
        for sample in family.samples:
            labels = (sample.name, frozenset(sample.labels.items()))
            before = known.get(labels)
            known[labels] = sample if before is None else sample._replace(value=before.value + sample.value)
    for name, family in merged.items():
        family.samples = list(samples[name].values())
    return merged
