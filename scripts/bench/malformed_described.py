"""Requests made from the OpenAPI description by schemathesis, each with something in it that the description forbids.

Needs the extra `fuzz`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, cast

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from scripts.bench.malformed_cases import EDITS, GENERATIONS
from scripts.bench.malformed_sent import Reply, Seen, judge

_TIMEOUT_S = 30.0

OPERATIONS = (GENERATIONS, EDITS, "/images/{key}")
"""The paths of what can be asked wrongly: all others take nothing but a path and a token."""


def send_described(port: int, *, token: str, per_operation: int, first_seed: int, seen: Seen) -> None:
    """Send so many requests to each operation of the description that can be asked wrongly. Blocks."""
    description = json.loads(resources.files("cacheserver.http").joinpath("openapi.json").read_text())
    schema = schemathesis.openapi.from_dict(description)
    with requests.Session() as session:
        for operation in schema.get_all_operations():
            _send_to(operation.ok(), session, port=port, token=token, count=per_operation, number=first_seed, seen=seen)


def _send_to(  # noqa: PLR0913 - what `send_described` was given
    operation: Any, session: requests.Session, *, port: int, token: str, count: int, number: int, seen: Seen
) -> None:
    if operation.path not in OPERATIONS:
        return

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def send(case: Any) -> None:
        headers = {"connection": "close"} if "Authorization" in (case.headers or {}) else {"authorization": token}
        try:
            answer = case.call(
                base_url=f"http://127.0.0.1:{port}", session=session, headers=headers, timeout=_TIMEOUT_S
            )
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            return  # this client sends no such thing
        except requests.exceptions.RequestException as error:
            seen.add(f"described: {operation.label}", type(error).__name__, _of(error))
            return
        reply = Reply(answer.status_code, _head(answer.headers), answer.content)
        seen.add(f"described: {operation.label}", str(reply.status), judge(reply, is_framed=False, is_cut=False))

    cast("Any", send)()


def _of(error: requests.exceptions.RequestException) -> str | None:
    """A connection that was closed early may be the answer to what is no HTTP; one that hangs is none to anything."""
    return str(error) if isinstance(error, requests.exceptions.Timeout) else None


def _head(headers: Mapping[str, Any]) -> bytes:
    lines = [f"{name}: {' '.join(value) if isinstance(value, list) else value}" for name, value in headers.items()]
    return "\r\n".join(["HTTP/1.1", *lines]).encode("latin-1")
