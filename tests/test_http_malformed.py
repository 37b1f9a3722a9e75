"""Whatever comes to the HTTP port is answered, in words of ours, and the service serves on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from scripts.bench.malformed_cases import Target, all_cases
from scripts.bench.malformed_http import target
from scripts.bench.malformed_sent import Reply, Seen, judge, send_all
from tests.provider import OpenAIStandIn
from tests.running import environment, running

TOKEN = "a-token-of-a-caller"
TOKEN_SHA256 = "c703bf3cdefe6a7f93c1cff3c0be31a192304f5f9b7b584a1ef146b9aa70bd60"
SLICE = 3
MOST_BYTES = 200_000
DESCRIPTION: dict[str, Any] = json.loads(resources.files("cacheserver.http").joinpath("openapi.json").read_text())


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    """That of a service with callers, whose upstream is real in all but the network."""
    async with OpenAIStandIn() as provider:
        env = environment(tmp_path, provider=provider, tiers="memory, disk")
        async with running(env, f'[[callers]]\nname = "bench"\ntoken_sha256 = "{TOKEN_SHA256}"\n') as service:
            yield int(service.http_address.rpartition(":")[2])


async def test_malformed_requests_are_answered_and_the_service_serves_on(port: int) -> None:
    there, picture = await target(port, TOKEN)
    seen = Seen()
    cases = [case for case in all_cases(there) if len(case.data) <= MOST_BYTES]
    await send_all(cases[::SLICE], port, seen)
    assert seen.faults == []
    assert seen.statuses["400"] > 100
    assert await target(port, TOKEN) == (there, picture)


def test_a_fault_is_seen() -> None:
    told = {"message": "m", "type": "server_error", "param": None, "code": None}
    internal = Reply(500, b"HTTP/1.1 500 X\r\nx-request-id: a", json.dumps({"error": told}).encode())
    assert judge(internal, is_framed=True, is_cut=False) == "500 server_error None: m"
    bare = Reply(400, b"HTTP/1.1 400 X", b"Bad Request")
    assert judge(bare, is_framed=True, is_cut=False) == "400 in no shape of ours"
    assert judge(bare, is_framed=False, is_cut=False) is None
    assert judge(None, is_framed=True, is_cut=False) is not None
    split = Reply(200, b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b", b"")
    assert judge(split, is_framed=True, is_cut=False) == "200 with a header that the request brought in"
    busy = told | {"type": "service_unavailable_error", "code": "server_is_overloaded"}
    refused = Reply(503, internal.head, json.dumps({"error": busy}).encode())
    assert judge(refused, is_framed=True, is_cut=False) is None


def test_there_are_hundreds_of_cases_of_many_kinds() -> None:
    cases = all_cases(Target(TOKEN, "v1.default.x"))
    assert len(cases) > 700
    assert len({case.kind for case in cases}) > 180


@pytest.mark.parametrize("name", DESCRIPTION["components"]["schemas"])
def test_the_description_is_made_of_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(DESCRIPTION["components"]["schemas"][name])


def test_what_the_description_refers_to_is_there() -> None:
    def references(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + [found for each in value.values() for found in references(each)]
        return [found for each in value for found in references(each)] if isinstance(value, list) else []

    for reference in references(DESCRIPTION):
        there: Any = DESCRIPTION
        for step in reference.removeprefix("#/").split("/"):
            there = there[step]


async def test_every_path_of_the_description_is_served(port: int) -> None:
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {TOKEN}"}
    ) as http:
        for path, operations in DESCRIPTION["paths"].items():
            for method in operations:
                answer = await http.request(method, path.replace("{key}", "k").replace("{model}", "m"))
                is_error = answer.status_code >= 400 and method != "head"
                assert not is_error or answer.json()["error"]["code"] != "unknown_url", f"{method} {path}"
                assert str(answer.status_code) in operations[method]["responses"], f"{method} {path}"
