"""Sizes and spans of time as people write them."""

from __future__ import annotations

import pytest
import typer

from cacheserver.cli.amounts import binary_size, bytes_of, listed, span_s, span_text


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1_000), ("256MiB", 268_435_456), ("1.5GB", 1_500_000_000), ("2 KiB", 2_048), ("1Gi", 1_073_741_824)],
)
def test_a_size_is_decimal_unless_it_says_binary(text: str, size: int) -> None:
    assert bytes_of(text, "--l1") == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1XB", "MiB", "1e9", "0.0001kB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        bytes_of(text, "--l1")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("15m", 900), ("24h", 86_400), ("7d", 604_800), ("2w", 1_209_600)]
)
def test_a_span_has_a_unit_and_reads_back(text: str, seconds: float) -> None:
    assert span_s(text, "--ttl") == seconds
    assert span_s(span_text(seconds), "--ttl") == seconds


@pytest.mark.parametrize("text", ["", "0d", "7", "1y", "1.5d"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        span_s(text, "--ttl")


def test_a_list_has_commas_and_no_empty_words() -> None:
    assert listed("1d, 7d,") == ["1d", "7d"]
    assert listed(None) == []


def test_a_memory_is_told_in_the_units_it_is_set_in() -> None:
    assert [binary_size(size) for size in (268_435_456, 1_610_612_736, 2_048, 7)] == [
        "256 MiB",
        "1.5 GiB",
        "2 KiB",
        "7 B",
    ]
    assert span_text(None) == "for ever"
