"""cacheserver why: what became of an earlier call."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from cacheserver.cli.options import Link
from cacheserver.cli.output import dollars
from cacheserver.cli.session import session
from cacheserver.client import AnsweredImage, CallExplanation, NearMiss, State, TierName


def why(
    request_id: Annotated[str, typer.Argument(help="The x-request-id that the call sent or was given.")],
    *,
    link: Link,
) -> None:
    """Tell what became of an earlier call and, if it missed, what was nearest to it in the cache.

    One's own calls; with the permission admin anybody's. A replica remembers the latest 10,000 that it answered.
    """
    with session(link) as (client, output):
        call = client.explain_call(request_id)
        time = call.time.isoformat() if call.time else None
        output.result(_plain(asdict(call) | {"time": time}), lambda console: _draw(call, console))


def _plain(facts: dict[str, object]) -> dict[str, object]:
    """Moments as text."""
    for image in facts["images"] if isinstance(facts["images"], tuple) else ():
        expires = image["status"]["expire_time"]
        image["status"]["expire_time"] = expires.isoformat() if expires else None
    return facts


def _draw(call: CallExplanation, console: Console) -> None:
    where = f" in namespace {call.namespace}" if call.namespace else ""
    when = f"{call.time:%Y-%m-%d %H:%M:%S} UTC, " if call.time else ""
    console.print(f"{call.rpc} of {call.caller}{where}: {when}took {call.latency_s:.3f} s")
    if call.reason:
        console.print(f"failed: {call.reason}", style="red")
    for image in call.images:
        console.print(f"{image.status.tier or 'pending':<10}", style="green" if _is_hit(image) else "yellow", end="")
        console.print(_became(image))
        console.print(f"  {image.key}", style="dim")
    if call.nearest is not None:
        _draw_nearest(call.nearest, console)


def _is_hit(image: AnsweredImage) -> bool:
    return image.status.tier not in (None, TierName.UPSTREAM)


def _became(image: AnsweredImage) -> str:
    status = image.status
    if status.state is not State.READY:
        return "was still being made"
    match = status.matched.name.lower() if status.matched else "unknown"
    what = f"{match} match, saved {dollars(status.saved_microusd)}"
    if image.billed:
        what = f"no tier served it: generated for this call, cost {dollars(status.cost_microusd)}"
    elif status.collapsed:
        what = f"joined a load begun by another call, saved {dollars(status.saved_microusd)}"
    if status.derived_from:
        what += f", made from {status.derived_from}"
    return what + (", at a lower quality than asked for" if status.degraded else "")


def _draw_nearest(near: NearMiss, console: Console) -> None:
    console.print("nearest in the cache", style="bold yellow")
    if near.field == "prompt":
        console.print(f"  another prompt: {near.likeness:.0%} of the words of both are the same")
    elif near.value or near.cached_value:
        console.print(
            f"  differs in {near.field}: asked for {near.value or 'none'}, cached {near.cached_value or 'none'}"
        )
    else:
        console.print(f"  differs in {near.field}")
    console.print(f"  {near.key}", style="dim")
