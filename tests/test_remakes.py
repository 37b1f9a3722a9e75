"""The loop that makes good what was answered with less."""

from __future__ import annotations

import structlog

from cacheserver.identity import identify
from cacheserver.model import Ask, Caller, ImageRequest, Namespace, Permission, Terms
from cacheserver.remakes import Remakes
from tests.fakes import FakeClock
from tests.waiting import until

NAMESPACE = Namespace("default", "default")


def ask(prompt: str) -> Ask:
    request = ImageRequest(prompt=prompt, model="gpt-image-2")
    return Ask(request, identify(request, NAMESPACE), NAMESPACE, Caller("tester", frozenset(Permission)), Terms())


async def test_a_bug_in_one_remake_is_said_and_the_others_are_made_later(clock: FakeClock) -> None:
    made: list[str] = []

    async def make(ask: Ask) -> None:
        if ask.request.prompt == "a bug":
            raise ZeroDivisionError
        made.append(ask.request.prompt)

    remakes = Remakes(make=make, clock=clock)
    for prompt in ("a red fox", "a bug", "a blue fox"):
        remakes.add(ask(prompt))
    with structlog.testing.capture_logs() as events:
        remakes.start((0, 24))
        await until(lambda: clock.sleepers == 1)
        assert made == ["a red fox"]
        clock.advance(60.0)
        await until(lambda: len(remakes) == 0 and clock.sleepers == 1)
    assert made == ["a red fox", "a blue fox"]
    assert [event["event"] for event in events] == ["round_failed"]
    await remakes.aclose()
