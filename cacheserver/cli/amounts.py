"""Numbers of bytes and spans of time as people write them on the command line."""

from __future__ import annotations

import re

import typer

_BYTES = re.compile(r"(\d{1,15})(?:\.(\d{1,3}))?\s?([kKMGT]?)(i?)B?")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_SPAN = re.compile(r"(\d{1,9})([smhdw])")
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def bytes_of(text: str, option: str) -> int:
    """How many bytes `text` says: 256MiB, 1GiB, 1.5GB, 1000000. Raises typer.BadParameter, naming the option."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size: write 256MiB, 1GiB or 1.5GB", param_hint=option)
    whole, part, unit, binary = match.groups()
    base = 1024.0 if binary else 1000.0
    size = round(float(f"{whole}.{part or 0}") * base ** _POWERS[unit])
    if size < 1:
        raise typer.BadParameter("a size is at least one byte", param_hint=option)
    return size


def span_s(text: str, option: str) -> float:
    """How many seconds `text` says: 30s, 15m, 24h, 7d, 2w. Raises typer.BadParameter, naming the option."""
    match = _SPAN.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise typer.BadParameter(f"{text!r} is no span of time: write 15m, 24h or 7d", param_hint=option)
    return float(int(match[1]) * _UNITS_S[match[2]])


def listed(text: str | None) -> list[str]:
    """The words of a list with commas; none of nothing."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def span_text(seconds: float | None) -> str:
    """A span of time for people; None is for ever."""
    if seconds is None:
        return "for ever"
    unit = next((unit for unit in "wdhm" if seconds >= _UNITS_S[unit] and seconds % _UNITS_S[unit] == 0), "s")
    return f"{seconds / _UNITS_S[unit]:g}{unit}"


def binary_size(size_bytes: int) -> str:
    """A memory's size for people, in the units it is set in."""
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if size_bytes >= 1024**power:
            return f"{size_bytes / 1024**power:,.1f} {unit}".replace(".0 ", " ")
    return f"{size_bytes} B"
