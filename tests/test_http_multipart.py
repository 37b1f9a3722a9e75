"""Forms as their bytes come: whatever the pieces, the same parts; whatever the bytes, an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from http import HTTPStatus
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.http.openai.multipart import FormReader
from cacheserver.http.status import HttpError

BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
MOST_BYTES = 1_000


def form(*parts: tuple[str, bytes], boundary: str = BOUNDARY) -> bytes:
    """A form of these names and contents, as browsers write it."""
    pieces = [
        b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n%s\r\n'
        % (boundary.encode(), name.encode(), data)
        for name, data in parts
    ]
    return b"".join(pieces) + b"--%s--\r\n" % boundary.encode()


def part(header: bytes, data: bytes = b"x") -> bytes:
    """A form of one part with exactly this header."""
    return b"--%s\r\n%s\r\n\r\n%s\r\n--%s--\r\n" % (BOUNDARY.encode(), header, data, BOUNDARY.encode())


def parts_of(pieces: Iterable[bytes], content_type: str = CONTENT_TYPE) -> list[tuple[str, bytes]]:
    reader = FormReader(content_type, max_bytes_of=lambda _: MOST_BYTES)
    for piece in pieces:
        reader.feed(piece)
    return [(part.name, part.take()) for part in reader.end()]


def cut(body: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[begin:end] for begin, end in pairwise(edges)]


def refusal(body: bytes, content_type: str = CONTENT_TYPE) -> HttpError:
    with pytest.raises(HttpError) as raised:
        parts_of([body], content_type)
    assert raised.value.status is HTTPStatus.BAD_REQUEST
    return raised.value


# Contents that look like boundaries, and end like the beginning of one.
LOOKALIKES = [
    b"\r",
    b"\n",
    b"-",
    b"--",
    b"\r\n--",
    b"\r\n--" + BOUNDARY.encode()[:9],
    BOUNDARY.encode(),
    b"\0",
    b"\xff",
]
CONTENTS = st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(LOOKALIKES), max_size=12).map(b"".join)).filter(
    lambda data: b"\r\n--" + BOUNDARY.encode() not in b"\r\n" + data
)


@given(
    contents=st.lists(st.tuples(st.sampled_from(["image[]", "prompt", "größe"]), CONTENTS), max_size=4),
    places=st.lists(st.integers(0, 2_000), max_size=30),
)
def test_however_a_body_is_cut_its_parts_are_the_same(contents: list[tuple[str, bytes]], places: list[int]) -> None:
    body = form(*contents)
    assert parts_of(cut(body, places)) == contents
    assert parts_of(bytes([byte]) for byte in body) == contents


@given(
    body=st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.sampled_from([*LOOKALIKES, form(("a", b"b")), b"Content-Disposition: ", b'form-data; name="a"', b":"]),
            max_size=20,
        ).map(b"".join),
    ),
    places=st.lists(st.integers(0, 2_000), max_size=9),
)
def test_bytes_that_are_no_form_are_refused_and_nothing_else_happens(body: bytes, places: list[int]) -> None:
    with suppress(HttpError):
        parts_of(cut(body, places))


@given(keep=st.integers(0, 400))
def test_a_form_that_is_cut_off_is_never_taken_for_a_whole_one(keep: int) -> None:
    whole = form(("prompt", b"a red fox"), ("image", b"\x89PNG\r\n\x1a\n" * 9))
    end = whole.rindex(b"--")
    assert "cut off" in str(refusal(whole[: min(keep, end)]))


def test_a_field_is_as_large_as_it_may_be_and_no_larger() -> None:
    assert parts_of([form(("image", b"x" * MOST_BYTES))]) == [("image", b"x" * MOST_BYTES)]
    error = refusal(form(("image", b"x" * (MOST_BYTES + 1))))
    assert error.param == "image"
    assert "1,000 bytes" in str(error)


def test_a_form_has_no_more_parts_than_anything_needs() -> None:
    assert len(parts_of([form(*[("a", b"")] * 128)])) == 128
    assert "more than 128 parts" in str(refusal(form(*[("a", b"")] * 129)))


@pytest.mark.parametrize(
    "content_type",
    ["", "multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'x' * 300}"],
)
def test_a_content_type_without_a_boundary_that_can_be_used_is_told(content_type: str) -> None:
    assert "boundary" in str(refusal(form(), content_type))


def test_a_boundary_may_stand_in_quotes() -> None:
    boundary = "one two"
    assert parts_of([form(("a", b"b"), boundary=boundary)], f'multipart/form-data; boundary="{boundary}"') == [
        ("a", b"b")
    ]


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Type: text/plain",
        b"Content-Disposition: form-data",
        b'Content-Disposition: attachment; name="a"',
        b'Content-Disposition: form-data; name=""',
        b'Content-Disposition: form-data; name="\x00"',
        b'Content-Disposition: form-data; name="\xff"',
        b'Content-Disposition: form-data; name="%s"' % (b"n" * 129),
        b"no colon at all",
        b"X-Long: " + b"y" * 5_000,
        b"\r\n".join(b"X-%d: y" % i for i in range(9)),
    ],
)
def test_a_part_without_a_name_of_use_is_told(header: bytes) -> None:
    assert "multipart/form-data" in str(refusal(part(header)))


def test_a_name_may_hold_what_a_header_is_divided_by() -> None:
    assert parts_of([part(b'content-disposition: form-data; name="a;b=c"; filename="\xff"')]) == [("a;b=c", b"x")]


def test_neither_a_name_nor_a_content_is_quoted_where_it_is_refused() -> None:
    secret = b"my-secret"
    for body in (part(b'Content-Disposition: form-data; name="\x00%s"' % secret), part(secret), secret):
        assert "my-secret" not in str(refusal(body))
