"""Image delivery against nginx and against a bare route: are answers the same, and what does a picture cost.

nginx (apt-get install nginx-light) and the service serve the same file side by side and are asked the same 61
conditional and range requests. Every answer's status, headers that matter and body are compared:

    no answer differs, but for those where RFC 9110 leaves no choice and nginx does otherwise; these are listed

Then a picture of 100 kB is fetched from the service's memory and from a bare starlette route on the same server, 1 and
32 at a time, in turn: how much dearer a fetch is that is looked up, admitted, judged, counted and logged. That is told
and held against nothing: CDNs and browsers keep what they fetched.

--record writes down what nginx answers, for the tests.
"""

from __future__ import annotations

import asyncio
import json as json_format
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import httpx
import typer

from cacheserver.client import AsyncClient
from scripts.bench.figures import BusyCores, print_table, print_verdict, write_json
from scripts.bench.http_hit import Pair, bare_route, figures_of, paired, print_pairs
from scripts.bench.stand import ServiceProcess
from tests.nginx import CASES, MODIFIED_S, PICTURE, Asker, Case, Reply, is_installed, nginx
from tests.provider import large_png

_RECORD = Path(__file__).resolve().parents[2] / "tests" / "data" / "nginx_replies.json"
_CONFIG = 'tiers = ["memory", "disk"]\n[disk]\nfsync = false\n[namespaces.default]\npublic_images = true\n'
_REQUEST = (
    "GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: keep-alive\r\n"
    "user-agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 "
    "Safari/537.36\r\n"
    "accept: image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8\r\nsec-fetch-site: cross-site\r\n"
    "sec-fetch-mode: no-cors\r\nsec-fetch-dest: image\r\naccept-encoding: gzip, deflate, br, zstd\r\n"
    "accept-language: en-GB,en;q=0.9\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Compared:
    """One request and both answers."""

    case: Case
    nginx: Reply
    ours: Reply

    @property
    def is_as_it_should_be(self) -> bool:
        """Whether they are the same, or differ as the RFC must have it."""
        if self.case.rather is None:
            return self.nginx == self.ours
        return self.ours.status == self.case.rather != self.nginx.status


def compare(url: str) -> list[Compared]:
    """Nginx's answers and those of the picture at `url`, to every request."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        httpx.Client(trust_env=False) as client,
        nginx(Path(directory)) as theirs,
    ):
        asks = Asker(client, theirs), Asker(client, url)
        return [Compared(case, *(asker.reply(case) for asker in asks)) for case in CASES]


def record() -> None:
    """Write down what nginx answers."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        httpx.Client(trust_env=False) as client,
        nginx(Path(directory)) as url,
    ):
        asker = Asker(client, url)
        replies = {case.name: asdict(asker.reply(case)) for case in CASES}
    _RECORD.write_text(json_format.dumps(replies, indent=1) + "\n")


async def measure(*, rounds: int, count: int, image_bytes: int) -> tuple[list[Compared], dict[int, Pair]]:
    """Both comparisons with one service."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        service = await stack.enter_async_context(ServiceProcess(directory / "service", _CONFIG))
        client = await stack.enter_async_context(AsyncClient(service.address))
        same = await client.put(PICTURE, "the same", create_time=datetime.fromtimestamp(MODIFIED_S, UTC))
        compared = await asyncio.to_thread(compare, f"http://{service.http_address}/images/{same.image.key}")
        data = large_png(1, image_bytes)
        path = f"/images/{(await client.put(data, 'large')).image.key}"
        body_file, request_file = directory / "body", directory / "request"
        body_file.write_bytes(data)
        request_file.write_bytes(_REQUEST.format(path=path).encode("ascii"))
        floor = await stack.enter_async_context(bare_route(path, body_file, media_type="image/png"))
        server = service.http_address, service.pid
        return compared, await paired(server, floor, request_file, rounds=rounds, count=count)


def _print_compared(compared: list[Compared]) -> list[str]:
    """Print where we differ from nginx; what is not as it should be."""
    alike = sum(each.nginx == each.ours for each in compared)
    print_table(
        f"{len(compared)} requests to nginx and to us: {alike} answers alike, but",
        ("request", "nginx", "ours", "RFC 9110"),
        [
            (each.case.name, str(each.nginx.status), str(each.ours.status), each.case.because)
            for each in compared
            if each.nginx != each.ours
        ],
    )
    return [
        f"{each.case.name}: nginx {each.nginx}, ours {each.ours}" for each in compared if not each.is_as_it_should_be
    ]


def main(
    *,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 7,
    count: Annotated[int, typer.Option(help="Fetches from each in a round, at each concurrency.")] = 2_000,
    image_bytes: Annotated[int, typer.Option(help="Size of the picture.")] = 100_000,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
    record_only: Annotated[bool, typer.Option("--record", help="Only write down what nginx answers.")] = False,
) -> None:
    """Image delivery against nginx and against a bare route."""
    if not is_installed():
        raise typer.BadParameter("nginx is not installed: apt-get install nginx-light")
    if record_only:
        record()
        return
    busy = BusyCores()
    compared, pairs = asyncio.run(measure(rounds=rounds, count=count, image_bytes=image_bytes))
    shortfalls = _print_compared(compared)
    print_pairs(f"A picture of {image_bytes:,} bytes by URL, {rounds} rounds of {count:,}", pairs)
    print_verdict(shortfalls)
    told = [asdict(each) for each in compared]
    result = {"compared": told, "busy_cores": busy.read(), "shortfalls": shortfalls, **figures_of(pairs)}
    write_json(json, "delivery", result)
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
