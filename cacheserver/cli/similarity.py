"""cacheserver similarity: how the levels of similarity do on pairs of prompts, and on a log, without a service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cacheserver.cli.flat import flat
from cacheserver.cli.output import WRONG_USE, Output
from cacheserver.errors import UnreadableFileError
from cacheserver.similarity.evaluating import LEVELS, Tally, read_pairs, tallies
from cacheserver.similarity.mining import Mined, mined, read_prompts
from cacheserver.whatif.lines import LineFile

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def evaluate(
    pairs: Annotated[
        Path, typer.Argument(help='Pairs: JSON lines with "a", "b", "same" and perhaps "kind", plain or gzip.')
    ],
    *,
    as_json: _Json = False,
) -> None:
    """Show what share of judged pairs of prompts each level takes for the same picture, kind by kind.

    Of pairs that are the same it should be high; of pairs that are not, it is wrong pictures. Nothing is sent anywhere.
    """
    output = Output(as_json=as_json)
    with _told(pairs, output):
        found = tallies(read_pairs(_lines(pairs)))
    facts = {"kinds": [asdict(tally) for tally in found], "all": [asdict(_sum(found, same=s)) for s in (True, False)]}
    output.result(facts, lambda console: _draw_rates(found, console))


def mine(
    log: Annotated[Path, typer.Argument(help="Log: a prompt or a JSON object a line, plain or gzip.")],
    *,
    field: Annotated[str, typer.Option(help="Where a JSON object has its prompt, as request.text.")] = "prompt",
    groups: Annotated[int, typer.Option(min=0, help="How many groups to show, the most asked first.")] = 20,
    quality_words: Annotated[
        bool, typer.Option("--quality-words", help='Prompts with and without "8k" and the like differ.')
    ] = False,
    as_json: _Json = False,
) -> None:
    """Show what share of a log the canonical level would merge, and the prompts that it would, for reading.

    Read the groups: each is prompts that one picture would answer. Nothing is sent anywhere.
    """
    output = Output(as_json=as_json)
    with _told(log, output):
        found = mined(read_prompts(_lines(log), field.split(".")), ignore_quality_words=not quality_words)
    facts = asdict(found) | {"groups": [asdict(each) for each in found.groups[:groups]]}
    output.result(facts, lambda console: _draw_mined(found, groups, console))


def _lines(path: Path) -> Iterator[str]:
    for block in LineFile(path).blocks():
        for number, line in enumerate(block.lines(), block.first_line):
            try:
                yield line.decode()
            except UnicodeDecodeError:
                raise UnreadableFileError(f"{path}: line {number:,} is not UTF-8") from None


@contextmanager
def _told(path: Path, output: Output) -> Iterator[None]:
    """What keeps a file from being read ends the command, with one line that names it."""
    try:
        yield
    except UnreadableFileError as error:
        text = str(error)
        output.problem(text if text.startswith(str(path)) else f"{path}: {text}")
        raise typer.Exit(WRONG_USE) from error


def _sum(found: list[Tally], *, same: bool) -> Tally:
    total = Tally("all", same)
    for tally in found:
        if tally.same is same:
            total.pairs += tally.pairs
            for name, taken in tally.taken.items():
                total.taken[name] += taken
    return total


def _draw_rates(found: list[Tally], console: Console) -> None:
    for same, title in ((True, "The same picture: found"), (False, "Other pictures: wrongly taken for the same")):
        rows = [tally for tally in found if tally.same is same]
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        for name in ("kind", "pairs", *LEVELS):
            table.add_column(name, justify="left" if name == "kind" else "right")
        for tally in [*rows, _sum(found, same=same)]:
            table.add_row(tally.kind, str(tally.pairs), *(f"{tally.taken[name] / tally.pairs:.1%}" for name in LEVELS))
        console.print(table)


def _draw_mined(found: Mined, groups: int, console: Console) -> None:
    total = max(found.prompts, 1)
    console.print(f"{found.prompts:,} prompts; {found.repeats / total:.2%} of them repeat an earlier one.")
    console.print(f"The canonical level would merge {found.merged:,} more: {found.merged / total:.2%}.")
    for each in found.groups[:groups]:
        console.print()
        console.print(each.form, style="bold", markup=False)
        for prompt, count in each.prompts:
            console.print(f"  {count:,} x  {prompt}", markup=False)


_COMMANDS: dict[str, Callable[..., None]] = {"eval": evaluate, "mine": mine}

app = typer.Typer(help="How the levels of similarity do on pairs of prompts, and on a log.", no_args_is_help=True)
for _name, _command in _COMMANDS.items():
    app.command(_name)(flat(_command))
