"""Server-sent events: the same events however the bytes are cut."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.generation.providers.events import Event, EventReader, EventTooLargeError

PIECES = [b"event: a", b"event:b", b"data: 1", b"data:2", b"data", b": a comment", b"id: 3", b"x\xff", b"\xef\xbb\xbf"]
ENDS = [b"\n", b"\r", b"\r\n", b"", b"\n\n", b"\r\n\r\n"]


def read(chunks: Iterable[bytes], *, max_event_bytes: int = 1_000) -> list[Event]:
    reader = EventReader(max_event_bytes=max_event_bytes)
    return [*(event for chunk in chunks for event in reader.feed(chunk)), *reader.end()]


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream of lines that mean something, and the same bytes cut anywhere, empty chunks among them."""
    lines = draw(st.lists(st.sampled_from(PIECES), max_size=12))
    stream = b"".join(line + draw(st.sampled_from(ENDS)) for line in lines)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    return stream, [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@given(cut_streams())
def test_any_way_of_cutting_a_stream_gives_the_same_events(cut: tuple[bytes, list[bytes]]) -> None:
    stream, chunks = cut
    assert read(chunks) == read([stream])


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b.c"]), st.text("{}:ö ", min_size=1).map(str.encode))))
def test_events_that_were_written_are_read_again(written: list[tuple[str, bytes]]) -> None:
    stream = b"".join(b"event: %s\ndata: %s\n\n" % (kind.encode(), data) for kind, data in written)
    assert read([stream]) == [Event(kind, data) for kind, data in written]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: 1\n\ndata: 2\n\n", [("", b"1"), ("", b"2")]),
        (b"event: a\r\ndata: 1\r\n\r\n", [("a", b"1")]),
        (b"data: 1\rdata: 2\r\r", [("", b"1\n2")]),
        (b": keep-alive\n\ndata: 1\n\n: keep-alive\n\n", [("", b"1")]),
        (b"\xef\xbb\xbfdata: 1\n\n", [("", b"1")]),
        (b"data:  1\n\n", [("", b" 1")]),
        (b"event: a\n\ndata: 1\n\n", [("", b"1")]),
        (b"event: a\nid: 7\nretry: 10\n{}\ndata: 1\n\n", [("a", b"1")]),
        (b"data: 1", [("", b"1")]),
        (b"data: 1\n", [("", b"1")]),
        (b"event: a\ndata: 1\nda", [("a", b"1")]),
        (b"", []),
        (b"event: a\n", []),
    ],
)
def test_a_stream_is_read_as_the_standard_has_it_and_its_last_event_counts(
    stream: bytes, events: list[tuple[str, bytes]]
) -> None:
    assert read([stream]) == [Event(kind, data) for kind, data in events]


@pytest.mark.parametrize(
    "stream", [b"data: " + b"1" * 95, b"data: 1\n" * 15, b":" * 101, b"data\n" * 30], ids=lambda stream: stream[:9]
)
def test_an_event_that_is_too_large_is_refused_before_it_is_whole(stream: bytes) -> None:
    with pytest.raises(EventTooLargeError):
        read([stream[:50], stream[50:]], max_event_bytes=100)


def test_many_events_may_have_more_bytes_than_one() -> None:
    assert len(read([b"data: 1\n\n" * 50], max_event_bytes=10)) == 50
