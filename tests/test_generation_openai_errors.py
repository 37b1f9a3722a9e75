"""What an answer other than 200 says about money: nothing is owed only where the status itself says so."""

from __future__ import annotations

import base64
import json

import pytest

from cacheserver.errors import PromptRefusedError, UpstreamDownError, UpstreamError, UpstreamLimitedError
from cacheserver.generation.providers.openai_errors import error_of
from tests.provider import error_reply, small_image

OPENAI = error_reply(500, "server_error", kind="server_error").body
VLLM = b'{"object": "error", "message": "It broke.", "type": "InternalServerError", "param": null, "code": 500}'
FASTAPI = b'{"detail": "It broke."}'
GATEWAY = json.dumps(
    {
        "type": "https://gateway.example/errors/524",
        "title": "Error 524: A timeout occurred",
        "status": 524,
        "detail": "The origin did not answer in time.",
        "instance": "9d99a4434f2d168",
        "error_code": 524,
        "retryable": True,
    }
).encode()
"""As RFC 9457 has it: what fronts answer for themselves when JSON is accepted."""

WORDS = b'{"error": "It broke."}'
PAGE = b"<html>It broke.</html>"
PICTURE = json.dumps({"created": 1, "data": [{"b64_json": base64.b64encode(small_image(1)).decode()}]}).encode()
BODIES = {
    "openai": OPENAI,
    "vllm": VLLM,
    "fastapi": FASTAPI,
    "gateway": GATEWAY,
    "words": WORDS,
    "page": PAGE,
    "picture": PICTURE,
    "nothing": b"",
}
ANY = frozenset(BODIES)
STATUSES = [*range(201, 600)]


def free_bodies(status: int) -> frozenset[str]:
    """The bodies with which an answer of this status is certain to be free."""
    if status in {408, 499}:
        return frozenset()
    if 300 <= status < 500:
        return ANY
    return frozenset({"openai", "vllm"}) if status in {500, 503} else frozenset()


def error(status: int, body: bytes) -> UpstreamError:
    return error_of("main", status, {}, body, now_s=1_800_000_000.0)


@pytest.mark.parametrize("body", BODIES)
def test_only_a_status_that_says_so_makes_a_call_free(body: str) -> None:
    free = [status for status in STATUSES if error(status, BODIES[body]).cost_microusd == 0]
    assert free == [status for status in STATUSES if body in free_bodies(status)]
    unknown = [status for status in STATUSES if error(status, BODIES[body]).cost_microusd is None]
    assert sorted(free + unknown) == STATUSES


@pytest.mark.parametrize("status", [201, 202, 206, 408, 499, 500, 502, 504, *range(520, 531)])
@pytest.mark.parametrize("body", [GATEWAY, PICTURE], ids=["gateway", "picture"])
def test_what_nobody_knows_the_outcome_of_is_a_failure_of_unknown_cost(status: int, body: bytes) -> None:
    assert type(error(status, body)) is UpstreamDownError
    assert error(status, body).cost_microusd is None


@pytest.mark.parametrize("status", [502, 504, 524])
@pytest.mark.parametrize(
    ("code", "expected"), [("rate_limit_exceeded", UpstreamLimitedError), ("moderation_blocked", PromptRefusedError)]
)
def test_a_relay_that_passes_the_providers_code_on_is_believed_whatever_its_status(
    status: int, code: str, expected: type[UpstreamError]
) -> None:
    told = error(status, error_reply(status, code).body)
    assert type(told) is expected
    assert told.cost_microusd == 0
