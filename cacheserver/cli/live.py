"""How a process stands, as facts that JSON can hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cacheserver.client import Live


def live_facts(live: Live | None) -> dict[str, Any] | None:
    """How the process that answered stands; None where it did not tell."""
    if live is None:
        return None
    return asdict(live) | {
        "time": live.time.isoformat() if live.time else None,
        "queue": {priority.name.lower(): count for priority, count in live.queue.items()},
    }
