"""A forecast from a request log, as tables, as JSON or as a page."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from cacheserver.cli.amounts import binary_size, bytes_of, listed, span_s, span_text
from cacheserver.cli.estimate import EstimateOptions
from cacheserver.cli.output import FAILED, Output, dollars, size
from cacheserver.errors import UnreadableFileError
from cacheserver.generation.prices import PriceTable
from cacheserver.identity import PROFILES, QUALITIES, compile_catalog_patterns
from cacheserver.whatif.estimate import Assumed, Estimate, estimate
from cacheserver.whatif.lines import LineFile
from cacheserver.whatif.logs import FIELDS, LogPlan
from cacheserver.whatif.page import estimate_page

_SMALL_BYTES = 4_000_000
"""A file below this is read before another process would have started."""

_MAX_WORKERS = 8


def run(log: Path, options: EstimateOptions) -> None:
    """Forecast and print; ends the command with its exit code if that fails.

    Raises:
        typer.BadParameter: an option cannot be used.
    """
    patterns = _patterns(options.catalog_pattern)
    if options.profile == "catalog" and not patterns:
        raise typer.BadParameter("the profile catalog needs --catalog-pattern", param_hint="--profile")
    if options.profile is not None and options.profile not in PROFILES:
        raise typer.BadParameter(f"pass one of {', '.join(PROFILES)}", param_hint="--profile")
    if options.quality not in QUALITIES:
        raise typer.BadParameter(f"pass one of {', '.join(QUALITIES)}", param_hint="--quality")
    if not listed(options.l1):
        raise typer.BadParameter("pass at least one size", param_hint="--l1")
    plan = LogPlan(
        names=_names(options.fields or []),
        model=options.model,
        size=options.image_size,
        quality=options.quality,
        profiles=tuple(PROFILES) if patterns else ("exact", "standard"),
        catalog_patterns=patterns,
    )
    assumed = Assumed(
        profile=options.profile or "standard",
        l1_bytes=tuple(bytes_of(text, "--l1") for text in listed(options.l1)),
        ttls_s=tuple(span_s(text, "--ttl") for text in listed(options.ttl)) or (None,),
        redis_ttl_s=span_s(options.redis_ttl, "--redis-ttl"),
        reroll_s=span_s(options.reroll_within, "--reroll-within"),
        image_bytes=bytes_of(options.image_bytes, "--image-bytes"),
    )
    output = Output(as_json=options.as_json)
    try:
        workers = _workers(log)
        result = estimate(LineFile(log), plan, assumed, workers=workers, is_strict=options.strict)
        if options.no_prompts:
            result = _without_prompts(result)
    except UnreadableFileError as error:
        output.problem(str(error))
        raise typer.Exit(FAILED) from error
    notes = _notes(result, plan, assumed)
    output.result(asdict(result) | {"notes": notes}, lambda console: _draw(result, notes, console))
    if options.html is not None:
        try:
            options.html.write_text(estimate_page(result, notes), encoding="utf-8")
        except OSError as error:
            output.err.print(f"{options.html}: {error.strerror}", style="red")  # the result stands, also as JSON
            raise typer.Exit(FAILED) from error


def _patterns(written: list[str] | None) -> tuple[str, ...]:
    patterns = tuple(written or ())
    try:
        compile_catalog_patterns(patterns)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--catalog-pattern") from error
    return patterns


def _names(written: list[str]) -> tuple[tuple[str, str], ...]:
    names = {name: name for name in FIELDS}
    for each in written:
        ours, _, theirs = each.partition("=")
        if ours not in names or not theirs:
            raise typer.BadParameter(f"write OURS=THEIRS, with one of {', '.join(FIELDS)}", param_hint="--field")
        names[ours] = theirs
    return tuple(names.items())


def _workers(log: Path) -> int:
    try:
        is_small = log.stat().st_size < _SMALL_BYTES
    except OSError as error:
        raise UnreadableFileError(f"{log}: {error.strerror}") from error
    return 0 if is_small else min(_MAX_WORKERS, os.cpu_count() or 1)


def _without_prompts(result: Estimate) -> Estimate:
    return replace(
        result,
        groups=tuple(replace(group, prompt="") for group in result.groups),
        near_misses=tuple(replace(each, template="", values=(), pattern="") for each in result.near_misses),
    )


def _notes(result: Estimate, plan: LogPlan, assumed: Assumed) -> list[str]:
    """What the figures rest on, and what is not in them."""
    notes = [
        f"costs are by the price list as of {PriceTable.load().as_of}, the picture alone, without its text tokens",
        f"every picture is taken to have {size(assumed.image_bytes)}",
        f"Redis keeps an image for {span_text(assumed.redis_ttl_s)} and has room for all of them; S3 keeps everything",
        f"a re-roll is the same caller's same prompt within {span_text(assumed.reroll_s)}",
        "what a namespace adds is not in it: quality_by_use, redaction and deny-lists, several variants",
    ]
    said = {
        "model": f"they are taken for {plan.model}",
        "size": f"it is left to the provider, and priced as {plan.size}",
        "quality": f"it is left to the provider, and priced as {plan.quality}",
        "caller": "which of their repeats are re-rolls cannot be told",
    }
    notes += [f"{count:,} rows have no {name}: {said[name]}" for name, count in result.missing.items()]
    if result.unpriced_rows:
        notes.append(f"{result.unpriced_rows:,} rows have a model, size or quality without a price: they count as $0")
    if result.disordered_rows:
        notes.append(
            f"{result.disordered_rows:,} rows are more than a minute earlier than one before them: sort the log by time"
        )
    if result.sample < 1:
        notes.append(f"estimated from {100 * result.sample:.3g} % of the keys")
    if result.is_cut:
        notes.append("the gzip stream ends early: rows may be missing")
    return notes


def _draw(result: Estimate, notes: list[str], console: Console) -> None:
    days = f"{result.span_s / 86_400:,.1f} days"
    console.print(f"{result.rows:,} pictures in {days}, {dollars(result.cost_microusd)} without a cache")
    _draw_bad(result, console)
    _draw_profiles(result, console)
    _draw_tiers(result, console)
    _draw_groups(result, console)
    _draw_near_misses(result, console)
    for note in notes:
        console.print(note, style="dim")


def _draw_bad(result: Estimate, console: Console) -> None:
    if result.bad_lines:
        console.print(f"left out, as they are no requests: {result.bad_lines:,} lines", style="yellow")
        for bad in result.first_bad_lines:
            console.print(f"  line {bad.line:,}: {bad.problem}", style="yellow")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _draw_profiles(result: Estimate, console: Console) -> None:
    table = _table(
        "\nprofile", "\ndistinct", "\nrepeats", "", "re-rolls\namong them", "saved if all\nis kept", "without\nre-rolls"
    )
    for each in result.profiles:
        table.add_row(
            each.profile,
            f"{each.distinct:,}",
            f"{each.repeats:,}",
            f"{100 * each.repeat_rate:.1f} %",
            f"{each.rerolls:,} ({100 * each.reroll_rate:.1f} %)",
            dollars(each.saved_microusd),
            dollars(each.saved_without_rerolls_microusd),
        )
    console.print(table)


def _draw_tiers(result: Estimate, console: Console) -> None:
    table = _table(
        "\nmemory", "\nlifetime", "hits\nin all", "in\nmemory", "in\nRedis", "in\nS3", "\nsaved", "without\nre-rolls"
    )
    for each in result.tiers:
        table.add_row(
            binary_size(each.l1_bytes),
            span_text(each.ttl_s),
            *(f"{100 * rate:.1f} %" for rate in (each.hit_rate, each.memory_rate, each.redis_rate, each.s3_rate)),
            dollars(each.saved_microusd),
            dollars(each.saved_without_rerolls_microusd),
        )
    console.print(table)


def _draw_groups(result: Estimate, console: Console) -> None:
    if not result.groups:
        return
    console.print("\nasked for most often, with the same model, size and quality", style="bold")
    for group in result.groups:
        told = _shortened(group.prompt) or f"the prompt of line {group.line:,}"
        console.print(f"{group.asks:>9,} x  saves {dollars(group.saved_microusd)}  {told}")


def _draw_near_misses(result: Estimate, console: Console) -> None:
    if not result.near_misses:
        return
    console.print(
        "\nprompts that differ in one word, in groups, and what one picture for each group would save", style="bold"
    )
    for each in result.near_misses:
        told = f"  {_shortened(each.template)}" if each.template else ""
        counts = f"{each.prompts:>9,} prompts in {each.groups:,}, {each.asks:,} asks"
        console.print(f"{counts}  saves {dollars(each.saved_microusd)}{told}")
        if each.values:
            console.print(f"{'':>12}as {', '.join(each.values)}", style="dim")
        if each.pattern:
            share = f"makes one of {100 * each.merged:.0f} % of them"
            console.print(f"{'':>12}profile catalog with catalog_patterns = ['{each.pattern}'] {share}", style="dim")


def _shortened(text: str, chars: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= chars else text[: chars - 1] + "…"
