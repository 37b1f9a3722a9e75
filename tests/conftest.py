"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

pytest.register_assert_rewrite("tests.tier_contract", "tests.rpc_front")

from cacheserver.embedded import child  # noqa: E402 - assertions are rewritten as modules are first imported
from cacheserver.model import TierName  # noqa: E402 - as above
from tests.fakes import FakeClock  # noqa: E402 - as above
from tests.house import House, open_tier  # noqa: E402 - as above
from tests.provider import OpenAIStandIn  # noqa: E402 - as above
from tests.servers import (  # noqa: E402 - as above
    cluster,
    own_s3,
    own_valkey,
    redis_url,
    s3_server,
    sentinel_set,
    valkey_server,
)

# Processes side by side would now and then find the same port free.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
child._PORTS = child._PORTS[_PROCESS :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]

__all__ = ["cluster", "own_s3", "own_valkey", "redis_url", "s3_server", "sentinel_set", "valkey_server"]

settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("deep", derandomize=False, database=None, deadline=None, print_blob=True)
settings.load_profile("same")  # before the first test with settings of its own, which inherit these
_DEEPER = 20


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Give property tests the time to shrink what they find, and in the profile `deep` many more examples."""
    properties = [item for item in items if item.get_closest_marker("hypothesis")]
    factor = _DEEPER if settings.get_current_profile_name() == "deep" else 1
    for item in properties:
        item.add_marker(pytest.mark.timeout(400 * factor))  # Hypothesis shrinks for five minutes at most
    if factor == 1:
        # Hypothesis draws constants it finds in our code, too: any commit would give every test other examples. One of
        # its releases may do so in another way: then this does nothing, and the examples are those of a commit.
        pytest.MonkeyPatch().setattr(providers, "_get_local_constants", providers.Constants, raising=False)
        return
    for test in {item.function if hasattr(item.function, "hypothesis") else item.cls for item in properties}:
        name = "settings" if isinstance(test, type) else "_hypothesis_internal_use_settings"
        its = getattr(test, name)
        setattr(test, name, settings(its, max_examples=its.max_examples * factor))


def pytest_collection_finish() -> None:
    """Leave modules and tests out of garbage collections: on a busy machine one would halt a test for a second."""
    gc.freeze()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Trace nothing of a test that is marked `no_cover`.

    pytest-cov sees to that, but in processes of xdist it has two tracers: where the upper one stops, the lower goes on.
    """
    if item.get_closest_marker("no_cover") is None:
        return (yield)
    tracer, tracer_of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
        threading.settrace(tracer_of_threads)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def provider() -> AsyncIterator[OpenAIStandIn]:
    """A stand-in for a provider that speaks OpenAI's API, on a real port."""
    async with OpenAIStandIn() as server:
        yield server


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is freed by looking for what is garbage."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
async def house(clock: FakeClock, tmp_path: Path) -> AsyncIterator[House]:
    """A whole cache on two real directories, with an upstream and faults at the test's command."""
    redis = await open_tier(tmp_path / "tiers" / "redis", TierName.REDIS, clock)
    s3 = await open_tier(tmp_path / "tiers" / "s3", TierName.S3, clock)
    house = House(clock=clock, redis=redis, s3=s3)
    yield house
    for tier in (redis, s3):
        tier.is_down = False
        tier.gate.set()
    await house.aclose()
    await redis.aclose()
    await s3.aclose()
