"""What GetStats asks for, read and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from cacheserver.accounting.reading import Query
from cacheserver.figures import BY_DEFAULT
from cacheserver.model import StatsField, StatsSpan
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.messages import Problems

_SPANS: Mapping[int, StatsSpan | None] = {
    pb.STATS_SPAN_UNSPECIFIED: None,
    pb.STATS_SPAN_MINUTE: StatsSpan.MINUTE,
    pb.STATS_SPAN_HOUR: StatsSpan.HOUR,
    pb.STATS_SPAN_DAY: StatsSpan.DAY,
}
_FIELDS: Mapping[int, StatsField] = {
    pb.STATS_FIELD_NAMESPACE: StatsField.NAMESPACE,
    pb.STATS_FIELD_MODEL: StatsField.MODEL,
    pb.STATS_FIELD_QUALITY: StatsField.QUALITY,
    pb.STATS_FIELD_CALLER: StatsField.CALLER,
    pb.STATS_FIELD_OUTCOME: StatsField.OUTCOME,
    pb.STATS_FIELD_TIER: StatsField.TIER,
}
_NANOS = 1_000_000_000
_LAST_S = 253_402_300_800
"""The year 10000: no Timestamp lies later."""


def read_query(message: pb.GetStatsRequest, namespaces: Collection[str] | None) -> Query:
    """Which figures of these namespaces (None: of all) are wanted.

    Raises:
        InvalidRequestError: with every violation.
    """
    problems = Problems()
    since_s = _read_moment(message.since, "since", problems) if message.HasField("since") else None
    until_s = _read_moment(message.until, "until", problems) if message.HasField("until") else None
    if since_s is not None and until_s is not None and until_s < since_s:
        problems.add("until", "must not lie before since")
    if message.span not in _SPANS:
        problems.add("span", f"has no value {message.span}")
    span = _SPANS.get(message.span)
    if span is not None and since_s is None and until_s is None:
        problems.add("span", "needs since or until: what a process has counted since its start is not kept by time")
    for i, field in enumerate(message.by):
        if field not in _FIELDS:
            problems.add(f"by[{i}]", f"has no value {field}")
    by = tuple(dict.fromkeys(_FIELDS[field] for field in message.by if field in _FIELDS)) or BY_DEFAULT
    problems.check()
    return Query(since_s, until_s, span, by, namespaces)


def _read_moment(message: Timestamp, path: str, problems: Problems) -> float:
    """A moment since 1970, in seconds."""
    seconds = message.seconds + message.nanos / _NANOS
    if not (0 <= message.nanos < _NANOS and 0 <= seconds < _LAST_S):
        problems.add(path, "must lie between 1970 and 9999")
    return seconds
