"""Whatever the provider does, a caller hears the right thing, the tries are counted, and both bills agree.

Every fault of the provider emulator meets a whole service with one upstream and with three: as a fault that never
ends, as one that strikes once, and those that are told by a 429 as many as come in a row.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cacheserver.app import Service
from cacheserver.generation import limits, tries
from cacheserver.model import AttemptOutcome
from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.provider import Fault, Provider
from tests.emulated import (
    NAMES,
    OK,
    ask_for,
    assert_bills_agree,
    bring_back,
    cost_of,
    emulator,
    is_absent,
    key_of,
    keys_called,
    ledger_of,
    serving,
    settings_of,
    told_of,
    upstream_tables,
)
from tests.running import Stub
from tests.waiting import until

LIMITED = (Fault.RATE_LIMITED, Fault.SLOW_DOWN)
NO_MONEY = (Fault.INSUFFICIENT_QUOTA, Fault.CREDIT_BALANCE_EXHAUSTED)
FAILED = (Fault.SERVER_ERROR, Fault.OVERLOADED)
"""The provider says that it made nothing."""
CUT_OFF = (Fault.RESET_BEFORE, Fault.HTML_ERROR, Fault.HANG, Fault.RESET_MID_BODY)
"""Sent, and nobody knows what became of it."""
REFUSED = (Fault.MODERATION_BLOCKED, Fault.MODERATION_BLOCKED_OUTPUT)
BAD_IMAGE = (Fault.TRUNCATED_BASE64, Fault.TRUNCATED_IMAGE, Fault.WRONG_TYPE, Fault.WRONG_SIZE, Fault.BLANK)

UNKNOWN = {*CUT_OFF, Fault.MODERATION_BLOCKED_OUTPUT}
"""The faults after which nobody knows what a call cost."""

PROMPT = "a red fox"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a fault that never ends comes to: the error, and the calls made with one upstream and with three."""

    code: str
    reason: str
    alone: int
    of_three: int

    def calls(self, upstreams: int) -> int:
        return self.alone if upstreams == 1 else self.of_three


EXPECTED: dict[Fault, Expected] = {
    # Three in a row and never a success is no limit but a missing right, at each of them.
    **dict.fromkeys(LIMITED, Expected("FAILED_PRECONDITION", "UPSTREAM_NOT_ENTITLED", 3, 9)),
    **dict.fromkeys(NO_MONEY, Expected("RESOURCE_EXHAUSTED", "UPSTREAM_QUOTA_EXHAUSTED", 1, 3)),
    Fault.NOT_ENTITLED: Expected("FAILED_PRECONDITION", "UPSTREAM_NOT_ENTITLED", 1, 3),
    **dict.fromkeys(FAILED, Expected("UNAVAILABLE", "UPSTREAM_DOWN", 3, 3)),
    **dict.fromkeys(CUT_OFF, Expected("UNAVAILABLE", "UPSTREAM_DOWN", 2, 2)),
    **dict.fromkeys(REFUSED, Expected("FAILED_PRECONDITION", "PROMPT_REFUSED", 1, 1)),
    **dict.fromkeys(BAD_IMAGE, Expected("UNAVAILABLE", "UPSTREAM_BAD_IMAGE", 3, 3)),
    Fault.URL_RESULTS: Expected("OK", "", 1, 1),
}

one_and_three = pytest.mark.parametrize("upstreams", [1, 3], ids=["one", "three"])


def each(faults: Sequence[Fault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=str)


@dataclass(frozen=True, slots=True)
class Stage:
    """A service, a caller of it, and the emulator behind it."""

    provider: Provider
    service: Service
    stub: Stub
    names: Sequence[str]

    async def hears(self, prompt: str = PROMPT) -> tuple[str, str]:
        told = await told_of(self.stub, ask_for(prompt))
        return told.code, told.reason

    async def outcomes(self) -> list[AttemptOutcome | None]:
        return [row.outcome for row in await ledger_of(self.service.grpc_address)]

    async def assert_bills_agree(self) -> None:
        assert_bills_agree(self.provider, await ledger_of(self.service.grpc_address))


@asynccontextmanager
async def staged(
    tmp_path: Path, upstreams: int, *, fault: Fault | None = None, **settings: Any
) -> AsyncIterator[Stage]:
    """So many upstreams, patient but with a provider that will hang."""
    names = NAMES[:upstreams]
    read_timeout_s = 1.0 if fault is Fault.HANG else 30.0
    async with Provider(emulator(names)) as provider:
        config = upstream_tables(dict.fromkeys(names, provider.base_url), read_timeout_s=read_timeout_s)
        async with serving(settings_of(tmp_path, **settings), config) as (service, stub):
            yield Stage(provider, service, stub, names)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a retry and a limit are waited for is the business of their own tests."""
    monkeypatch.setattr(tries, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(limits, "_LEAST_PAUSE_S", 0.02)


def test_every_fault_is_in_the_matrix() -> None:
    assert EXPECTED.keys() == set(Fault)


# ── a fault that never ends ─────────────────────────────────────────────────────────────────────────────────────


@one_and_three
@each(list(Fault))
async def test_a_fault_that_never_ends_is_told_after_the_tries_it_deserves_and_leaves_no_picture(
    tmp_path: Path, fault: Fault, upstreams: int
) -> None:
    expected = EXPECTED[fault]
    async with staged(tmp_path, upstreams, fault=fault, generation__refusal_ttl_s=0.001) as stage:
        stage.provider.set_fault_rate(None, fault, 1.0)
        assert await stage.hears() == (expected.code, expected.reason)
        assert stage.provider.arrivals == expected.calls(upstreams)
        await stage.assert_bills_agree()
        assert await is_absent(stage.stub, ask_for(PROMPT)) == (expected.code != "OK")

        stage.provider.set_fault_rate(None, fault, 0.0)
        await bring_back(stage.service.grpc_address, stage.names)
        response = await stage.stub.GetImage(ask_for(PROMPT))
        assert (response.images[0].width, response.images[0].height) == (1024, 1024)
        assert stage.provider.calls()[-1].fault == (fault if expected.code == "OK" else "")
        assert not await is_absent(stage.stub, ask_for(PROMPT))
        await stage.assert_bills_agree()


@each([Fault.HANG, Fault.HTML_ERROR, Fault.MODERATION_BLOCKED_OUTPUT])
async def test_what_nobody_knows_is_booked_high_enough_for_a_provider_that_bills_it(
    tmp_path: Path, fault: Fault
) -> None:
    async with staged(tmp_path, 1, fault=fault) as stage:
        stage.provider.set_fault_rate(None, fault, 1.0, billed=True)
        await stage.hears()
        assert stage.provider.summary().billed_calls == EXPECTED[fault].alone
        assert set(await stage.outcomes()) == {AttemptOutcome.UNKNOWN}
        await stage.assert_bills_agree()


# ── a fault that strikes once ───────────────────────────────────────────────────────────────────────────────────


@one_and_three
@each([*LIMITED, *FAILED, *CUT_OFF, *BAD_IMAGE])
async def test_a_fault_that_strikes_once_is_never_heard_of_and_another_upstream_is_tried_first(
    tmp_path: Path, fault: Fault, upstreams: int
) -> None:
    async with staged(tmp_path, upstreams, fault=fault) as stage:
        stage.provider.fail_next(None, fault)
        assert await stage.hears() == ("OK", "")
        failed, good = keys_called(stage.provider.calls())
        assert (failed == good) == (upstreams == 1)
        first = AttemptOutcome.UNKNOWN if fault in UNKNOWN else AttemptOutcome.SETTLED
        first = AttemptOutcome.NOT_BILLED if fault in {*LIMITED, *FAILED} else first
        assert Counter(await stage.outcomes()) == Counter([first, AttemptOutcome.SETTLED])
        await stage.assert_bills_agree()


@each([*NO_MONEY, Fault.NOT_ENTITLED])
async def test_an_upstream_without_money_or_right_is_left_at_once_and_for_good(tmp_path: Path, fault: Fault) -> None:
    async with staged(tmp_path, 3) as stage:
        stage.provider.fail_next(None, fault)
        assert await stage.hears() == ("OK", "")
        out = keys_called(stage.provider.calls())[0]
        assert [await stage.hears(f"{PROMPT} {i}") for i in range(6)] == [("OK", "")] * 6
        called = keys_called(stage.provider.calls())
        assert len(called) == 8
        assert called.count(out) == 1
        await stage.assert_bills_agree()


@one_and_three
@each(REFUSED)
async def test_a_refused_prompt_is_asked_nowhere_else(tmp_path: Path, fault: Fault, upstreams: int) -> None:
    async with staged(tmp_path, upstreams) as stage:
        stage.provider.fail_next(None, fault)
        assert await stage.hears() == ("FAILED_PRECONDITION", "PROMPT_REFUSED")
        assert stage.provider.arrivals == 1
        assert stage.provider.bill_microusd == 0
        await stage.assert_bills_agree()


async def test_a_prompt_refused_unseen_is_not_asked_again_for_a_while(tmp_path: Path) -> None:
    async with staged(tmp_path, 3) as stage:
        stage.provider.fail_next(None, Fault.MODERATION_BLOCKED)
        await stage.hears()
        told = await told_of(stage.stub, ask_for(PROMPT))
        assert (told.code, told.reason) == ("FAILED_PRECONDITION", "PROMPT_REFUSED")
        assert told.facts["cached"] == "true"
        assert await stage.hears("a blue whale") == ("OK", "")
        assert stage.provider.arrivals == 2


async def test_a_picture_refused_after_it_was_seen_is_asked_for_again(tmp_path: Path) -> None:
    async with staged(tmp_path, 1) as stage:
        stage.provider.fail_next(None, Fault.MODERATION_BLOCKED_OUTPUT)
        await stage.hears()
        assert await stage.hears() == ("OK", "")
        assert stage.provider.arrivals == 2


# ── 429s in a row ───────────────────────────────────────────────────────────────────────────────────────────────


@one_and_three
@each(LIMITED)
async def test_upstreams_that_have_made_pictures_are_waited_for_through_any_number_of_429s(
    tmp_path: Path, fault: Fault, upstreams: int
) -> None:
    async with staged(tmp_path, upstreams) as stage:
        assert [await stage.hears(f"{PROMPT} {i}") for i in range(upstreams)] == [("OK", "")] * upstreams
        assert set(keys_called(stage.provider.calls())) == {key_of(name) for name in stage.names}
        stage.provider.fail_next(None, fault, 3)
        assert await stage.hears() == ("OK", "")
        assert stage.provider.arrivals == upstreams + 4
        assert stage.provider.summary().limited == 3
        await stage.assert_bills_agree()


@each(LIMITED)
async def test_an_upstream_that_makes_a_picture_after_two_429s_is_no_upstream_without_the_right(
    tmp_path: Path, fault: Fault
) -> None:
    async with staged(tmp_path, 1) as stage:
        stage.provider.fail_next(None, fault, 2)
        assert [await stage.hears(), await stage.hears("a blue whale")] == [("OK", "")] * 2
        assert stage.provider.arrivals == 4


@each(LIMITED)
async def test_of_three_upstreams_the_one_that_only_ever_answers_429_is_left_after_three(
    tmp_path: Path, fault: Fault
) -> None:
    async with staged(tmp_path, 3) as stage:
        never, *others = map(key_of, stage.names)
        stage.provider.set_fault_rate(never, fault, 1.0)
        numbers = itertools.count()

        async def is_left() -> bool:
            assert await stage.hears(f"{PROMPT} {next(numbers)}") == ("OK", "")
            return stage.provider.summary().limited == 3

        await until(is_left)
        assert [await stage.hears(f"{PROMPT} {next(numbers)}") for _ in range(6)] == [("OK", "")] * 6
        called = keys_called(stage.provider.calls())
        assert called.count(never) == 3
        assert set(called) == {never, *others}
        await stage.assert_bills_agree()


# ── what the rows say ───────────────────────────────────────────────────────────────────────────────────────────


@one_and_three
async def test_where_no_call_is_unknown_the_ledger_is_the_bill_to_the_micro_dollar(
    tmp_path: Path, upstreams: int
) -> None:
    async with staged(tmp_path, upstreams) as stage:
        for i, fault in enumerate(BAD_IMAGE):
            stage.provider.fail_next(None, fault)
            request = ask_for(f"{PROMPT} {i}", quality=("low", "medium", "high")[i % 3], n=1 + i % 2)
            assert await told_of(stage.stub, request) == OK
        rows = await ledger_of(stage.service.grpc_address)
        assert {row.outcome for row in rows} == {AttemptOutcome.SETTLED}
        assert len(rows) == 2 * len(BAD_IMAGE)
        assert cost_of(rows, AttemptOutcome.SETTLED) == stage.provider.bill_microusd > 0


async def test_a_call_for_several_pictures_that_fails_bills_and_stores_none_of_them_twice(tmp_path: Path) -> None:
    async with staged(tmp_path, 3) as stage:
        stage.provider.fail_next(None, Fault.SERVER_ERROR)
        response = await stage.stub.GetImage(ask_for(PROMPT, n=3))
        assert len({image.data for image in response.images}) == 3
        assert [image.variant for image in response.images] == [0, 1, 2]
        assert stage.provider.summary().billed_calls == 1
        assert response.status.tier == pb.TIER_UPSTREAM
        await stage.assert_bills_agree()
