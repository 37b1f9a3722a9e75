"""cacheserver get: an image by its prompt or key."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from cacheserver.cli.options import Inputs, Link, Namespace, Spec
from cacheserver.cli.output import NOT_THERE, Output, dollars, size
from cacheserver.cli.session import session
from cacheserver.client import (
    CachePolicy,
    Chunk,
    Client,
    ImageHeader,
    ImageSpec,
    Presence,
    SpecOptions,
    State,
    StreamEvent,
    VariantPolicy,
)
from cacheserver.client import Progress as Waiting
from cacheserver.client.image_file import ImageFile

_STDOUT = Path("-")


@dataclass(frozen=True)
class Got:
    """One picture of the answer and the file it went to."""

    header: ImageHeader
    file: Path | None

    @property
    def is_ready(self) -> bool:
        """Whether the picture is made."""
        return self.header.status.state is State.READY


def get(  # noqa: PLR0913 - one parameter per option
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; several images get -1, -2, …; - is standard output."),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=10, help="How many pictures.")] = 1,
    key: Annotated[str | None, typer.Option(help="Fetch the picture of this key instead.")] = None,
    spec: Spec,
    inputs: Inputs,
    namespace: Namespace = None,
    policy: Annotated[CachePolicy | None, typer.Option(help="How the cache is used.", show_default="use_cache")] = None,
    another: Annotated[
        bool, typer.Option("--next", help="Another picture than the first, and than --next gave before.")
    ] = False,
    use: Annotated[
        str | None, typer.Option(help="What it is for, as thumbnail: the namespace says which quality that takes.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Make so many on a miss and answer with the best.", show_default="1")
    ] = None,
    allow_degraded: Annotated[
        bool, typer.Option("--allow-degraded", help="Take a lower quality where a budget or --max-wait needs it.")
    ] = False,
    tag: Annotated[list[str] | None, typer.Option(help="Label for purge and reports; repeatable.")] = None,
    max_wait: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait before leaving with the key; 0 only starts it.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds the whole call may take.")] = 120.0,
    link: Link,
) -> None:
    """Get an image: from the cache, or generated if no tier has it.

    Exit code 3: not cached, gone, or not made within --max-wait or not approved yet though a file was asked for.
    """
    _check(prompt, key, output, n, as_json=link.as_json)
    if another and use is not None and spec.quality is None:
        raise typer.BadParameter("--next looks for what you have by its quality: pass --quality in place of --use")
    with session(link, stdout_is_taken=output == _STDOUT) as (client, printed):
        events = client.stream_image(
            prompt,
            key=key,
            timeout_s=timeout,
            namespace=namespace,
            n=n,
            cache_policy=policy,
            variant_policy=VariantPolicy.NEXT if another else None,
            exclude_keys=_seen(client, prompt, spec.options(inputs.named()), namespace) if another and prompt else (),
            tags=tag or (),
            allow_degraded=allow_degraded,
            use=use,
            candidates=candidates,
            max_wait_s=max_wait,
            **spec.options(inputs.whole()),
        )
        with contextlib.closing(events):
            if output is None:
                got = [Got(header, None) for header in _headers(events, n)]
            else:
                got = _save(_shown(events, printed), _names(output, n))
        printed.result(_facts(got), lambda console: _draw(got, console))
    if output is not None and not all(each.is_ready for each in got):
        raise typer.Exit(NOT_THERE)


def _seen(client: Client, prompt: str, options: SpecOptions, namespace: str | None) -> list[str]:
    """The key of the first picture, if it is cached: whoever asks for another one has seen that."""
    found = client.find_cached([ImageSpec(prompt, **options)], namespace=namespace)
    return [item.key for item in found.items if item.presence is Presence.CACHED]


def _check(prompt: str | None, key: str | None, output: Path | None, n: int, *, as_json: bool) -> None:
    if (prompt is None) == (key is None):
        raise typer.BadParameter("pass either a prompt or --key")
    if output == _STDOUT and (n > 1 or as_json):
        raise typer.BadParameter("standard output holds one image and nothing else: leave out -n and --json")
    if output == _STDOUT and sys.stdout.isatty():
        raise typer.BadParameter("an image would garble the terminal: name a file, or redirect standard output")


def _names(output: Path, n: int) -> list[Path]:
    """The files of n pictures: cat.png, or cat-1.png, cat-2.png and so on."""
    if n == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, n + 1)]


def _headers(events: Generator[StreamEvent], n: int) -> Iterator[ImageHeader]:
    """The facts of n pictures; what is left of their bytes when the last is known is not fetched."""
    for event in events:
        if isinstance(event, ImageHeader):
            yield event
            if event.index == n - 1:
                return


def _save(events: Iterator[StreamEvent], names: list[Path]) -> list[Got]:
    if names == [_STDOUT]:
        return _to_stdout(events)
    got: list[Got] = []
    file: ImageFile | None = None
    try:
        for event in events:
            if isinstance(event, ImageHeader):
                if file is not None:
                    file.keep()
                file = ImageFile(names[event.index])
                file.open()
                got.append(Got(event, names[event.index]))
            if file is not None:
                file.take(event)
        if file is not None:
            file.keep()
    finally:
        if file is not None:
            file.discard()
    return got


def _to_stdout(events: Iterator[StreamEvent]) -> list[Got]:
    got = []
    for event in events:
        if isinstance(event, ImageHeader):
            got.append(Got(event, _STDOUT))
        elif isinstance(event, Chunk):
            sys.stdout.buffer.write(event.data)
    sys.stdout.buffer.flush()
    return got


def _shown(events: Iterator[StreamEvent], output: Output) -> Iterator[StreamEvent]:
    """The same events, with a bar on a terminal while they come."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=output.err, transient=True, disable=not output.err.is_terminal) as bar:
        task = bar.add_task("asking", total=None)
        for event in events:
            _show(event, bar, task)
            yield event


def _show(event: StreamEvent, bar: Progress, task: TaskID) -> None:
    match event:
        case Waiting(waited_s=waited_s, estimated_wait_s=estimated_wait_s):
            bar.update(task, description=f"waiting {waited_s:.0f} s, about {estimated_wait_s:.0f} s more")
        case ImageHeader(image=image):
            bar.reset(task, description=f"image {event.index + 1}", total=image.size_bytes or None)
        case Chunk(data=data):
            bar.advance(task, len(data))


def _facts(got: list[Got]) -> dict[str, Any]:
    return {
        "pending": not all(each.is_ready for each in got),
        "cost_microusd": sum(each.header.status.cost_microusd for each in got),
        "saved_microusd": sum(each.header.status.saved_microusd for each in got),
        "images": [_image_facts(each) for each in got],
    }


def _image_facts(got: Got) -> dict[str, Any]:
    image, status = got.header.image, got.header.status
    return {
        "key": image.key,
        "file": str(got.file) if got.file and got.is_ready else None,
        "tier": status.tier,
        "state": status.state,
        "matched": status.matched.name.lower() if status.matched else None,
        "matched_key": status.matched_key or None,
        "derived_from": status.derived_from or None,
        "collapsed": status.collapsed,
        "degraded": status.degraded,
        "cost_microusd": status.cost_microusd,
        "saved_microusd": status.saved_microusd,
        "estimated_wait_s": status.estimated_wait_s,
        "content_type": image.content_type,
        "width": image.width,
        "height": image.height,
        "size_bytes": image.size_bytes,
        "digest": image.digest,
        "variant": image.variant,
        "model": image.model,
        "score": image.score,
        "won_against": image.won_against,
        "usage": asdict(image.usage) if image.usage else None,
    }


def _draw(got: list[Got], console: Console) -> None:
    for each in got:
        if each.is_ready:
            _draw_image(each, console)
            continue
        image, status = each.header.image, each.header.status
        if status.state is State.PENDING_REVIEW:
            console.print("made, and waits for a person's review; once it is approved, collect it with:")
        else:
            console.print(f"still being made, about {status.estimated_wait_s:.0f} s more; collect it with:")
        console.print(f"  cacheserver get --key {image.key} -o FILE")


def _draw_image(got: Got, console: Console) -> None:
    image, status = got.header.image, got.header.status
    source = f"{status.tier or 'unknown'}{' (collapsed)' if status.collapsed else ''}"
    console.print(source, style="bold green", end="  ")
    if status.degraded:
        console.print("degraded", style="bold yellow", end="  ")
    if status.matched_key and status.matched is not None:
        console.print(f"{status.matched.name.lower()}: of a prompt in other words", style="bold yellow", end="  ")
    score = "" if image.score is None else f"  score {image.score:.2f}"
    money = f"cost {dollars(status.cost_microusd)}  saved {dollars(status.saved_microusd)}"
    console.print(f"{image.width}x{image.height} {image.content_type}  {size(image.size_bytes)}{score}  {money}")
    console.print(f"  key   {image.key}", style="dim")
    if status.derived_from:
        console.print(f"  from  {status.derived_from}", style="dim")
    if got.file is not None and got.file != _STDOUT:
        console.print(f"  file  {got.file}")
