"""How nginx answers conditional and range requests for a file: the requests, nginx itself, and what is compared."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import struct
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import httpx

from cacheserver.http.delivery.conditions import write_date

MODIFIED_S = 1_700_000_000
SIZE = 1024
_WIDTH, _HEIGHT = 238, 4


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _picture() -> bytes:
    """A PNG that is not packed, so that its bytes are the same whatever library makes it."""
    rows = b"".join(bytes([0, *((x * 7 + y * 31) % 256 for x in range(_WIDTH))]) for y in range(_HEIGHT))
    head = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 8, 0, 0, 0, 0)
    chunks = (_chunk(b"IHDR", head), _chunk(b"IDAT", zlib.compress(rows, 0)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


PICTURE = _picture()
"""What both serve."""

_START_S = 10
_NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
_BOUNDARY = re.compile(r"boundary=(\S+)")
_CONFIG = """
daemon off;
master_process off;  # as whoever runs the tests, who can read the file
pid {directory}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    types {{ image/png png; }}
    if_modified_since before;  # RFC 9110; nginx's own default takes one date only
    max_ranges 64;             # as many as we send
    server {{ listen 127.0.0.1:{port}; root {directory}; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One request. In headers `{etag}`, `{date}`, `{earlier}` and `{later}` stand for what the server itself tells.

    `rather` is the status where RFC 9110 leaves no choice and nginx does otherwise; `because` is the RFC's sentence.
    """

    name: str
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"
    rather: int | None = None
    because: str = ""


def _ranges(count: int) -> str:
    return "bytes=" + ",".join(f"{at}-{at}" for at in range(count))


CASES = (
    Case("whole"),
    Case("head", method="HEAD"),
    Case("if-none-match: the tag", {"if-none-match": "{etag}"}),
    Case("if-none-match: the tag, weak", {"if-none-match": "W/{etag}"}),
    Case("if-none-match: another", {"if-none-match": '"other"'}),
    Case("if-none-match: listed", {"if-none-match": '"other", {etag}'}),
    Case("if-none-match: listed without spaces", {"if-none-match": '"other",W/"more",{etag},"last"'}),
    Case("if-none-match: any", {"if-none-match": "*"}),
    Case("if-none-match: without quotes", {"if-none-match": "other"}),
    Case("if-none-match, head", {"if-none-match": "{etag}"}, method="HEAD"),
    Case("if-modified-since: that date", {"if-modified-since": "{date}"}),
    Case("if-modified-since: later", {"if-modified-since": "{later}"}),
    Case("if-modified-since: earlier", {"if-modified-since": "{earlier}"}),
    Case("if-modified-since: no date", {"if-modified-since": "yesterday"}),
    Case("if-none-match: another, if-modified-since", {"if-none-match": '"other"', "if-modified-since": "{date}"}),
    Case("if-none-match, if-modified-since: both", {"if-none-match": "{etag}", "if-modified-since": "{date}"}),
    Case(
        "if-none-match, if-modified-since: earlier",
        {"if-none-match": "{etag}", "if-modified-since": "{earlier}"},
        rather=304,
        because="13.1.3: A recipient MUST ignore If-Modified-Since if the request contains an If-None-Match",
    ),
    Case("if-match: the tag", {"if-match": "{etag}"}),
    Case("if-match: the tag, weak", {"if-match": "W/{etag}"}),
    Case("if-match: another", {"if-match": '"other"'}),
    Case("if-match: listed", {"if-match": '"other", {etag}'}),
    Case("if-match: any", {"if-match": "*"}),
    Case("if-match: another, and a range", {"if-match": '"other"', "range": "bytes=0-9"}),
    Case("if-unmodified-since: that date", {"if-unmodified-since": "{date}"}),
    Case("if-unmodified-since: later", {"if-unmodified-since": "{later}"}),
    Case("if-unmodified-since: earlier", {"if-unmodified-since": "{earlier}"}),
    Case(
        "if-unmodified-since: no date",
        {"if-unmodified-since": "yesterday"},
        rather=200,
        because="13.1.4: A recipient MUST ignore the header field if the value is not a valid HTTP-date",
    ),
    Case(
        "if-match, if-unmodified-since: earlier",
        {"if-match": "{etag}", "if-unmodified-since": "{earlier}"},
        rather=200,
        because="13.1.4: A recipient MUST ignore If-Unmodified-Since if the request contains an If-Match",
    ),
    Case("range: first bytes", {"range": "bytes=0-99"}),
    Case("range: in between", {"range": "bytes=100-199"}),
    Case("range: one byte", {"range": "bytes=0-0"}),
    Case("range: last byte", {"range": "bytes=-1"}),
    Case("range: to the end", {"range": "bytes=1000-"}),
    Case("range: all, open", {"range": "bytes=0-"}),
    Case("range: beyond the end", {"range": "bytes=1000-5000"}),
    Case("range: suffix longer than all", {"range": "bytes=-5000"}),
    Case("range: suffix of nothing", {"range": "bytes=-0"}),
    Case("range: behind the end", {"range": "bytes=1024-"}),
    Case("range: backwards", {"range": "bytes=9-5"}),
    Case("range: no number", {"range": "bytes=a-b"}),
    Case("range: nothing", {"range": "bytes="}),
    Case("range: too large a number", {"range": "bytes=0-99999999999999999999"}),
    Case("range: spaces", {"range": "bytes= 0 - 9"}),
    Case("range: capitals", {"range": "Bytes=0-9"}),
    Case("range: another unit", {"range": "pixels=0-9"}),
    Case("ranges: two", {"range": "bytes=0-9,100-109"}),
    Case("ranges: as asked, not in order", {"range": "bytes=500-509, 0-9, -5"}),
    Case("ranges: one of them there", {"range": "bytes=5000-,0-9"}),
    Case("ranges: none of them there", {"range": "bytes=5000-,6000-7000"}),
    Case("ranges: more than the whole", {"range": "bytes=0-,0-9"}),
    Case("ranges: one of them no range", {"range": "bytes=0-9,x"}),
    Case("ranges: as many as may be", {"range": _ranges(64)}),
    Case("ranges: too many", {"range": _ranges(65)}),
    Case("range, if-range: the tag", {"range": "bytes=0-9", "if-range": "{etag}"}),
    Case("range, if-range: the tag, weak", {"range": "bytes=0-9", "if-range": "W/{etag}"}),
    Case("range, if-range: another", {"range": "bytes=0-9", "if-range": '"other"'}),
    Case("range, if-range: that date", {"range": "bytes=0-9", "if-range": "{date}"}),
    Case("range, if-range: later", {"range": "bytes=0-9", "if-range": "{later}"}),
    Case("range behind the end, if-range: another", {"range": "bytes=5000-", "if-range": '"other"'}),
    Case("range, if-none-match", {"range": "bytes=0-9", "if-none-match": "{etag}"}),
    Case(
        "range, head",
        {"range": "bytes=0-9"},
        method="HEAD",
        rather=200,
        because="14.2: A server MUST ignore a Range with a method for which range handling is not defined; GET is all",
    ),
)


@dataclass(frozen=True, slots=True)
class Reply:
    """What is compared of an answer. The body counts by its digest; of errors only the status and the range count."""

    status: int
    headers: dict[str, str]
    body: str


class Asker:
    """Asks one server for its file, having learned the file's tag and date."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url
        whole = client.get(url)
        date = whole.headers["last-modified"]
        assert date == write_date(MODIFIED_S)
        earlier, later = write_date(MODIFIED_S - 60), write_date(MODIFIED_S + 60)
        self._words = {"etag": whole.headers["etag"], "date": date, "earlier": earlier, "later": later}

    def reply(self, case: Case) -> Reply:
        """The answer to a case."""
        headers = {name: value.format(**self._words) for name, value in case.headers.items()}
        answer = self._client.request(case.method, self._url, headers=headers)
        content, told = answer.content, dict(answer.headers)
        if match := _BOUNDARY.search(told.get("content-type", "")):
            content = content.replace(match[1].encode(), b"B")
            told["content-type"] = told["content-type"].replace(match[1], "B")
            told.pop("content-length")  # a boundary's length is its server's
        if answer.is_error:
            return Reply(answer.status_code, _chosen(told, ["content-range"]), "")
        told["etag"] = "own" if told.get("etag") == self._words["etag"] else told.get("etag", "none")
        names = ["content-type", "content-length", "content-range", "etag", "last-modified"]
        if answer.status_code == HTTPStatus.OK:
            names.append("accept-ranges")
        return Reply(answer.status_code, _chosen(told, names), hashlib.sha256(content).hexdigest()[:16])


def _chosen(headers: Mapping[str, str], names: list[str]) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}


def is_installed() -> bool:
    """Whether nginx is there."""
    return _NGINX is not None


@contextmanager
def nginx(directory: Path, data: bytes = PICTURE) -> Iterator[str]:
    """Serve `data` as a PNG file until the block ends; its URL."""
    assert _NGINX is not None
    file = directory / "picture.png"
    file.write_bytes(data)
    os.utime(file, (MODIFIED_S, MODIFIED_S))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = directory / "nginx.conf"
    config.write_text(_CONFIG.format(directory=directory, port=port))
    for path in (directory, file):
        path.chmod(0o755)
    process = subprocess.Popen([_NGINX, "-c", config, "-p", directory])  # noqa: S603 - the one that was found
    url = f"http://127.0.0.1:{port}/picture.png"
    try:
        transport = httpx.HTTPTransport(retries=_START_S)
        with httpx.Client(transport=transport, trust_env=False) as client:
            client.get(url).raise_for_status()
        yield url
    finally:
        process.terminate()
        process.wait(_START_S)
