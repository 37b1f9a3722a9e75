"""What is remembered of requests that come again: bounded in number and in bytes."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import cast
from weakref import ref

from cacheserver.calls.again import HitAgain
from cacheserver.calls.call import NOBODY, Call
from cacheserver.figures import HitRow, Key
from cacheserver.http.openai.asked import HttpAsked
from cacheserver.http.openai.memo import _MOST_MEMOS, _MOST_NAME_BYTES, _MOST_TOLD_BYTES, Memo, Memos, Told, name_of
from cacheserver.model import CachePolicy, Identity, Namespace, Served, TierName
from cacheserver.recall import ToldImages
from tests.house import House
from tests.waiting import until

NAMESPACE = Namespace("default", "default")


def memo() -> Memo:
    return Memo(cast("HttpAsked", None), cast("Identity", None))


def told_of(served: Served, body: bytes) -> Told:
    again = HitAgain(
        caller=NOBODY,
        namespace=NAMESPACE,
        what=served.entry.key,
        match_level=None,
        identity=None,
        name=served.entry.key.name,
        entry=ref(served.entry),
        matched=served.matched,
        saved_microusd=served.saved_microusd,
        until_s=60.0,
        row=HitRow(Key(), len(body), served.saved_microusd),
        told=ToldImages(),
    )
    return Told(served, body, CachePolicy.USE_CACHE, again)


def test_the_oldest_of_too_many_are_forgotten() -> None:
    memos = Memos()
    for number in range(_MOST_MEMOS + 1):
        memos.keep((number,), memo())
    assert memos.find((0,)) is None
    assert memos.find((1,)) is not None
    assert memos.find((_MOST_MEMOS,)) is not None
    memos.keep((b"{}", "x" * _MOST_NAME_BYTES), memo())
    assert memos.find((b"{}", "x" * _MOST_NAME_BYTES)) is None


async def test_what_was_told_is_bounded_in_bytes_and_keeps_no_picture(house: House) -> None:
    served = replace(await house.get(), tier=TierName.MEMORY, cost_microusd=0, saved_microusd=5, collapsed=False)
    memos, body = Memos(), bytes(_MOST_TOLD_BYTES // 2)
    kept = {name: memo() for name in (("a",), ("b",), ("c",))}
    for name, each in kept.items():
        memos.keep(name, each)
        memos.tell(name, each, told_of(served, body))
    assert [each.told is not None for each in kept.values()] == [False, True, True]
    told = kept["c",].told
    assert told is not None
    assert told.again.entry() is served.entry
    await house.settle()
    house.memory.delete(served.entry.key)
    del served
    gc.collect()
    await until(lambda: told.again.entry() is None)  # a thread of the disk lets go of it a moment after it is written


async def test_what_was_told_of_a_memo_that_is_kept_anew_takes_no_room(house: House) -> None:
    told = told_of(await house.get(), bytes(_MOST_TOLD_BYTES // 2))
    memos, kept = Memos(), [memo() for _ in range(3)]
    for number, each in enumerate(kept[:2]):
        memos.keep((number,), each)
        memos.tell((number,), each, told)
    memos.keep((1,), memo())
    memos.keep((2,), kept[2])
    memos.tell((2,), kept[2], told)
    assert [each.told is not None for each in kept] == [True, False, True]


def test_a_call_is_remembered_by_all_it_was_read_from() -> None:
    def name(body: bytes = b"{}", **metadata: str) -> object:
        said = {key.replace("_", "-"): value for key, value in metadata.items()}
        return name_of(Call("POST", said, "id", None, 0.0), NAMESPACE, body)

    names = [name(), name(b"{ }"), name(cache_control="no-store"), name(x_cacheserver_ttl="5"), name(content_type="a")]
    assert len({*names}) == len(names)
    assert name() == name(user_agent="another")
    assert name(idempotency_key="x") is None
    assert name(b" " * 5_000) is None
