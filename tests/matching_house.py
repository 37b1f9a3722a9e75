"""Houses whose namespace takes pictures of other spellings: one alone, and two replicas before a real Redis."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from cacheserver.clock import SystemClock
from cacheserver.control.aliases import RedisAliases
from cacheserver.control.leases import RedisLeases
from cacheserver.epochs import Epochs
from cacheserver.identity import identify
from cacheserver.interfaces import Books, Lease
from cacheserver.model import ImageRequest, MatchLevel, Namespace, Priority, Served, Terms, TierName
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.house import EVERYTHING, MODEL, House, open_tier
from tests.servers import ValkeyServer
from tests.waiting import until

FOX, SAME_FOX, THIRD_FOX = "a red fox, 8k", "Please draw a red fox, 8 k", "red fox!"
ONE_LINE, TWO_LINES = "a red fox", "a red\nfox"
"""Prompts of one key that have not the same canonical key."""

SHARING = Namespace("default", "default", similarity=MatchLevel.CANONICAL)
STRICT = Namespace("strict", "default")
"""Shares the pictures of the house's own namespace, and is answered only with those of a request's own prompt."""

PREFIXES = (f"aliases-{n}:" for n in itertools.count())


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = FakeClock()
    epochs = Epochs()
    house = House(
        clock=clock,
        redis=await open_tier(tmp_path / "redis", TierName.REDIS, clock, epochs),
        s3=await open_tier(tmp_path / "s3", TierName.S3, clock, epochs),
        epochs=epochs,
    )
    house.namespace = SHARING
    yield house
    await house.aclose()


@pytest.fixture
async def client(valkey_server: ValkeyServer) -> AsyncIterator[Client]:
    client = connect(valkey_server.url, timeout_s=5.0, connect_timeout_s=5.0)
    yield client
    await disconnect(client)


class WatchedLeases(RedisLeases):
    """Notes which leases others had when they were asked for."""

    def __init__(self, client: Client, prefix: str, number: int, books: Books) -> None:
        super().__init__(client=client, prefix=prefix, replica_id=f"{number:016x}", clock=SystemClock(), books=books)
        self.waited_for: list[str] = []

    async def take(self, identity_name: str, *, looked_s_ago: float, priority: Callable[[], Priority]) -> Lease:
        asked = itertools.count(1)

        def noted() -> Priority:
            if next(asked) == 2:  # so the first answer was that another has it
                self.waited_for.append(identity_name)
            return priority()

        return await super().take(identity_name, looked_s_ago=looked_s_ago, priority=noted)


class Replica(House):
    """A house whose aliases and leases are those of a real Redis."""

    def share(self, client: Client, prefix: str, number: int) -> None:
        self.leases = WatchedLeases(client, prefix, number, self.books)
        self.leases.start()
        self.aliases = redis_aliases(client, prefix)
        self.restart(leases=self.leases, aliases=self.aliases)

    async def told(self) -> None:
        """Return when others can know of all that was made here."""
        await until(lambda: self.cache.in_flight == 0)
        await self.cache.matching.idle()
        await self.settle()


@pytest.fixture
async def replicas(tmp_path: Path, client: Client) -> AsyncIterator[list[Replica]]:
    clock = FakeClock()
    epochs = Epochs()
    prefix = next(PREFIXES)
    houses: list[Replica] = []
    for number in range(2):
        house = Replica(
            clock=clock,
            redis=await open_tier(tmp_path / f"redis{number}", TierName.REDIS, clock, epochs),
            s3=await open_tier(tmp_path / "s3", TierName.S3, clock, epochs) if not houses else houses[0].s3,
            epochs=epochs,
        )
        house.namespace = SHARING
        house.share(client, prefix, number)
        houses.append(house)
    yield houses
    for house in houses:
        await house.aclose()
        await house.leases.aclose()


def spellings(n: int) -> Iterator[str]:
    """So many ways to ask for one picture."""
    wrappers = ("", "please draw ", "can you generate ", "an image of ", "Create a picture of ")
    articles = ("a ", "the ", "", "A ")
    names = ("red fox", "Red Fox", "RED FOX", "red  fox", "red-fox")
    ends = ("", ".", "!", ", 8k", ", 8 k", ", highly detailed", ", masterpiece, best quality", ", 4k, hd")
    every = ("".join(parts) for parts in itertools.product(wrappers, articles, names, ends))
    return itertools.islice(every, n)


def redis_aliases(client: Client, prefix: str) -> RedisAliases:
    return RedisAliases(client=client, prefix=prefix, monotonic_s=SystemClock().monotonic_s, timeout_s=5.0)


async def ask_in(house: House, namespace: Namespace, prompt: str, **terms: object) -> Served:
    request = ImageRequest(prompt, MODEL)
    asked = Terms(**terms)  # type: ignore[arg-type] # test convenience
    identity = identify(request, namespace, asked.match_level)
    answer = await house.cache.get(request, identity, namespace=namespace, caller=EVERYTHING, terms=asked)
    assert isinstance(answer, list)
    return answer[0]


async def waits_for_its_turn(house: House, flights: int = 1) -> None:
    """Return when so many flights wait for that of another spelling."""
    await until(lambda: len(house.cache.matching._waiting) == flights)
