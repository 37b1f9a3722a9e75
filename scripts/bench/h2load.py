"""Driving h2load, a load generator in C, over gRPC: one unary call again and again.

h2load knows nothing of gRPC: it sends the same body each time, and a call that failed is to it an answer like any
other. So the bytes that it received have to be held against those that the right answers have.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

MISSING = "h2load is not installed: it comes with Debian's nghttp2-client (apt-get install nghttp2-client)"

_REQUESTS = re.compile(r"^requests: .*\b(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout$", re.MULTILINE)
_DATA = re.compile(r"^traffic: .*\((\d+)\) data$", re.MULTILINE)
_SHOWN = 500


def is_installed() -> bool:
    """Whether there is an h2load."""
    return shutil.which("h2load") is not None


def command(
    url: str, *, headers: Sequence[str], body_file: Path, log_file: Path, counts: Mapping[str, int]
) -> list[str]:
    """What to run; `counts` are its options that are numbers."""
    options = [str(word) for option in counts.items() for word in option]
    for header in headers:
        options += ["-H", header]
    return ["h2load", *options, "-d", str(body_file), "--log-file", str(log_file), url]


def bytes_received(out: str, calls: int) -> int:
    """The bytes that h2load says it received, prefixes included; RuntimeError if not every call was answered."""
    requests, data = _REQUESTS.search(out), _DATA.search(out)
    if requests is None or data is None:
        raise RuntimeError(f"h2load said nothing that could be read: {out[-_SHOWN:]}")
    succeeded, *lost = map(int, requests.groups())
    if succeeded != calls or any(lost):
        raise RuntimeError(f"of {calls} calls {succeeded} were answered: {requests.group()}")
    return int(data.group(1))
