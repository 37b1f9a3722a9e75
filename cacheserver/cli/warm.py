"""cacheserver warm: fill the cache before anybody asks."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cacheserver.cli.journal import JournalError
from cacheserver.cli.options import Link, Namespace, Spec, microusd
from cacheserver.cli.output import FAILED, WRONG_USE, Output
from cacheserver.cli.session import session
from cacheserver.cli.warm_history import KINDS, row_lines
from cacheserver.cli.warm_job import PARTLY, Job, Pace, PlanFailedError
from cacheserver.cli.warm_result import ResultFile
from cacheserver.cli.warm_rows import Defaults, InputError, InputFormat, Source, Template, format_of
from cacheserver.client import Client, PromptKind, TierName

_STDIN = Path("-")
_JOB_DIGITS = 12


def warm(  # noqa: PLR0913 - one parameter per option
    file: Annotated[
        Path | None,
        typer.Argument(help="CSV with a header, JSON lines, or one prompt a line; - is standard input."),
    ] = None,
    *,
    input_format: Annotated[
        InputFormat | None, typer.Option(help="How the input is written.", show_default="as its name ends")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='The prompt, as "photo of {product}, {style}"; {{ and }} are braces.')
    ] = None,
    variables: Annotated[
        Path | None, typer.Option("--vars", help="File with a column for each {variable} of the template.")
    ] = None,
    from_history: Annotated[
        bool,
        typer.Option("--from-history", help="What callers asked for, of namespaces that store prompts. Needs admin."),
    ] = False,
    kind: Annotated[
        list[PromptKind] | None,
        typer.Option(help="With --from-history, only these; repeatable.", show_default=", ".join(KINDS)),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=10_000, help="With --from-history, at most so many, the most wanted.")
    ] = 1_000,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it would make, cost and take.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Spend without asking.")] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="USD", help="The most to spend, all runs of the job together.")
    ] = None,
    max_rate: Annotated[int | None, typer.Option(min=1, help="Pictures that may be begun a minute.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=1_000, help="Pictures made at a time.", show_default="16")
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(help="Name: its pictures carry the tag job:NAME.", show_default="after the input"),
    ] = None,
    result: Annotated[
        Path | None,
        typer.Option(help="File with a line for each row; run again it goes on there.", show_default="by the input"),
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Go on without rows that cannot be used, and name them.")
    ] = False,
    tier: Annotated[
        TierName | None,
        typer.Option(help="Only copy into this tier what slower ones have: redis. Without a file: everything."),
    ] = None,
    spec: Spec,
    namespace: Namespace = None,
    n: Annotated[int, typer.Option("-n", min=1, max=10, help="How many pictures of each.")] = 1,
    use: Annotated[str | None, typer.Option(help="What they are for, as thumbnail.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Label for purge and reports; repeatable.")] = None,
    link: Link,
) -> None:
    """Have pictures made before anybody asks, at the lowest priority; what is cached costs nothing.

    Options say what rows do not. Exit code 0: all rows are cached now; 3: some failed; 1: none is, or the service went
    away; 2: wrong use, and nothing was spent.
    """
    given = Given(
        file=_STDIN if file == _STDIN else variables or file,
        form=input_format,
        template=template,
        history=History(tuple(kind or KINDS), limit) if from_history else None,
        defaults=Defaults(
            spec={name: value for name, value in spec.options().items() if value is not None},
            namespace=namespace,
            n=n,
            use=use,
            tags=tuple(tag or ()),
        ),
    )
    _check(given, file=file, variables=variables, plan=plan, tier=tier)
    pace = Pace(
        budget_microusd=None if budget is None else microusd(budget, "--budget"),
        max_images_per_minute=max_rate,
        concurrency=concurrency,
    )
    with session(link) as (client, output):
        if given.file is None and given.history is None:
            raise typer.Exit(_fill_all(client, output, namespace, tier, pace))
        try:
            with _source(given, client, output) as source:
                work = Job(client, output, source, pace=pace, tier=tier, skips_bad_rows=skip_bad_rows)
                code = _work(work, given, name=job, result=result, plan=plan, yes=yes)
        except (InputError, JournalError, PlanFailedError) as error:
            output.problem(str(error))
            raise typer.Exit(WRONG_USE) from error
    raise typer.Exit(code)


@dataclass(frozen=True)
class History:
    """Recorded prompts as the input: of these kinds, at most so many."""

    kinds: tuple[PromptKind, ...]
    limit: int


@dataclass(frozen=True)
class Given:
    """The input as it was named; neither `file` nor `history`: nothing but a tier to fill."""

    file: Path | None
    form: InputFormat | None
    template: str | None
    history: History | None
    defaults: Defaults


def _check(given: Given, *, file: Path | None, variables: Path | None, plan: bool, tier: TierName | None) -> None:
    if (given.template is None) != (variables is None):
        raise typer.BadParameter("--template and --vars go together")
    if variables is not None and file is not None:
        raise typer.BadParameter("pass either FILE or --template with --vars")
    if given.file is not None and given.history is not None:
        raise typer.BadParameter("pass either a file or --from-history")
    if given.file is None and given.history is None and tier is None:
        raise typer.BadParameter("pass FILE, or --template with --vars, or --from-history, or --tier to fill")
    if plan and tier is not None:
        raise typer.BadParameter("to fill a tier spends nothing: there is nothing to plan")
    if given.file is not None and given.file != _STDIN and not given.file.exists():
        raise typer.BadParameter(f"{given.file}: no such file")


@contextmanager
def _source(given: Given, client: Client, output: Output) -> Iterator[Source]:
    """The rows. What can be read once and is needed more often is kept in a file meanwhile."""
    template = None if given.template is None else Template(given.template)
    if given.file is not None and given.file != _STDIN:
        yield Source(given.file, given.form or format_of(given.file), given.defaults, template)
        return
    with tempfile.NamedTemporaryFile(prefix="warm-", suffix=".rows") as spool:
        form = given.form or InputFormat.TEXT
        if given.history is None:
            shutil.copyfileobj(sys.stdin.buffer, spool)
        else:
            form = InputFormat.JSONL
            kinds, limit = given.history.kinds, given.history.limit
            prompts = client.admin.list_prompts(namespace=given.defaults.namespace, kinds=kinds, limit=limit)
            if not prompts:
                output.result({"rows": 0}, lambda console: console.print("nothing is recorded that could be warmed"))
                raise typer.Exit
            spool.writelines(line.encode() for line in row_lines(prompts))
        spool.flush()
        yield Source(Path(spool.name), form, given.defaults, template)


def _work(  # noqa: PLR0913 - what was asked for, by keyword
    work: Job, given: Given, *, name: str | None, result: Path | None, plan: bool, yes: bool
) -> int:
    """Plan, ask, run; the exit code."""
    work.check()
    if plan:
        work.plan()
        return work.tell_plan()
    digest = work.source.digest(work.tier or "")
    short = digest[:_JOB_DIGITS]
    # Of recorded prompts there are others tomorrow; what is to be made anew is so once a day all the same.
    name = name or (f"warm-{short}" if given.history is None else f"history-{datetime.now(UTC):%Y-%m-%d}")
    with ResultFile(result or _beside(given.file, short), digest=digest, job=name) as file:
        work.go_on(file, name)
        if work.tier is None:
            work.plan()
            work.draw_plan()
            if not (yes or _is_agreed(work)):
                return WRONG_USE
        work.run()
        return work.tell_result()


def _beside(file: Path | None, short: str) -> Path:
    if file is None or file == _STDIN:
        return Path(f"warm-{short}.jsonl")
    return file.with_name(f"{file.name}.warm.jsonl")


def _is_agreed(work: Job) -> bool:
    """Whether whoever sits there agrees to the plan; nothing to be made needs no agreement."""
    if not work.costs_something:
        return True
    if not sys.stdin.isatty() or work.output.as_json:
        work.output.problem("nobody is there to agree to this plan: pass --yes; nothing was spent")
        return False
    if typer.confirm("Make them?", err=True):
        return True
    work.output.problem("nothing was spent")
    return False


def _fill_all(client: Client, output: Output, namespace: str | None, tier: TierName | None, pace: Pace) -> int:
    totals = None
    for progress in client.warm((), fill=tier, namespace=namespace or "default", concurrency=pace.concurrency):
        totals = progress.totals
    if totals is None:
        return FAILED
    there = sum(totals.cached.values())
    facts = {"items": totals.items, "filled": totals.filled, "cached": there, "failed": totals.failed}
    text = (
        f"{totals.items:,} pictures: {totals.filled:,} copied into {tier}, {there:,} there before, "
        f"{totals.failed:,} failed"
    )
    output.result(facts, lambda console: console.print(text))
    if not totals.failed:
        return 0
    return PARTLY if totals.filled or there else FAILED
