"""The parts of image delivery that are functions of values, and the secret that is a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.errors import ConfigError
from cacheserver.http.delivery.asked import read_asked
from cacheserver.http.delivery.conditions import Verdict, judge, read_date, write_date
from cacheserver.http.delivery.ranges import (
    MAX_RANGES,
    Multipart,
    NotSatisfiableError,
    Part,
    content_range,
    read_range,
    slices,
)
from cacheserver.http.delivery.secret import own_secrets, read_secrets
from cacheserver.model import Rendition

DATE_S = 784_111_777
"""RFC 9110's own example."""


# ── conditions ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text", ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
)
def test_dates_are_read_in_all_three_forms(text: str) -> None:
    assert read_date(text) == DATE_S


@pytest.mark.parametrize("text", ["", "0", "yesterday", "Sun, 06 Nov 1994 08:49:37", "Sun, 31 Feb 1994 08:49:37 GMT"])
def test_what_is_no_date_is_none(text: str) -> None:
    assert read_date(text) is None


@given(st.integers(0, 4_000_000_000))
def test_a_date_that_is_written_is_read_as_the_same(seconds: int) -> None:
    assert read_date(write_date(seconds)) == seconds


@given(
    st.dictionaries(
        st.sampled_from(["if-match", "if-none-match", "if-modified-since", "if-unmodified-since"]),
        st.text() | st.sampled_from(['"a"', 'W/"a"', '"b"', "*", write_date(DATE_S), write_date(DATE_S + 1)]),
    )
)
def test_no_condition_breaks_anything(headers: dict[str, str]) -> None:
    assert judge(headers, etag='"a"', modified_s=DATE_S) in Verdict


def test_part_of_a_tag_is_not_the_tag() -> None:
    assert judge({"if-none-match": '"abc"'}, etag='"ab"', modified_s=DATE_S) is Verdict.GO_ON
    assert judge({"if-none-match": '"x, "ab""'}, etag='"a"', modified_s=DATE_S) is Verdict.GO_ON


# ── ranges ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_number = st.integers(0, 2_000).map(str)
_spec = st.builds("{}-{}".format, _number, _number | st.just("")) | _number.map("-{}".format)
_specs = st.lists(_spec | st.text("0123456789-, ax"), max_size=MAX_RANGES + 2).map(
    lambda each: "bytes=" + ",".join(each)
)


@given(_specs, st.integers(1, 1_000))
def test_parts_lie_within_the_picture_and_are_no_more_than_it(header: str, size: int) -> None:
    try:
        parts = read_range(header, size)
    except NotSatisfiableError:
        return
    if parts is not None:
        assert 1 <= len(parts) <= MAX_RANGES
        assert all(0 <= part.start < part.end <= size for part in parts)
        assert sum(part.size for part in parts) <= size


@given(st.text())
def test_any_range_is_parts_or_the_whole_or_refused(header: str) -> None:
    try:
        read_range(header, 100)
        read_range("bytes=" + header, 100)
    except NotSatisfiableError:
        pass


def test_pieces_of_a_picture_are_views_of_it() -> None:
    data = bytes(1_000_000)
    pieces = list(slices(data, Part(10, 999_990)))
    assert all(isinstance(piece, memoryview) and piece.obj is data for piece in pieces)
    assert b"".join(pieces) == data[10:999_990]
    assert len(list(slices(data[:100_000], Part(0, 100_000)))) == 1


def test_several_parts_are_as_long_as_is_told() -> None:
    data = bytes(range(256)) * 2_000
    parts = [Part(0, 1), Part(300_000, 512_000), Part(5, 10)]
    body = Multipart(data, parts, "image/png")
    sent = b"".join(body)
    assert len(sent) == body.length_bytes
    for part in parts:
        head = f"Content-Type: image/png\r\nContent-Range: {content_range(part, len(data))}\r\n\r\n".encode()
        assert head + data[part.start : part.end] in sent


# ── what a URL asks for ─────────────────────────────────────────────────────────────────────────────────────────────


def rendition(query: dict[str, str], accept: str = "", widths: tuple[int, ...] = ()) -> Rendition | None:
    return read_asked(query, accept=accept, widths=widths).rendition


def test_size_and_format_make_a_rendition() -> None:
    asked = {"w": "512", "h": "300", "format": "webp", "q": "80", "strip": "1"}
    assert rendition(asked) == Rendition(512, 300, "webp", 80, strip=True)


@pytest.mark.parametrize("query", [{}, {"strip": "0"}, {"v": "1", "other": "w=3"}])
def test_without_any_the_picture_is_as_it_is(query: dict[str, str]) -> None:
    assert rendition(query) is None


@pytest.mark.parametrize(
    ("accept", "output_format"),
    [
        ("image/avif,image/webp,image/apng,*/*;q=0.8", "webp"),
        ("text/html, image/webp;q=0.5", "webp"),
        ("IMAGE/WEBP", "webp"),
        ("image/png,image/*;q=0.8,*/*;q=0.5", None),
        ("image/webp;q=0, */*", None),
        ("image/webp;q=0.0", None),
        ("image/webpx", None),
        ("ximage/webp", None),
        ("*/*", None),
        ("", None),
    ],
)
def test_auto_is_webp_for_who_says_it_takes_that(accept: str, output_format: str | None) -> None:
    asked = read_asked({"format": "auto"}, accept=accept, widths=())
    assert asked.by_accept
    assert (asked.rendition or Rendition()).output_format == output_format


@pytest.mark.timeout(5)
def test_a_hostile_accept_takes_no_time() -> None:
    read_asked({"format": "auto"}, accept="image/webp" + " ;" * 30_000 + "," * 30_000, widths=())


def test_where_widths_are_set_there_are_no_others() -> None:
    assert rendition({"w": "320"}, widths=(640, 320)) == Rendition(width=320)
    for query in ({"w": "321"}, {"h": "320"}):
        with pytest.raises(Exception, match=r"320, 640|leave it out"):
            rendition(query, widths=(640, 320))


# ── the secret ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_secret_is_made_once_and_for_us_alone(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    made = own_secrets(directory)
    assert [len(each) >= 32 for each in made] == [True]
    assert own_secrets(directory) == made
    assert [file.name for file in directory.iterdir()] == ["url-secret"]
    assert (directory / "url-secret").stat().st_mode & 0o777 == 0o600
    assert own_secrets(tmp_path / "other") != made


def test_of_two_processes_that_make_one_both_have_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link
    others: list[list[bytes]] = []

    def overtaken(draft: Path, file: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        others.append(own_secrets(tmp_path))
        link(draft, file)

    monkeypatch.setattr(os, "link", overtaken)
    assert own_secrets(tmp_path) == others[0]


def test_a_file_has_a_secret_a_line(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text(f"\n{'n' * 32}\n  {'o' * 40}  \n\n")
    assert read_secrets(file) == [b"n" * 32, b"o" * 40]


@pytest.mark.parametrize("text", ["", "\n\n", "short", "n" * 32 + "\nshort", ("n" * 63 + "\n") * 2_000])
def test_a_file_that_has_none_or_a_short_one_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "secrets"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"delivery.url_secret_file: .*32 characters"):
        read_secrets(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"delivery.url_secret_file: .*nowhere cannot be read"):
        read_secrets(tmp_path / "nowhere")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data_dir"):
        own_secrets(tmp_path / "file")
