"""One call in progress, and what its caller says of it beside what it asks for."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from cacheserver.calls.again import HitAgain, Seen
from cacheserver.model import Caller, Identity, Pending, Served

NOBODY = Caller("", frozenset())
"""Who makes a call until it is known who does."""

BY_URL = Caller("url", frozenset())
"""Who fetches a picture by a URL that is all the right it needs. Nobody asks later what became of such a call."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_OURS = secrets.token_hex(8)
_NUMBERS = count(10**15)
"""What our ids are made of: of this process, and which in it. They tell calls apart and open nothing."""

_FALLBACKS = re.compile(r"[1-9][0-9]{0,5}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


@dataclass(slots=True)
class Call:
    """One call in progress. Fronts read who asks and until when, and fill in what lies below `caller`.

    `rpc` is what is called: the name of an rpc, or method and route. `deadline_s` is how long the caller waits in all,
    None where it does not say; `started_s` is monotonic.
    `model` and `quality` are those asked for, empty for a call that asks by key.
    `wanted` is the identity of the picture it asks for, `answer` what it was answered with, `again` where that
    was told before; `seen` where memory lacks it and all else of the call is known. `items` counts those of a stream.
    """

    rpc: str
    metadata: Mapping[str, str]
    request_id: str
    deadline_s: float | None
    started_s: float
    caller: Caller = NOBODY
    namespace: str = ""
    model: str = ""
    quality: str = ""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    wanted: Identity | None = None
    answer: Sequence[Served] | Pending | None = None
    again: HitAgain | None = None
    seen: Seen | None = None
    items: int = 0

    @property
    def ids(self) -> dict[str, str]:
        """What tells this call's log lines from others': its request id, and its trace's if it has one."""
        stated = self.metadata.get("traceparent")
        match = None if stated is None else _TRACEPARENT.fullmatch(stated)
        return {"request_id": self.request_id} | ({"trace_id": match[1]} if match else {})

    @property
    def fallbacks(self) -> int:
        """How many pictures the caller says it had made without us; 0 if it says nothing fit to be counted."""
        stated = self.metadata.get("x-fallbacks")
        return int(stated) if stated is not None and _FALLBACKS.fullmatch(stated) else 0


def request_id_of(metadata: Mapping[str, str]) -> str:
    """The caller's id of the call if it is fit for a log line, else one of ours."""
    stated = metadata.get("x-request-id")
    return stated if stated is not None and is_fit_id(stated) else f"{_OURS}{next(_NUMBERS)}"


def is_fit_id(text: str) -> bool:
    """Whether this may stand in a log line as an id."""
    return _REQUEST_ID.fullmatch(text) is not None
