"""Chaos: three replicas on a Redis Cluster and S3 under seeded faults, and what their callers get meanwhile.

Replicas, Redis, S3 and the emulated provider are processes; between them are proxies that cut, hang and delay. Callers
ask without end for pictures, of which some are cached, some new and some asked for everywhere at once, put and purge
some, and go to the next replica when one does not answer. `tests.chaos.model` says what must be true of all that;
`tests.chaos.schedule` which faults there are, and when. The same seed gives the same faults at the same times; what the
callers are doing then depends on the machine. A full disk is a limit on the size of a replica's files (RLIMIT_FSIZE),
which needs no rights: journal and ledger cannot be written, and its log can.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import accumulate, count
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from cacheserver.client import (
    AsyncClient,
    CacheError,
    CachePolicy,
    DeadlineError,
    ImageSpec,
    NotCachedError,
    TryAgainError,
)
from cacheserver.model import AttemptOutcome
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.journal import Result
from scripts.bench.provider_pictures import Look, Pictures
from tests.chaos.model import CHECK_S, Span, sha256
from tests.chaos.schedule import REPLICAS, schedule
from tests.chaos.stand import FLOCK, Stand, standing
from tests.waiting import until

_CALLERS = 10
_POPULAR = 300
_ZIPF = 1.1
_FLOCK = 40
_CACHED_BEFORE = 40
"""Of the popular ones: hits from the beginning."""

_TRY_S = 8.0
_CALL_S = 60.0
"""Longer than all faults last that strike together."""

_READ_PURGED_S = CHECK_S + 3.0
_READ_S = 0.25
_AGAIN_S = 0.1
_PAUSE_S = 0.1
_HOME_S = 90.0
_COUNT_S = 0.5
_LAG_S = 0.05
_LOOK = Look("png", "1024x1024", "medium")
_HERD = 6
"""Ask for one new picture at once."""


def spec(prompt: str) -> ImageSpec:
    """What is asked for."""
    return ImageSpec(prompt=prompt, quality="medium", size="1024x1024")


class Callers:
    """What callers do, and what they are told, as the model hears it."""

    def __init__(self, stand: Stand, seed: int, reading: asyncio.TaskGroup) -> None:
        self._stand = stand
        self._model = stand.model
        self._reading = reading
        self._chance = random.Random(seed + 1)  # noqa: S311 - chooses what is asked for
        self._numbers = count()
        self._weights = list(accumulate(1 / rank**_ZIPF for rank in range(1, _POPULAR + 1)))
        self._pictures = Pictures(min_bytes=20_000)
        self.is_over = False

    async def go_on(self) -> None:
        """Do one thing after another until it is over."""
        while not self.is_over:
            await self._do_something(self._chance.random())
            await asyncio.sleep(self._chance.expovariate(1 / _PAUSE_S))

    async def _do_something(self, dice: float) -> None:
        popular = self._chance.choices(range(_POPULAR), cum_weights=self._weights)[0]
        if dice < 0.6:
            await self.ask(f"popular {popular}", "default")
        elif dice < 0.75:
            prompt, asked = self._chance.choice(list(self._model.prompts.items()))
            await self.ask(prompt, asked.namespace)
        elif dice < 0.85:
            prompt = f"new {next(self._numbers)}"
            await asyncio.gather(*(self.ask(prompt, "default") for _ in range(_HERD)))
        elif dice < 0.91:
            await self.ask(f"flock {popular % _FLOCK}", FLOCK)
        elif dice < 0.95:
            await self._put(f"put {next(self._numbers)}")
        elif dice < 0.997:
            prompt = f"popular {popular}"
            await self._purge([prompt], "default", prompt=spec(prompt))
        else:
            flock = [prompt for prompt, asked in self._model.prompts.items() if asked.namespace == FLOCK]
            await self._purge(flock, FLOCK, everything=True)

    async def fill(self) -> None:
        """Ask for some of it before anything breaks."""
        await asyncio.gather(*(self.ask(f"popular {number}", "default") for number in range(_CACHED_BEFORE)))

    async def ask(self, prompt: str, namespace: str) -> None:
        """Ask replicas in turn until one answers."""
        model = self._model
        now_s = time.monotonic()
        span = model.asked(prompt, namespace, now_s)
        was_hit = model.prompts[prompt].is_hit(now_s)
        purges = len(model.prompts[prompt].purges)

        async def get(client: AsyncClient, replica: int) -> None:
            began_s = time.monotonic()
            picture = await client.get_image(spec(prompt), namespace=namespace, timeout_s=_TRY_S)
            model.answered(prompt, replica, sha256(picture.data), began_s, time.monotonic())

        failed = await self._at_any(get)
        span.to_s = time.monotonic()
        was_hit = was_hit and purges == len(model.prompts[prompt].purges)
        model.counts["hits asked for" if was_hit else "misses asked for"] += 1
        if failed:
            model.failed(prompt, failed, was_hit=was_hit)

    async def _put(self, prompt: str) -> None:
        data = await self._pictures.make(_LOOK)
        now_s = time.monotonic()
        span = self._model.asked(prompt, "default", now_s)
        self._model.prompts[prompt].put.add(sha256(data))

        async def put(client: AsyncClient, replica: int) -> None:
            await client.put(data, spec(prompt), timeout_s=_TRY_S)
            self._model.prompts[prompt].by[sha256(data)] = replica

        failed = await self._at_any(put)
        span.to_s = time.monotonic()
        self._model.counts["puts"] += 1
        if failed:
            self._model.failed(prompt, failed, was_hit=False)
        else:
            self._model.prompts[prompt].given[sha256(data)] = now_s

    async def _purge(self, prompts: list[str], namespace: str, **what: Any) -> None:
        replica = self._chance.randrange(REPLICAS)
        purges = self._model.purging(prompts, replica, time.monotonic())
        try:
            await self._stand.replicas[replica].client.purge(namespace=namespace, timeout_s=_TRY_S, **what)
        except CacheError as error:
            self._model.counts[f"purge failed: {type(error).__name__}"] += 1
        else:
            self._model.counts["purges answered"] += 1
            for purge in purges:
                purge.is_answered = True
            if len(prompts) == 1:
                self._reading.create_task(self._read_purged(prompts[0], namespace))
        for purge in purges:
            # One that failed may take what it took a good while later.
            purge.span.to_s = time.monotonic()

    async def _read_purged(self, prompt: str, namespace: str) -> None:
        """Read what was purged at every replica, for longer than any may still serve it."""
        until_s = time.monotonic() + _READ_PURGED_S
        while time.monotonic() < until_s:
            for number, replica in enumerate(self._stand.replicas):
                began_s = time.monotonic()
                try:
                    picture = await replica.client.get_image(
                        spec(prompt), namespace=namespace, cache_policy=CachePolicy.ONLY_IF_CACHED, timeout_s=1.0
                    )
                except CacheError:
                    self._model.counts["reads of what was purged: nothing"] += 1
                else:
                    self._model.answered(prompt, number, sha256(picture.data), began_s, time.monotonic())
                    self._model.counts["reads of what was purged: a picture, old or new"] += 1
            await asyncio.sleep(_READ_S)

    async def _at_any(self, call: Callable[[AsyncClient, int], Awaitable[None]]) -> str:
        """Make this call at one replica after another; what the last one said if none answers, else nothing."""
        replica = self._chance.randrange(REPLICAS)
        until_s = time.monotonic() + _CALL_S
        while True:
            try:
                await call(self._stand.replicas[replica].client, replica)
            except (TryAgainError, DeadlineError) as error:
                self._model.counts[f"tried again: {error.reason or type(error).__name__}"] += 1
                if time.monotonic() > until_s:
                    return f"{type(error).__name__} {error.reason}"
                await asyncio.sleep(_AGAIN_S)
                replica = (replica + 1) % REPLICAS
            except CacheError as error:
                return f"{type(error).__name__} {error.reason} {error}"
            else:
                return ""


async def chaos(*, seconds: float, seed: int, directory: Path) -> Result:
    """Break everything for so long, let it end, and look at what is left."""
    async with standing(directory, seed) as stand:
        watching = [asyncio.create_task(_count(stand)), asyncio.create_task(_watch_lag(stand))]
        async with asyncio.TaskGroup() as calls:
            callers = Callers(stand, seed, calls)
            await callers.fill()
            for _ in range(_CALLERS):
                calls.create_task(callers.go_on())
            stand.model.began_s = began_s = time.monotonic()
            async with asyncio.TaskGroup() as faults:
                for fault in schedule(seed, seconds):
                    await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
                    faults.create_task(stand.strike(fault))
            await asyncio.sleep(max(0.0, began_s + seconds - time.monotonic()))
            callers.is_over = True
        await _settle(stand)
        for task in watching:
            task.cancel()
        await _read_all(stand)
        return await _result(stand)


async def _count(stand: Stand) -> None:
    while True:
        await asyncio.gather(*(replica.count() for replica in stand.replicas))
        await asyncio.sleep(_COUNT_S)


async def _watch_lag(stand: Stand) -> None:
    """Know when this process was late itself."""
    while True:
        before_s = time.monotonic()
        await asyncio.sleep(_LAG_S)
        if (now_s := time.monotonic()) > before_s + 2 * _LAG_S:
            stand.model.lags.append(Span(before_s + _LAG_S, now_s))


async def _settle(stand: Stand) -> None:
    """Wait until nothing is on its way."""

    async def is_settled() -> bool:
        try:
            entries = [await replica.metric("cacheserver_journal_entries") for replica in stand.replicas]
        except httpx.TransportError:
            return False
        return not sum(entries) and not (await stand.provider.state())["running"]

    try:
        await until(is_settled, within_s=_HOME_S)
    except TimeoutError:
        stand.model.breaches.append(f"journals are not empty {_HOME_S:g} s after the last fault")


async def _read_all(stand: Stand) -> None:
    """Read what was given at every replica, without making any anew."""
    places = asyncio.Semaphore(16)

    async def read(prompt: str, namespace: str, replica: int) -> None:
        until_s = time.monotonic() + _CALL_S
        while True:
            began_s = time.monotonic()
            try:
                picture = await stand.replicas[replica].client.get_image(
                    spec(prompt), namespace=namespace, cache_policy=CachePolicy.ONLY_IF_CACHED, timeout_s=30.0
                )
            except NotCachedError:
                stand.model.absent(prompt, replica, began_s)
            except CacheError as error:
                # One that was just started is not connected to at once.
                if isinstance(error, TryAgainError) and time.monotonic() < until_s:
                    await asyncio.sleep(_AGAIN_S)
                    continue
                what = f"{type(error).__name__} {error.reason}"
                stand.model.breaches.append(f"not to be read in the end at replica {replica}: {prompt!r}, {what}")
            else:
                stand.model.answered(prompt, replica, sha256(picture.data), began_s, time.monotonic())
            return

    async def read_in_turn(prompt: str, namespace: str, replica: int) -> None:
        async with places:
            await read(prompt, namespace, replica)

    prompts = [(prompt, asked.namespace) for prompt, asked in stand.model.prompts.items() if asked.given]
    await asyncio.gather(*(read_in_turn(*each, replica) for each in prompts for replica in range(REPLICAS)))


async def _result(stand: Stand) -> Result:
    model = stand.model
    calls = await stand.provider.calls()
    made: dict[str, set[str]] = {}
    for call in calls:
        made.setdefault(call.prompt_sha256, set()).update(call.pictures_sha256)
    rows: Counter[str] = Counter()
    for replica in stand.replicas:
        await replica.count()
        model.terms["unleased"] += replica.all_unleased
        rows.update([str(row.outcome) async for row in replica.client.admin.list_ledger()])
    model.terms["unknown"] = rows[AttemptOutcome.UNKNOWN] + rows[AttemptOutcome.SENT]
    model.check_answers(made)
    model.check_stored(await stand.stored())
    model.check_paid(Counter(call.prompt_sha256 for call in calls if call.billed_microusd))
    terms = ("purges", "corrupted", "unknown", "unleased", "paused", "losses")
    figures: dict[str, Any] = {
        "answers": len(model.answers),
        "hits that failed": model.failures["hit"],
        "misses that failed": model.failures["miss"],
        **dict(sorted(model.counts.items())),
        **{f"ledger: {outcome}": number for outcome, number in sorted(rows.items())},
        **{f"latest after its purge, {how}, s": late_s for how, late_s in sorted(model.latest_s.items())},
        **{f"may be paid for again: {term}": model.terms[term] for term in terms},
    }
    if not model.answers:
        model.breaches.append("nobody was answered: it says nothing")
    return Result(figures, model.breaches)


def main(
    minutes: Annotated[float, typer.Option(help="How long faults strike.")] = 30.0,
    seed: Annotated[int | None, typer.Option(help="Of faults; chosen and printed if not given.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Directory to leave logs and data in.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Chaos for so long; ends with 1 where anything is breached."""
    seed = random.randrange(1_000_000) if seed is None else seed  # noqa: S311 - no secret
    print(f"seed {seed}", file=sys.stderr, flush=True)  # noqa: T201 - a command's output
    if keep is not None:
        keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        result = asyncio.run(chaos(seconds=60 * minutes, seed=seed, directory=keep or Path(temporary)))
    rows = [
        (name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}") for name, value in result.figures.items()
    ]
    print_table(f"Chaos, seed {seed}", ["figure", "value"], rows)
    print_verdict(result.shortfalls)
    write_json(json, "chaos", {"seed": seed, "figures": result.figures, "shortfalls": result.shortfalls})
    raise typer.Exit(1 if result.shortfalls else 0)


if __name__ == "__main__":
    typer.run(main)
