"""What a budget allows is paid and not a picture more: by replicas that race for it, and when one of them dies.

Every picture here costs what it may cost at most, so that the emulator's bill tells exactly how many were paid for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import grpc
import pytest

from cacheserver.app import miss_path, tiers
from cacheserver.client import AsyncClient, Budget
from cacheserver.control.replicas import Replicas
from cacheserver.model import AttemptOutcome
from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.provider import Price, Provider
from tests.emulated import (
    ask_for,
    cost_of,
    emulator,
    in_its_own_process,
    ledger_of,
    serving,
    settings_of,
    told_in,
    upstream_tables,
)
from tests.running import Stub
from tests.servers import ValkeyServer
from tests.waiting import until

pytestmark = pytest.mark.no_cover

FULL_MICROUSD = 52_700
"""A picture of medium quality of a prompt as `prompts` has them: 1,756 tokens at $30 a million, and 4 at $5."""
CHEAP_MODEL = "gpt-image-1-mini"
CHEAP_MICROUSD = 1_576
"""One of low quality of the cheap model: 196 tokens at $8 a million, and 4 at $2."""

MONTH = "global/month"
DEAD_AFTER_S = 3.0
_PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _redis_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a machine has little time for so many services, a late answer is no lost Redis."""
    for module in (miss_path, tiers):
        monkeypatch.setattr(module, "CONTROL_TIMEOUT_S", _PATIENCE_S)


def set_default(monkeypatch: pytest.MonkeyPatch, part: type, keyword: str, value: float) -> None:
    """Let every `part` that is built be built with this, where its builder says nothing else."""
    monkeypatch.setitem(part.__init__.__kwdefaults__, keyword, value)  # type: ignore[misc] # of a class, not an instance


def prompts(count: int, what: str = "picture") -> list[str]:
    """Distinct prompts, which all have as many tokens."""
    return [f"{what[:7]:7} {number:06}" for number in range(count)]


def full(prompt: str, **fields: object) -> pb.GetImageRequest:
    return ask_for(prompt, quality="medium", size="auto", **fields)


def one_upstream(provider: Provider, *, limits: str = "concurrent = 1_000") -> str:
    urls = {"first": provider.base_url}
    return upstream_tables(urls, limits=limits, max_cost_microusd=FULL_MICROUSD, read_timeout_s=600)


def shared(data_dir: Path, valkey: ValkeyServer, prefix: str, **settings: object) -> dict[str, str]:
    """A replica of those that share `prefix` in Redis, with a directory of its own."""
    data_dir.mkdir(exist_ok=True)
    redis = {"redis__url": valkey.url, "redis__prefix": f"{prefix}:", "redis__timeout_s": _PATIENCE_S}
    return settings_of(data_dir, tiers="memory, redis, disk", **redis, **settings)


async def outcomes_of(
    calls: Sequence[asyncio.Future[pb.GetImageResponse]],
) -> list[pb.GetImageResponse | grpc.aio.AioRpcError]:
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, pb.GetImageResponse | grpc.aio.AioRpcError) for outcome in outcomes)
    return outcomes  # type: ignore[return-value] # as just asserted


async def budget_of(address: str) -> Budget:
    async with AsyncClient(address) as client:
        (budget,) = await client.admin.list_budgets()
        return budget


# ── two replicas at once ────────────────────────────────────────────────────────────────────────────────────────


async def test_of_500_prompts_at_two_replicas_the_100_that_a_budget_allows_are_paid_and_the_others_refused(
    tmp_path: Path, valkey_server: ValkeyServer
) -> None:
    async with Provider(emulator(["first"])) as provider:
        settings = {"budget__per_month_microusd": 100 * FULL_MICROUSD}
        envs = [shared(tmp_path / name, valkey_server, tmp_path.name, **settings) for name in ("a", "b")]
        config = one_upstream(provider)
        async with serving(envs[0], config) as (first, one), serving(envs[1], config) as (second, other):
            calls = [(one, other)[i % 2].GetImage(full(prompt)) for i, prompt in enumerate(prompts(500))]
            outcomes = await outcomes_of(calls)
            good = [outcome for outcome in outcomes if isinstance(outcome, pb.GetImageResponse)]
            refused = Counter(told_in(each)[:3] for each in outcomes if isinstance(each, grpc.aio.AioRpcError))
            resets = {told_in(each).facts["reset_time"] for each in outcomes if isinstance(each, grpc.aio.AioRpcError)}
            rows = [*await ledger_of(first.grpc_address), *await ledger_of(second.grpc_address)]
            budget = await budget_of(first.grpc_address)

        assert len(good) == 100
        assert refused == {("RESOURCE_EXHAUSTED", "BUDGET_EXHAUSTED", MONTH): 400}
        assert budget.reset_time is not None
        assert {datetime.fromisoformat(each) for each in resets} == {budget.reset_time}
        assert provider.bill_microusd == 100 * FULL_MICROUSD == budget.limit_microusd
        assert cost_of(rows, AttemptOutcome.SETTLED) == provider.bill_microusd
        assert (budget.spent_microusd, budget.reserved_microusd) == (provider.bill_microusd, 0)


async def test_of_100_who_accept_less_those_beyond_the_share_of_the_budget_get_the_rung_that_can_be_paid(
    tmp_path: Path, valkey_server: ValkeyServer
) -> None:
    cheap = Price(text_input_usd_per_million_tokens=2, image_output_usd_per_million_tokens=8)
    limit = 20 * FULL_MICROUSD + 80 * CHEAP_MICROUSD
    async with Provider(emulator(["first", "second"], models={"gpt-image-2": Price(), CHEAP_MODEL: cheap})) as provider:
        settings = {
            "budget__per_month_microusd": limit,
            # The full quality may use enough for twenty pictures, and less than twenty-one would take.
            "budget__degrade_at": (20.5 * FULL_MICROUSD) / limit,
            "generation__ladder": f'["{CHEAP_MODEL}:low"]',
            "default_model": "gpt-image-2",
        }
        urls = {"second": provider.base_url}
        config = one_upstream(provider) + upstream_tables(
            urls, limits="concurrent = 1_000", max_cost_microusd=CHEAP_MICROUSD, models=f'["{CHEAP_MODEL}"]'
        )
        envs = [shared(tmp_path / name, valkey_server, tmp_path.name, **settings) for name in ("a", "b")]
        async with serving(envs[0], config) as (first, one), serving(envs[1], config) as (second, other):
            requests = [full(prompt, allow_degraded=True) for prompt in prompts(100)]
            answers = await outcomes_of([(one, other)[i % 2].GetImage(each) for i, each in enumerate(requests)])
            rows = [*await ledger_of(first.grpc_address), *await ledger_of(second.grpc_address)]
            told = told_in(await _error_of(one, full("one more")))

        good = [answer for answer in answers if isinstance(answer, pb.GetImageResponse)]
        asked_for = Counter((answer.status.degraded, answer.images[0].model) for answer in good)
        assert asked_for == {(False, "gpt-image-2"): 20, (True, CHEAP_MODEL): 80}
        assert told[:3] == ("RESOURCE_EXHAUSTED", "BUDGET_EXHAUSTED", MONTH)
        assert provider.bill_microusd == cost_of(rows, AttemptOutcome.SETTLED) == limit


async def test_beyond_the_budget_who_accepts_less_gets_a_cheaper_picture_that_is_cached(
    tmp_path: Path, valkey_server: ValkeyServer
) -> None:
    async with Provider(emulator(["first"])) as provider:
        env = shared(tmp_path, valkey_server, tmp_path.name)
        async with serving(env, upstream_tables({"first": provider.base_url})) as (service, stub):
            cheaper = await asyncio.gather(*(stub.GetImage(ask_for(prompt, size="auto")) for prompt in prompts(20)))
            paid = cost_of(await ledger_of(service.grpc_address), AttemptOutcome.SETTLED)
            async with AsyncClient(service.grpc_address) as client:
                assert await client.admin.list_budgets() == ()
        env = shared(tmp_path, valkey_server, tmp_path.name, budget__per_month_microusd=paid)
        async with serving(env, upstream_tables({"first": provider.base_url})) as (_, stub):
            answers = await asyncio.gather(
                *(stub.GetImage(full(prompt, allow_degraded=True)) for prompt in prompts(20))
            )
        assert {(answer.status.degraded, answer.status.cost_microusd) for answer in answers} == {(True, 0)}
        assert [answer.images[0].data for answer in answers] == [answer.images[0].data for answer in cheaper]
        assert provider.bill_microusd == paid


async def _error_of(stub: Stub, request: pb.GetImageRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetImage(request)
    return raised.value


# ── one that is killed ──────────────────────────────────────────────────────────────────────────────────────────


async def test_of_a_replica_killed_in_the_middle_what_it_sent_is_spent_and_what_it_did_not_is_free_again(
    tmp_path: Path, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By itself a replica is taken for dead after half a minute: only what the survivor thinks of it counts.
    set_default(monkeypatch, Replicas, "dead_after_s", DEAD_AFTER_S)
    async with Provider(emulator(["first"])) as provider:
        settings = {"budget__per_month_microusd": 20 * FULL_MICROUSD, "generation__interactive_share": 0}
        dying = shared(tmp_path / "dying", valkey_server, tmp_path.name, **settings)
        lasting = shared(tmp_path / "lasting", valkey_server, tmp_path.name, **settings)
        provider.hold()
        async with serving(lasting, one_upstream(provider)) as (service, stub):
            async with in_its_own_process(dying, one_upstream(provider, limits="concurrent = 5")) as dead:
                calls = [dead.stub.GetImage(full(prompt)) for prompt in prompts(30)]
                await provider.arrived(5)
                await until(lambda: sum(call.done() for call in calls) == 10)
                before = await budget_of(service.grpc_address)
                assert (before.spent_microusd, before.reserved_microusd) == (0, 20 * FULL_MICROUSD)
                assert told_in(await _error_of(stub, full("too much")))[1] == "BUDGET_EXHAUSTED"
                await dead.kill()
                await asyncio.gather(*calls, return_exceptions=True)
            provider.release()

            async def is_buried() -> bool:
                return (await budget_of(service.grpc_address)).reserved_microusd == 0

            await until(is_buried)
            assert (await budget_of(service.grpc_address)).spent_microusd == 5 * FULL_MICROUSD
            assert provider.bill_microusd == 5 * FULL_MICROUSD

            answers = await outcomes_of([stub.GetImage(full(prompt)) for prompt in prompts(30, "later")])
            assert sum(isinstance(answer, pb.GetImageResponse) for answer in answers) == 15
            assert provider.bill_microusd == 20 * FULL_MICROUSD

            async with in_its_own_process(dying, one_upstream(provider)) as back:
                rows = await ledger_of(back.address)
                assert [row.outcome for row in rows] == [AttemptOutcome.UNKNOWN] * 5
                assert cost_of(rows, AttemptOutcome.UNKNOWN) == 5 * FULL_MICROUSD
                for address in (back.address, service.grpc_address):
                    budget = await budget_of(address)
                    assert (budget.spent_microusd, budget.reserved_microusd) == (20 * FULL_MICROUSD, 0)
                assert told_in(await _error_of(back.stub, full("too much")))[1] == "BUDGET_EXHAUSTED"
        assert provider.bill_microusd == 20 * FULL_MICROUSD
