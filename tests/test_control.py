"""Control state whose Redis is gone: what this process remembers is all there is, and nobody's call fails."""

from __future__ import annotations

from typing import NoReturn, cast

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException

from cacheserver.control.redis import refuse_eviction_of_control_state
from cacheserver.control.replays import LocalReplays, RedisReplays
from cacheserver.model import Replay
from cacheserver.tiers.redis_client import Client
from tests.fakes import FakeClock

GIVEN = Replay("v1.default.identity", (0, 3))


class Gone:
    """A Redis that fails every call, in its client's own way."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def evalsha(self, *_: object) -> NoReturn:
        raise self._error

    async def info(self, *_: object) -> NoReturn:
        raise self._error


@pytest.fixture(params=[RedisConnectionError(), RedisClusterException("no node"), OSError(), TimeoutError()], ids=repr)
def gone(request: pytest.FixtureRequest) -> Client:
    return cast("Client", Gone(request.param))


async def test_what_this_process_gave_is_known_though_redis_is_gone(clock: FakeClock, gone: Client) -> None:
    replays = RedisReplays(client=gone, here=LocalReplays(monotonic_s=clock.monotonic_s), prefix="test:")
    assert await replays.recall("one") is None
    await replays.remember("one", GIVEN)
    assert await replays.recall("one") == GIVEN


async def test_a_redis_that_is_gone_does_not_keep_the_service_from_starting(gone: Client) -> None:
    await refuse_eviction_of_control_state(gone)


async def test_what_was_given_is_known_for_a_day(clock: FakeClock) -> None:
    replays = LocalReplays(monotonic_s=clock.monotonic_s)
    await replays.remember("one", GIVEN)
    clock.advance(86_399)
    assert await replays.recall("one") == GIVEN
    clock.advance(1)
    assert await replays.recall("one") is None
