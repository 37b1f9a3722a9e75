"""cacheserver alarms: what is watched, and what rings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from cacheserver.cli.options import Link
from cacheserver.cli.session import session
from cacheserver.client import Alarm, AlarmState

_STYLES = {AlarmState.RINGING: "red", AlarmState.WAITING: "yellow"}


def alarms(*, link: Link) -> None:
    """Show every alarm of the replica that answers, those that ring first. Needs the permission admin."""
    with session(link) as (client, output):
        found = client.admin.list_alarms()
        output.result({"alarms": [_facts(alarm) for alarm in found]}, lambda console: _draw(found, console))


def _facts(alarm: Alarm) -> dict[str, Any]:
    return asdict(alarm) | {"since": alarm.since.isoformat() if alarm.since else None}


def _draw(found: tuple[Alarm, ...], console: Console) -> None:
    if not found:
        console.print("no alarms: alerting.built_in is false and there are no [[alarms]]")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("alarm", "kind", "state"):
        table.add_column(name)
    for name in ("value", "threshold"):
        table.add_column(name, justify="right")
    table.add_column("since (UTC)")
    for alarm in found:
        table.add_row(
            alarm.name,
            alarm.kind,
            alarm.state or "",
            "-" if alarm.value is None else f"{alarm.value:.4g}",
            f"{alarm.threshold:g}",
            f"{alarm.since:%Y-%m-%d %H:%M:%S}" if alarm.since else "",
            style=_STYLES.get(alarm.state, "") if alarm.state else "",
        )
    console.print(table)
    for alarm in found:
        if alarm.state is AlarmState.RINGING and alarm.runbook_url:
            console.print(f"what to do about {alarm.name}: {alarm.runbook_url}")
