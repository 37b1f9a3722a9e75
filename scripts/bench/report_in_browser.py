"""What a report's page does in a browser: it draws every chart, fetches nothing, and complains of nothing.

The page is made of rows of statistics with a prompt and names that try to break out of it, and opened in headless
Chromium, which is looked into by its DevTools protocol: on a light and a dark screen, on a narrow one, and in print.

Against: no request but for the file itself, no message on the console, no exception, nothing that the
Content-Security-Policy had to stop; a drawing in every figure; text that can be told from its background (a contrast
of 4.5, as WCAG 2.1 AA wants it); no line wider than a narrow screen; and a calculator that begins with the report's own
figures and follows its inputs.

It needs Chromium: `apt-get install chromium`, or its path in CHROMIUM.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from cacheserver.client import Outcome, StatsField, TierName
from cacheserver.embedded.child import leashed
from cacheserver.reports import charts, numbers, page
from cacheserver.reports.tables import usd
from scripts.bench.figures import print_table, print_verdict, write_json
from tests.report_rows import BOUNDS_S, row, some_period, some_rows
from tests.test_reports import replayed

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
CONTRAST = 4.5
_START_TIMEOUT_S = 30.0
_CALL_TIMEOUT_S = 60.0
_POLL_S = 0.05
_WIDE = (1280, 900)
_NARROW = (375, 800)


@dataclass(frozen=True, slots=True)
class View:
    """How the page is looked at."""

    name: str
    scheme: str = "light"
    media: str = "screen"
    size: tuple[int, int] = _WIDE


VIEWS = (
    View("light"),
    View("dark", scheme="dark"),
    View("narrow", size=_NARROW),
    View("print", media="print"),
    View("print of a dark screen", scheme="dark", media="print"),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one view showed.

    Attributes:
        requests: All addresses that were asked for.
        complaints: Console messages, exceptions and log entries.
        contrast: The least of any text of the page or a chart.
        too_wide_px: By how much the page is wider than the screen.
        costs: What the calculator says a month costs: with the cache, without it, and with half of all saved.
    """

    view: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    figures: int = 0
    drawings: int = 0
    contrast: float = 0.0
    too_wide_px: int = 0
    is_broken: bool = False
    costs: tuple[str, str, str] = ("", "", "")


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────


def sample() -> numbers.Report:
    """A report whose names try to be markup."""
    rows = [*some_rows(), row(Outcome.MISS, TierName.UPSTREAM, 3, namespace=HOSTILE, model=HOSTILE, quality=HOSTILE)]
    return numbers.report(rows, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])


def html(report: numbers.Report) -> str:
    """Its page, with every section."""
    contents = page.Contents(
        made_at=datetime.now(UTC),
        charts=charts.charts(report, replayed()),
        script=charts.script(),
        prompts=[page.Prompt("shop", HOSTILE, "high", "generated", 3.0, None)],
        prices_microusd={"medium": 53_000},
        price_source="a price table",
        other=report,
        sizes=replayed(),
    )
    return page.page(report, contents)


# ── the browser ─────────────────────────────────────────────────────────────────────────────────────────────────


class Browser:
    """A page of a browser, by the DevTools protocol: calls, and the events that came meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last_id = 0
        self._session_id: str | None = None
        self.events: list[Mapping[str, Any]] = []

    async def open_page(self) -> None:
        """A fresh page; the calls that follow are about it."""
        self._session_id = None
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session_id = attached["sessionId"]
        self.events = []
        for domain in ("Network", "Runtime", "Log", "Page"):
            await self.call(f"{domain}.enable")

    async def call(self, method: str, **params: Any) -> Any:
        """What the browser answers."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session_id:
            message["sessionId"] = self._session_id
        await self._socket.send_json(message)
        while True:
            answer = await self._socket.receive_json(timeout=_CALL_TIMEOUT_S)
            if answer.get("id") != self._last_id:
                self.events.append(answer)
                continue
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            return answer["result"]

    async def value_of(self, expression: str) -> Any:
        """What a JavaScript expression is worth; a promise is waited for."""
        result = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    """A headless Chromium of our own, which ends with us."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        sys.exit("this bench needs Chromium: apt-get install chromium, or name it: CHROMIUM=/path/to/chrome")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        argv = [chromium, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = await asyncio.create_subprocess_exec(*leashed(argv), stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL)
        try:
            address = await asyncio.wait_for(_address(Path(profile), process), _START_TIMEOUT_S)
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
                yield Browser(socket)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def _address(profile: Path, process: Process) -> str:
    """Where it listens, which it writes into its profile once it does."""
    file = profile / "DevToolsActivePort"
    while not file.exists() or "\n" not in file.read_text():
        if process.returncode is not None:
            raise RuntimeError(f"Chromium ended at once, with {process.returncode}")
        await asyncio.sleep(_POLL_S)
    port, path = file.read_text().split("\n")
    return f"ws://127.0.0.1:{port}{path}"


# ── looking ─────────────────────────────────────────────────────────────────────────────────────────────────────

_DRAWN = """new Promise((done) => {
  const look = () => document.documentElement?.dataset.drawn ? done(true) : setTimeout(look, 20);
  look();
})"""

_CONTRAST = """(() => {
  const parts = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (color) => {
    const [r, g, b] = parts(color).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!/rgba\\(.*, 0\\)/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...document.querySelectorAll("p, li, h1, h2, td, th, dd, summary, .card b, .card span, svg text")];
  return Math.min(...texts.filter((each) => each.textContent.trim()).map((each) => {
    const style = getComputedStyle(each);
    const [a, b] = [each.closest("svg") ? style.fill : style.color, ground(each)].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
})()"""

_COSTS = """(() => {
  const out = (name) => document.querySelector(`[data-out=${name}]`).textContent;
  const begin = [out("with"), out("without")];
  const slider = document.querySelector("[name=spared]");
  slider.value = 50;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  return [...begin, out("with")];
})()"""


async def look(browser: Browser, file: Path, view: View, pictures: Path | None) -> Seen:
    """Open the page anew in this view, and take it apart."""
    await browser.open_page()
    width, height = view.size
    await browser.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
    )
    features = [{"name": "prefers-color-scheme", "value": view.scheme}]
    await browser.call("Emulation.setEmulatedMedia", media=view.media, features=features)
    await browser.call("Page.navigate", url=file.as_uri())
    await browser.value_of(_DRAWN)
    if pictures is not None:
        shot = await browser.call("Page.captureScreenshot", captureBeyondViewport=True)
        (pictures / f"{view.name.replace(' ', '-')}.png").write_bytes(base64.b64decode(shot["data"]))
        if view.media == "print":
            printed = await browser.call("Page.printToPDF", printBackground=True)
            (pictures / f"{view.name.replace(' ', '-')}.pdf").write_bytes(base64.b64decode(printed["data"]))
    costs = await browser.value_of(_COSTS)
    return Seen(
        view=view.name,
        figures=await browser.value_of("document.querySelectorAll('figure').length"),
        drawings=await browser.value_of(
            "[...document.querySelectorAll('figure svg')].filter((svg) => svg.getBBox().width > 100).length"
        ),
        contrast=await browser.value_of(_CONTRAST),
        too_wide_px=await browser.value_of(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        ),
        is_broken=await browser.value_of("'broken' in window"),
        costs=tuple(costs),
        requests=[event["params"]["request"]["url"] for event in browser.events if _is(event, "requestWillBeSent")],
        complaints=[_complaint(event) for event in browser.events if _is(event, *_COMPLAINTS)],
    )


_COMPLAINTS = ("consoleAPICalled", "exceptionThrown", "entryAdded")


def _is(event: Mapping[str, Any], *names: str) -> bool:
    return event["method"].partition(".")[2] in names


def _complaint(event: Mapping[str, Any]) -> str:
    return json.dumps(event["params"])[:300]


def shortfalls(seen: Seen, report: numbers.Report, file: Path) -> list[str]:
    """What one view does not show as it should."""
    month = 30 / report.period.length.days
    total = report.total
    without_microusd = round(total.would_cost_microusd * month)
    measured_microusd = round((total.would_cost_microusd - total.saved_microusd) * month)
    costs = (usd(measured_microusd), usd(without_microusd), usd(without_microusd // 2))
    wrong = {
        f"asked for {seen.requests}": [url for url in seen.requests if url not in (file.as_uri(), "data:,")],
        f"complained: {seen.complaints}": seen.complaints,
        f"{seen.drawings} of {seen.figures} figures are drawn": not seen.figures or seen.drawings != seen.figures,
        f"a text has a contrast of {seen.contrast:.1f}": seen.contrast < CONTRAST,
        f"it is {seen.too_wide_px} px too wide": seen.too_wide_px > 0,
        "a name or prompt broke out of its text": seen.is_broken,
        f"the calculator says {seen.costs}, not {costs}": any(map(_differ, seen.costs, costs)),
    }
    return [f"{seen.view}: {what}" for what, is_so in wrong.items() if is_so]


def _differ(shown: str, expected: str) -> bool:
    """Whether two amounts differ by more than the inputs' rounding to hundredths of a per cent."""
    amounts = [float(text.replace("$", "").replace(",", "") or "nan") for text in (shown, expected)]
    return not abs(amounts[0] - amounts[1]) <= 1e-3 * amounts[1]


async def run(pictures: Path | None) -> tuple[list[Seen], list[str]]:
    """Every view of the page, and what falls short."""
    report = sample()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "report.html"
        file.write_text(html(report), encoding="utf-8")
        async with open_browser() as browser:
            seen = [await look(browser, file, view, pictures) for view in VIEWS]
    return seen, [line for each in seen for line in shortfalls(each, report, file)]


def main(
    *,
    pictures: Annotated[Path | None, typer.Option(help="Directory for screenshots and prints.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Open a report's page in Chromium and look whether all is as it should be."""
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    seen, wrong = asyncio.run(run(pictures))
    print_table("A report's page in Chromium", _COLUMNS, [_cells(each) for each in seen])
    write_json(json_file, "report_in_browser", {"views": [asdict(each) for each in seen], "shortfalls": wrong})
    print_verdict(wrong)
    raise typer.Exit(bool(wrong))


_COLUMNS = ("view", "requests", "complaints", "drawn", "least contrast", "too wide", "a month with", "without")


def _cells(seen: Seen) -> Sequence[str]:
    return (
        seen.view,
        f"{len(seen.requests)}",
        f"{len(seen.complaints)}",
        f"{seen.drawings} of {seen.figures}",
        f"{seen.contrast:.1f}",
        f"{max(0, seen.too_wide_px)} px",
        *seen.costs[:2],
    )


if __name__ == "__main__":
    typer.run(main)
