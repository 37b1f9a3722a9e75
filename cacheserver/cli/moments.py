"""Moments as people write them on a command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

import typer

MOMENT_HELP: Final = "30d (days; also m, h, w) ago, or 2026-05-04, or 2026-05-04T12:30, in UTC."

_AGO = re.compile(r"(\d{1,6})([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def moment_of(text: str, now: datetime, option: str) -> datetime:
    """The moment that `text`, the value of `option`, says.

    Raises:
        typer.BadParameter: it says none.
    """
    try:
        if ago := _AGO.fullmatch(text):
            return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"not a moment: {MOMENT_HELP}", param_hint=option) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
