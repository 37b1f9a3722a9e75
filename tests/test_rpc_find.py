"""FindCached: what is known of earlier calls, what of it counts, and that others get their turn."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest

from cacheserver.calls.call import Call
from cacheserver.model import CacheKey, Caller, Namespace, Permission
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.precheck import PromptPolicy
from cacheserver.rpc import wire
from cacheserver.rpc.find import FindCached, KnownKeys
from cacheserver.tasks import end
from tests.calls_desk import desk
from tests.house import EVERYTHING, House
from tests.rpc_front import Front, ask, authorization, failure, open_front, spec

T = TypeVar("T")

KEY = CacheKey("default", bytes(16), bytes(32), 0)


@pytest.fixture
async def front(house: House) -> AsyncIterator[Front]:
    async with open_front(house) as front:
        yield front


def find(*items: pb.FindItem, namespace: str = "") -> pb.FindCachedRequest:
    return pb.FindCachedRequest(items=items, namespace=namespace)


async def tiers(front: Front, request: pb.FindCachedRequest) -> list[str]:
    return [pb.Tier.Name(item.tier) for item in (await front.stub.FindCached(request)).items]


async def test_where_a_known_item_is_is_looked_up_every_time(front: Front) -> None:
    request = find(pb.FindItem(spec=spec()), pb.FindItem(spec=spec(), variant=1))
    assert await tiers(front, request) == ["TIER_UNSPECIFIED", "TIER_UNSPECIFIED"]
    await front.stub.GetImage(ask())
    await front.house.settle()
    assert await tiers(front, request) == ["TIER_MEMORY", "TIER_UNSPECIFIED"]
    front.house.memory.delete(front.house.identity()[1].key)
    assert await tiers(front, request) == ["TIER_REDIS", "TIER_UNSPECIFIED"]
    await front.stub.PurgeImages(pb.PurgeImagesRequest(everything=True))
    assert await tiers(front, request) == ["TIER_UNSPECIFIED", "TIER_UNSPECIFIED"]


async def test_an_item_is_answered_with_the_same_key_again(front: Front) -> None:
    [image] = (await front.stub.GetImage(ask("A red  fox.", of={"seed": 7, "extra": {"steps": 30}}))).images
    by_spec = pb.FindItem(spec=spec("a red fox", seed=7, extra={"steps": 30}))
    request = find(by_spec, pb.FindItem(key=image.key), by_spec)
    for _ in range(2):
        found = await front.stub.FindCached(request)
        assert [item.key for item in found.items] == [image.key] * 3


async def test_what_one_namespace_asked_for_says_nothing_in_another(house: House) -> None:
    redacting = PromptPolicy(name="shop", pii="redact")
    others = [Namespace("exact", "default", profile="exact"), Namespace("shop", "default"), Namespace("own", "own")]
    async with open_front(house, namespaces=others, policies={"shop": redacting}) as front:
        item = pb.FindItem(spec=spec("A card for jo@example.com"))
        names = ["", "exact", "shop", "own"]
        keys = [[(await front.stub.FindCached(find(item, namespace=n))).items[0].key for n in names] for _ in range(2)]
        assert keys[0] == keys[1]
        assert len(set(keys[0])) == len(names)
        said = await front.stub.ExplainKey(pb.ExplainKeyRequest(spec=item.spec, namespace="shop"))
        assert (said.explanation.key, "[email]" in said.explanation.normalized_prompt) == (keys[0][2], True)


async def test_a_key_known_in_its_namespace_is_refused_in_another(house: House) -> None:
    async with open_front(house, namespaces=[Namespace("own", "own")]) as front:
        [image] = (await front.stub.GetImage(ask())).images
        item = pb.FindItem(key=image.key)
        assert await tiers(front, find(item)) == ["TIER_MEMORY"]
        assert "items[0].key" in (await failure(front.stub.FindCached(find(item, namespace="own")))).fields


async def test_a_caller_without_the_right_learns_nothing_of_what_is_known(house: House) -> None:
    rights = {"reader": Permission.READ, "putter": Permission.PUT}
    callers = [
        (hashlib.sha256(name.encode()).digest(), Caller(name, frozenset({right}))) for name, right in rights.items()
    ]
    async with open_front(house, callers=callers, anonymous=None) as front:
        request = find(pb.FindItem(spec=spec()))
        await front.stub.FindCached(request, metadata=authorization("reader"))
        refused = await failure(front.stub.FindCached(request, metadata=authorization("putter")))
        assert refused.code == "PERMISSION_DENIED"


async def test_a_bad_item_is_named_among_known_ones_and_never_known_itself(front: Front) -> None:
    good, bad = pb.FindItem(spec=spec()), pb.FindItem(spec=spec(size="huge"))
    await front.stub.FindCached(find(good))
    for _ in range(2):
        refused = await failure(front.stub.FindCached(find(good, bad, good, pb.FindItem(key="x"), bad)))
        assert list(refused.fields) == ["items[1].spec.size", "items[3].key", "items[4].spec.size"]


def test_the_oldest_known_keys_go_first() -> None:
    known = KnownKeys(max_bytes=2_300)
    for item in (b"one", b"two", b"three", b"four"):
        known.keep("a", item, KEY)
    assert [known.find("a", item) for item in (b"one", b"two", b"three", b"four")] == [None, KEY, KEY, KEY]
    assert known.find("b", b"four") is None
    assert known.size_bytes <= 2_300


def test_an_item_that_two_calls_make_known_counts_once() -> None:
    known = KnownKeys(max_bytes=2_300)
    for _ in range(10):
        known.keep("a", b"one", KEY)
    assert known.find("a", b"one") == KEY
    assert known.size_bytes == 703


def test_a_long_item_is_not_kept() -> None:
    known = KnownKeys()
    known.keep("a", bytes(2_049), KEY)
    assert (known.find("a", bytes(2_049)), known.size_bytes) == (None, 0)


class Turns:
    """Counts how often things are done between one turn of another task and the next: the most of each."""

    def __init__(self) -> None:
        self.most: Counter[str] = Counter()
        self._done: Counter[str] = Counter()

    async def take(self) -> None:
        while True:
            self.most |= self._done
            self._done.clear()
            await asyncio.sleep(0)

    def counting(self, name: str, work: Callable[..., T]) -> Callable[..., T]:
        def counted(*args: Any) -> T:
            self._done[name] += 1
            return work(*args)

        return counted


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("words", "is_known", "keyed_per_turn"), [(5, True, 40), (5, False, 5), (400, True, 4), (400, False, 2)]
)
async def test_others_get_their_turn_every_few_dozen_items_and_of_long_and_new_ones_sooner(
    words: int, keyed_per_turn: int, house: House, monkeypatch: pytest.MonkeyPatch, *, is_known: bool
) -> None:
    house.restart(tiers=[])
    at = desk(house, callers=(), anonymous=None, namespaces=(), max_concurrent_calls=1, policies={}, prompts=None)
    known, turns = KnownKeys(), Turns()
    finder = FindCached(cache=house.cache, asking=at.asking, known=known)
    message = find(*(pb.FindItem(spec=spec(f"fox {n}" + " fox" * words)) for n in range(2_500)))
    call = Call("FindCached", {}, "id", None, 0.0, caller=EVERYTHING)
    if is_known:
        await finder.find_cached(message, call)
    for owner, name in ((known, "find"), (house.memory, "contains"), (wire, "found_item")):
        monkeypatch.setattr(owner, name, turns.counting(name, getattr(owner, name)))
    taking = asyncio.create_task(turns.take())
    reply = await finder.find_cached(message, call)
    await end([taking])
    assert len(pb.FindCachedResponse.FromString(reply).items) == 2_500
    assert 0 < turns.most["find"] <= keyed_per_turn
    assert 0 < turns.most["contains"] <= 25
    assert 0 < turns.most["found_item"] <= 100
