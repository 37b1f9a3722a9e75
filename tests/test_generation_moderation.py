"""The moderation client against a server that speaks the API, well and badly."""

from __future__ import annotations

import asyncio
import gzip
import json
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import structlog

from cacheserver.errors import ConfigError, PromptDeniedError, ShuttingDownError, UpstreamDownError
from cacheserver.generation.moderation import ModerationEndpoint, OpenAIModeration
from cacheserver.precheck import PromptPolicy
from tests.fakes import FakeClock
from tests.provider import API_KEY, HttpRequest, OpenAIStandIn, Reply, error_reply

GOOD = "a zebra in the rain"
BAD = "a dreadful zebra"

Make = Callable[..., OpenAIModeration]


class ModerationStandIn(OpenAIStandIn):
    """Moderates: flags what has "dreadful" in it, under `categories`."""

    categories: dict[str, Any] = {"violence": True, "hate/threatening": True, "sexual": False}  # noqa: RUF012 - replaced whole

    async def _reply(self, request: HttpRequest) -> Reply | None:
        if (request.method, request.path) != ("POST", "/v1/moderations"):
            return await super()._reply(request)
        self.requests.append(request)
        self.calls += 1
        async with self._arrival:
            self._arrival.notify_all()
        await self._open.wait()
        if self._next:
            return self._next.popleft()(request)
        if unauthorized := self._unauthorized(request):
            return unauthorized
        flagged = "dreadful" in request.json()["input"]
        return judgement(flagged, self.categories if flagged else {})


def judgement(flagged: Any, categories: Any = None) -> Reply:
    result = {"flagged": flagged, "categories": categories, "category_scores": {"violence": 0.5}}
    return Reply(body=json.dumps({"id": "modr-1", "model": "m", "results": [result]}).encode())


@pytest.fixture
async def server() -> AsyncIterator[ModerationStandIn]:
    async with ModerationStandIn() as server:
        yield server


@pytest.fixture
async def make(server: ModerationStandIn, clock: FakeClock) -> AsyncIterator[Make]:
    made: list[OpenAIModeration] = []

    def moderation(**fields: Any) -> OpenAIModeration:
        known: dict[str, Any] = {"name": "main", "base_url": server.base_url, "api_key": lambda: API_KEY}
        made.append(OpenAIModeration(ModerationEndpoint(**(known | fields)), clock=clock))
        return made[-1]

    yield moderation
    for moderation_made in made:
        await moderation_made.aclose()


async def test_a_prompt_that_is_not_flagged_passes(make: Make, server: ModerationStandIn) -> None:
    moderation = make(model="omni")
    assert not moderation.passed(GOOD)
    await moderation.check(GOOD)
    assert moderation.passed(GOOD)
    [request] = server.requests
    assert request.json() == {"model": "omni", "input": GOOD}
    assert request.headers["authorization"] == f"Bearer {API_KEY}"
    assert request.headers["accept-encoding"] == "identity"


async def test_a_flagged_prompt_is_refused_by_its_categories(make: Make) -> None:
    moderation = make()
    with pytest.raises(PromptDeniedError, match=r"moderation main refuses this prompt \(hate/threatening, violence\)"):
        await moderation.check(BAD)
    with pytest.raises(PromptDeniedError):
        moderation.passed(BAD)


async def test_categories_are_taken_only_if_they_are_names(make: Make, server: ModerationStandIn) -> None:
    server.categories = {"v": True, BAD: True, "x" * 41: True, "UPPER": True, "hate": "yes", "sexual": 1, "": True}
    with pytest.raises(PromptDeniedError) as caught:
        await make().check(BAD)
    assert str(caught.value) == "The moderation main refuses this prompt (v). Change the prompt."
    server.categories = {f"c{letter}": True for letter in "abcdefghijkl"}
    with pytest.raises(PromptDeniedError, match=r"\(ca, cb, cc, cd, ce, cf, cg, ch\)"):
        await make().check(BAD)


async def test_a_flag_without_categories_is_a_flag(make: Make, server: ModerationStandIn) -> None:
    server.answer_next(judgement(flagged=True, categories=["violence"]))
    with pytest.raises(PromptDeniedError, match=r"refuses this prompt\. Change"):
        await make().check(GOOD)


async def test_an_answer_stands_for_a_while(make: Make, server: ModerationStandIn, clock: FakeClock) -> None:
    moderation = make(remember_s=600.0)
    for _ in range(2):
        await moderation.check(GOOD)
        with pytest.raises(PromptDeniedError):
            await moderation.check(BAD)
    assert server.calls == 2
    clock.advance(601)
    assert not moderation.passed(GOOD)
    await moderation.check(GOOD)
    assert server.calls == 3


async def test_checks_of_one_prompt_at_once_make_one_call(make: Make, server: ModerationStandIn) -> None:
    moderation = make()
    server.hold()
    checks = [asyncio.create_task(moderation.check(BAD)) for _ in range(20)]
    other = asyncio.create_task(moderation.check(GOOD))
    await server.arrived(2)
    server.release()
    outcomes = await asyncio.gather(*checks, return_exceptions=True)
    await other
    assert all(isinstance(outcome, PromptDeniedError) for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 20  # one error raised in many tasks mixes their traces
    assert server.calls == 2


async def test_a_caller_that_hangs_up_does_not_take_the_call_from_the_others(
    make: Make, server: ModerationStandIn
) -> None:
    moderation = make()
    server.hold()
    first = asyncio.create_task(moderation.check(GOOD))
    await server.arrived(1)
    second = asyncio.create_task(moderation.check(GOOD))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    server.release()
    await second
    assert server.calls == 1


async def test_closing_ends_the_wait_of_those_who_check(make: Make, server: ModerationStandIn) -> None:
    moderation = make()
    server.hold()
    check = asyncio.create_task(moderation.check(GOOD))
    await server.arrived(1)
    await moderation.aclose()
    with pytest.raises(ShuttingDownError):
        await check


FAULTS: dict[str, Callable[[ModerationStandIn], None]] = {
    "500": lambda server: server.fail_next(500),
    "429": lambda server: server.fail_next(429, "rate_limit_exceeded"),
    "401": lambda server: server.fail_next(401, "invalid_api_key"),
    "a redirect": lambda server: server.answer_next(Reply(302, headers={"location": "http://127.0.0.1:1/"})),
    "no JSON": lambda server: server.answer_next(Reply(body=b"<html>")),
    "deep JSON": lambda server: server.answer_next(Reply(body=b"[" * 50_000)),
    "a list": lambda server: server.answer_next(Reply(body=b"[]")),
    "no results": lambda server: server.answer_next(Reply(body=b'{"results": []}')),
    "odd results": lambda server: server.answer_next(Reply(body=b'{"results": [1]}')),
    "a flag that is none": lambda server: server.answer_next(judgement(flagged="false")),
    "a large answer": lambda server: server.answer_next(Reply(body=b'{"results": [' + b" " * 65_536)),
    "a large answer of unknown length": lambda server: server.answer_next(
        Reply(body=b" " * 200_000, headers={"content-length": ""})
    ),
    "a compressed answer": lambda server: server.answer_next(
        Reply(body=gzip.compress(judgement(flagged=False).body), headers={"content-encoding": "gzip"})
    ),
    "a reset": lambda server: server.answer_next(Reply(body=b"{" * 99, cut_after=10)),
    "silence": lambda server: server.hang_next(),
    "silence half way": lambda server: server.answer_next(Reply(body=b"{" * 99, hang_after=10)),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_without_an_answer_nothing_passes_unless_it_may(
    make: Make, server: ModerationStandIn, clock: FakeClock, fault: str
) -> None:
    timeout_s = 0.5 if fault.startswith("silence") else 5.0
    strict, lenient = make(timeout_s=timeout_s), make(timeout_s=timeout_s, when_down="allow")
    FAULTS[fault](server)
    with structlog.testing.capture_logs() as events, pytest.raises(UpstreamDownError) as caught:
        await strict.check(GOOD)
    assert "zebra" not in "".join(traceback.format_exception(caught.value)) + repr(events)
    assert [event["event"] for event in events] == ["moderation_failed"]
    assert not strict.passed(GOOD)

    FAULTS[fault](server)
    await lenient.check(GOOD)

    for moderation in (strict, lenient):  # what was let pass was not judged
        clock.advance(6)
        assert not moderation.passed(GOOD)
        await moderation.check(GOOD)
        assert moderation.passed(GOOD)


async def test_an_endpoint_that_cannot_be_reached_is_down(make: Make, server: ModerationStandIn) -> None:
    moderation = make(base_url="http://127.0.0.1:1/v1")
    with pytest.raises(UpstreamDownError, match="ConnectError"):
        await moderation.check(GOOD)
    assert server.calls == 0


async def test_an_endpoint_that_failed_is_left_alone_for_a_moment(
    make: Make, server: ModerationStandIn, clock: FakeClock
) -> None:
    strict, lenient = make(), make(when_down="allow")
    for moderation in (strict, lenient):
        await moderation.check(GOOD)
    server.fail_next(503, times=2)
    with pytest.raises(UpstreamDownError):
        await strict.check("one")
    await lenient.check("one")
    assert server.calls == 4

    with pytest.raises(UpstreamDownError, match="a moment ago"):
        await strict.check(BAD)
    await lenient.check(BAD)
    assert lenient.passed(BAD)
    assert strict.passed(GOOD)  # what was judged stays judged
    assert server.calls == 4

    clock.advance(5)
    for moderation in (strict, lenient):
        with pytest.raises(PromptDeniedError):
            await moderation.check(BAD)


async def test_a_prompt_the_endpoint_does_not_take_opens_the_door_for_no_other(
    make: Make, server: ModerationStandIn
) -> None:
    lenient = make(when_down="allow")
    server.answer_next(error_reply(400, "invalid_value"))
    await lenient.check(GOOD)
    assert not lenient.passed(BAD)
    with pytest.raises(PromptDeniedError):
        await lenient.check(BAD)


@pytest.mark.parametrize("key", ["", "  "])
async def test_an_empty_key_sends_none(make: Make, server: ModerationStandIn, key: str) -> None:
    server.answer_next(judgement(flagged=False))
    await make(api_key=lambda: key).check(GOOD)
    assert "authorization" not in server.requests[0].headers


async def test_a_key_that_no_header_may_carry_is_not_sent_and_not_shown(make: Make, server: ModerationStandIn) -> None:
    with pytest.raises(UpstreamDownError, match="no header may carry") as caught:
        await make(api_key=lambda: "sk-se\ncret").check(GOOD)
    assert "cret" not in str(caught.value)
    assert server.calls == 0


async def test_the_key_is_asked_for_before_each_call(make: Make, server: ModerationStandIn) -> None:
    keys = iter([API_KEY, "sk-other"])
    moderation = make(api_key=lambda: next(keys))
    await moderation.check(GOOD)
    with pytest.raises(UpstreamDownError, match="answered 401"):
        await moderation.check(BAD)
    assert server.calls == 2


@pytest.mark.parametrize(
    "base_url", ["", "api.example.com", "ftp://host", "http://", "http://u:p@host", "http://h?x=1"]
)
async def test_a_base_url_that_is_none_is_refused(make: Make, base_url: str) -> None:
    with pytest.raises(ConfigError, match="moderation main: base_url"):
        make(base_url=base_url)


async def test_a_policy_asks_it_with_what_is_redacted_and_only_when_it_has_to(
    make: Make, server: ModerationStandIn
) -> None:
    policy = PromptPolicy(name="demo", pii="redact", moderation=make())
    assert policy.screened("mail a@b.co") is None
    assert await policy.screen("mail a@b.co") == "mail [email]"
    assert policy.screened("mail c@d.co") == "mail [email]"
    assert [request.json()["input"] for request in server.requests] == ["mail [email]"]
    with pytest.raises(PromptDeniedError):
        await policy.screen(BAD)
    with pytest.raises(PromptDeniedError):
        policy.screened(BAD)
