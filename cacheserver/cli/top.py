"""cacheserver top: what the service does, as it does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer
from rich.console import RenderableType
from rich.live import Live as LiveScreen
from rich.text import Text

from cacheserver.cli.frames import Reading, facts, frame
from cacheserver.cli.keys import Wait, keys
from cacheserver.cli.options import Link
from cacheserver.cli.output import Output
from cacheserver.cli.session import session
from cacheserver.client import (
    Client,
    DeadlineError,
    PermissionDeniedError,
    TryAgainError,
    UnreachableError,
    UnsupportedError,
)

T = TypeVar("T")

_TIMEOUT_S = 5.0
_NEWS_S = 10.0
_PASSING = (UnreachableError, TryAgainError, DeadlineError)
"""What a restart looks like from here."""


def top(
    *,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, of that many seconds, and end.")] = False,
    link: Link,
) -> None:
    """Show traffic, hits, queue, breakers, upstreams, budgets and alarms, live. q or Ctrl-C ends it.

    Upstreams, budgets and alarms need the permission admin; without it they are left out.
    """
    if link.as_json and not once:
        raise typer.BadParameter("--json needs --once: it prints one object")
    with session(link) as (client, output):
        if not once and not output.out.is_terminal:
            raise typer.BadParameter("standard output is no terminal; pass --once for one frame")
        reader = _Reader(client)
        if once:
            _print_one(reader, output, interval, link.address)
        else:
            _watch(reader, output, interval, link.address)


class _Reader:
    """Reads a service, and leaves out what it may not see."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._may_administer = True

    def read(self) -> Reading:
        """The service as it stands. Raises CacheError."""
        stats = self._client.stats(timeout_s=_TIMEOUT_S)
        read_s, admin = time.monotonic(), self._client.admin
        upstreams = self._asked(admin.list_upstreams)
        budgets = self._asked(admin.list_budgets)
        alarms = self._asked(admin.list_alarms)
        return Reading(read_s, stats, upstreams, budgets, alarms, may_administer=self._may_administer)

    def _asked(self, ask: Callable[..., T]) -> T | None:
        """What an admin call says; None where it cannot be told now. One refusal stands for all that would follow."""
        if not self._may_administer:
            return None
        try:
            return ask(timeout_s=_TIMEOUT_S)
        except PermissionDeniedError:
            self._may_administer = False
        except (UnsupportedError, *_PASSING):
            pass  # what may be seen of the service is worth showing
        return None


def _print_one(reader: _Reader, output: Output, interval_s: float, address: str) -> None:
    before = reader.read()
    time.sleep(interval_s)
    now = reader.read()
    output.result(facts(before, now), lambda console: console.print(frame(before, now, address=address)))


def _watch(reader: _Reader, output: Output, interval_s: float, address: str) -> None:
    """Draw frame after frame until q or Ctrl-C; a service that is away is said to be, and waited for."""
    with keys() as wait, LiveScreen(console=output.out, screen=True, auto_refresh=False) as screen:
        frames = _Frames(reader, address)
        try:
            while True:
                screen.update(frames.next(), refresh=True)
                if _is_over(wait, interval_s):
                    return
        except KeyboardInterrupt:
            return


def _is_over(wait: Wait, interval_s: float) -> bool:
    """Whether q was pressed in the time until the next frame; other keys only hasten it."""
    return wait(interval_s) in ("q", "Q")


class _Frames:
    """One frame after the other, over restarts of the service."""

    def __init__(self, reader: _Reader, address: str) -> None:
        self._reader = reader
        self._address = address
        self._before: Reading | None = None
        self._shown: Reading | None = None
        self._is_away = False
        self._news = ""
        self._news_until_s = 0.0

    def next(self) -> RenderableType:
        """The frame of this moment. Raises CacheError where waiting would not help."""
        try:
            now = self._reader.read()
        except _PASSING as error:
            self._is_away = True
            return self._without(f"{error}: trying again")
        self._note_what_is_new(now)
        self._before, self._shown, self._is_away = self._shown, now, False
        return frame(self._before, now, address=self._address, note=self._news)

    def _note_what_is_new(self, now: Reading) -> None:
        news = ""
        if self._shown is not None and not self._shown.is_of_one_life(now):
            started = now.stats.start_time
            news = f"another process answers, started at {started:%H:%M:%S} UTC" if started else "restarted"
        elif self._is_away:
            news = "it answers again"
        if news or now.read_s > self._news_until_s:
            self._news, self._news_until_s = news, now.read_s + _NEWS_S

    def _without(self, note: str) -> RenderableType:
        if self._shown is None:
            return Text(note, style="bold yellow")
        return frame(self._before, self._shown, address=self._address, note=note)
