"""cacheserver report: what the cache does, and what another would."""

from __future__ import annotations

import typer

from cacheserver.cli.options import Link
from cacheserver.cli.replay import ReplayOptions, print_replay


def report(*, replay: ReplayOptions, link: Link) -> None:
    """Replay a trace through caches of other sizes: hit rate, bytes and money saved for each."""
    if replay.trace is None:
        raise typer.BadParameter("pass --replay")
    print_replay(replay, replay.trace, as_json=link.as_json)
