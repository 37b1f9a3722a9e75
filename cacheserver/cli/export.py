"""cacheserver export: what a namespace has stored, as import reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from cacheserver.cli.journal import Journal, JournalError
from cacheserver.cli.manifest import row_of
from cacheserver.cli.options import Link, Namespace
from cacheserver.cli.output import WRONG_USE, Output
from cacheserver.cli.session import session
from cacheserver.client import Client, KeyGoneError, StoredImage
from cacheserver.model import CacheKey

_MANIFEST = "manifest.jsonl"
_IMAGES = "images"
_TYPES = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}


@dataclass(slots=True)
class _Count:
    """What has become of the pictures."""

    before: int = 0
    exported: int = 0
    gone: int = 0


def export(
    directory: Annotated[Path, typer.Argument(help="Where to write manifest.jsonl and the images.", file_okay=False)],
    *,
    namespace: Namespace = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="Only list them: no sources, no image files.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Images fetched at a time.")] = 8,
    link: Link,
) -> None:
    """Write what a namespace has stored into a directory, as import reads it. Needs the permissions admin and read.

    Interrupted, run it again: it goes on where it was.
    """
    with session(link) as (client, output):
        directory.mkdir(parents=True, exist_ok=True)
        count = _Count()
        with _manifest(directory / _MANIFEST, output) as manifest:
            done = _done(manifest, output, has_images=not no_images)
            count.before = len(done)
            stored = (each for each in client.admin.list_images(namespace=namespace) if each.identity.key not in done)
            fetch = partial(_fetched, client, directory, namespace)
            rows = (row_of(each, each.image.digest, None) for each in stored) if no_images else None
            for row in _shown(rows or _ahead(stored, fetch, concurrency), output):
                if row is None:
                    count.gone += 1
                else:
                    manifest.add(row)
                    count.exported += 1
        facts = {"exported": count.exported, "done_before": count.before, "gone": count.gone}
        output.result(facts, lambda console: _draw(facts, directory, console))


def _manifest(file: Path, output: Output) -> Journal:
    try:
        return Journal(file)
    except JournalError as error:
        output.problem(str(error))
        raise typer.Exit(WRONG_USE) from error


def _done(manifest: Journal, output: Output, *, has_images: bool) -> set[str]:
    """The keys that an earlier run has written, if it was of the same kind; else ends the command."""
    done: set[str] = set()
    try:
        for _, row in manifest.entries():
            if ("source" in row) != has_images or not isinstance(row.get("key"), str):
                output.problem("The directory has a manifest of another kind; name another directory.")
                raise typer.Exit(WRONG_USE)
            done.add(row["key"])
    except JournalError as error:
        output.problem(str(error))
        raise typer.Exit(WRONG_USE) from error
    return done


def _ahead(stored: Iterable[StoredImage], fetch: Any, concurrency: int) -> Iterator[dict[str, Any] | None]:
    """The rows, fetched some ahead in threads, in the order of the list."""
    with ThreadPoolExecutor(concurrency, thread_name_prefix="fetch") as pool:
        ahead: deque[Future[dict[str, Any] | None]] = deque()
        for each in stored:
            ahead.append(pool.submit(fetch, each))
            if len(ahead) > concurrency:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _fetched(client: Client, directory: Path, namespace: str | None, stored: StoredImage) -> dict[str, Any] | None:
    """The row of a picture whose file is written; None if it is gone meanwhile."""
    key = CacheKey.parse(stored.identity.key)  # what names a file is looked at first
    file = f"{_IMAGES}/{key.fingerprint.hex()[:2]}/{key.name}.{_TYPES.get(stored.image.content_type, 'bin')}"
    path = directory / file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        header = client.download(path, key=key.name, namespace=namespace)
    except KeyGoneError:
        return None
    return row_of(stored, header.image.digest, file)


def _shown(rows: Iterable[dict[str, Any] | None], output: Output) -> Iterator[dict[str, Any] | None]:
    """The same rows, counted on a terminal while they come."""
    if not output.err.is_terminal:
        yield from rows
        return
    with Progress(TextColumn("{task.completed:,.0f} exported"), console=output.err, transient=True) as bar:
        task = bar.add_task("exporting", total=None)
        for row in rows:
            bar.advance(task)
            yield row


def _draw(facts: dict[str, int], directory: Path, console: Console) -> None:
    before = f", {facts['done_before']:,} done before" if facts["done_before"] else ""
    gone = f", {facts['gone']:,} gone meanwhile" if facts["gone"] else ""
    console.print(f"{facts['exported']:,} exported{before}{gone}", style="bold green")
    console.print(f"  file  {directory / _MANIFEST}")
