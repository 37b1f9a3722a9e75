"""Commands that belong together under one word, as `cacheserver budgets set`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from cacheserver.cli.flat import flat


class _ListUnlessTold(TyperGroup):
    """A group whose command `list` may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` where no command is named."""
        is_named = bool(args) and (not args[0].startswith("-") or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if is_named else ["list", *args])


def group(about: str, commands: dict[str, Callable[..., None]]) -> typer.Typer:
    """The commands by their names under one word; `list` among them is what the word alone does."""
    app = typer.Typer(help=about, cls=_ListUnlessTold)
    for name, command in commands.items():
        app.command(name)(flat(command))
    return app
