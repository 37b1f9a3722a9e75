"""cacheserver budgets: what may be spent, and how far it is used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cacheserver.cli.groups import group
from cacheserver.cli.options import Link, microusd
from cacheserver.cli.output import dollars
from cacheserver.cli.session import session
from cacheserver.client import Budget


def list_budgets(*, link: Link) -> None:
    """Show every budget as it stands. Needs the permission admin."""
    with session(link) as (client, output):
        budgets = client.admin.list_budgets()
        output.result({"budgets": [_facts(budget) for budget in budgets]}, lambda console: _draw(budgets, console))


def set_budget(
    name: Annotated[str, typer.Argument(help='As the list names it: "global/day", "namespace:shop/month".')],
    *,
    limit_usd: Annotated[str, typer.Option(metavar="USD", help="The most that may be spent in its period.")],
    link: Link,
) -> None:
    """Change a budget's limit from now on, in every replica. Needs the permission admin."""
    limit_microusd = microusd(limit_usd, "--limit-usd")
    with session(link) as (client, output):
        budget = client.admin.update_budget(name, limit_microusd=limit_microusd)
        output.result(_facts(budget), lambda console: _draw([budget], console))


app = group("What may be spent; alone it lists the budgets.", {"list": list_budgets, "set": set_budget})


def _facts(budget: Budget) -> dict[str, Any]:
    return asdict(budget) | {"reset_time": budget.reset_time.isoformat() if budget.reset_time else None}


def _draw(budgets: Sequence[Budget], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("budget")
    for name in ("limit", "spent", "set aside", "left"):
        table.add_column(name, justify="right")
    table.add_column("starts anew (UTC)")
    for budget in budgets:
        left = budget.limit_microusd - budget.spent_microusd - budget.reserved_microusd
        table.add_row(
            budget.name,
            dollars(budget.limit_microusd),
            dollars(budget.spent_microusd),
            dollars(budget.reserved_microusd),
            dollars(max(0, left)),
            f"{budget.reset_time:%Y-%m-%d %H:%M}" if budget.reset_time else "",
            style="" if left > 0 else "red",
        )
    console.print(table if budgets else "no budgets: nothing bounds what is spent")
