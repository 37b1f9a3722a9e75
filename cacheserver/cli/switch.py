"""cacheserver switch: what can be turned off while the service runs."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from cacheserver.cli.groups import group
from cacheserver.cli.options import Link
from cacheserver.cli.session import session
from cacheserver.client import Switch, SwitchState


class OnOff(StrEnum):
    """How a switch may stand."""

    ON = "on"
    OFF = "off"


def list_switches(*, link: Link) -> None:
    """Show what is switched off, and where. Needs the permission admin."""
    with session(link) as (client, output):
        found = client.admin.list_switches()
        output.result({"off": [asdict(state) for state in found]}, lambda console: _draw(found, console))


def similarity(
    state: Annotated[OnOff, typer.Argument(help="on or off.")],
    *,
    namespace: Annotated[str | None, typer.Option(help="Only there.", show_default="everywhere")] = None,
    link: Link,
) -> None:
    """Turn answers with pictures of other prompts off, or on again, in every replica, until it is said otherwise.

    What is off everywhere is off in every namespace, whatever that one's own switch says. Needs the permission admin.
    """
    with session(link) as (client, output):
        now = client.admin.set_switch(Switch.SIMILARITY, on=state is OnOff.ON, namespace=namespace)
        output.result(asdict(now), lambda console: _draw_one(now, console))


app = group(
    "What can be turned off while the service runs; alone it lists what is.",
    {"list": list_switches, "similarity": similarity},
)


def _draw(found: tuple[SwitchState, ...], console: Console) -> None:
    for state in found:
        _draw_one(state, console)
    if not found:
        console.print("nothing is switched off")


def _draw_one(state: SwitchState, console: Console) -> None:
    name, where = state.switch or "unknown", f"in {state.namespace}" if state.namespace else "everywhere"
    console.print(f"{name} is {'on' if state.on else 'off'} {where}", style="" if state.on else "bold yellow")
