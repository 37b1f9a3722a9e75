"""Commands by name, each imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import typer

from cacheserver.cli.flat import flat

_FILES = {"import": "imports"}
_FUNCTIONS = {"import": "import_images"}
"""What a command is called in Python where its name is a word of Python's own. Hyphens are underscores there."""


class Commands(Mapping[str, Any]):
    """The commands of some panels of the help, in this order, as Typer makes them. Asking for one imports its file.

    In a file is a function of the command's name or, for commands that belong together under one word, their `app`.
    """

    def __init__(self, panels: Mapping[str, Sequence[str]]) -> None:
        self._panels = {name: panel for panel, names in panels.items() for name in names}
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _make(name, panel=self._panels[name])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._panels)

    def __len__(self) -> int:
        return len(self._panels)


def _make(name: str, *, panel: str) -> Any:
    in_python = name.replace("-", "_")
    file = import_module(f"cacheserver.cli.{_FILES.get(name, in_python)}")
    around = typer.Typer()
    if hasattr(file, "app"):
        around.add_typer(file.app, name=name, rich_help_panel=panel)
    else:
        command = getattr(file, _FUNCTIONS.get(name, in_python))
        around.command(name, rich_help_panel=panel)(flat(command))
    return typer.main.get_group(around).commands[name]
