"""Edits: requests that start from images, whose bytes travel with them and are kept by nobody."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import threading
from dataclasses import replace

import pytest

from cacheserver.calls.uploads import UploadMemory
from cacheserver.errors import InvalidRequestError, NotCachedError, PermissionDeniedError, UpstreamDownError
from cacheserver.identity import identify
from cacheserver.model import (
    CachePolicy,
    Caller,
    Identity,
    ImageRequest,
    InputImage,
    InputRole,
    Pending,
    Permission,
    Served,
    Terms,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import inputs
from tests.house import EVERYTHING, MODEL, House
from tests.provider import small_image
from tests.rpc_front import ask as request
from tests.rpc_front import failure, open_front
from tests.waiting import until

PNG = small_image(1)
DIGEST = hashlib.sha256(PNG).hexdigest()
WHOLE = InputImage(InputRole.IMAGE, DIGEST, "image/png", PNG)
BY_DIGEST = InputImage(InputRole.IMAGE, DIGEST)
READER = Caller("reader", frozenset({Permission.READ}))


def edit(house: House, *inputs: InputImage, prompt: str = "a hat on it") -> tuple[ImageRequest, Identity]:
    request = ImageRequest(prompt, MODEL, inputs=inputs)
    return request, identify(request, house.namespace)


async def ask(
    house: House, *inputs: InputImage, caller: Caller = EVERYTHING, **terms: object
) -> list[Served] | Pending:
    request, identity = edit(house, *inputs)
    asked = Terms(**terms)  # type: ignore[arg-type] # test convenience
    return await house.cache.get(request, identity, namespace=house.namespace, caller=caller, terms=asked)


def entry_of(answer: list[Served] | Pending) -> bytes:
    assert not isinstance(answer, Pending)
    return answer[0].entry.image.data


async def test_an_edit_is_made_once_and_found_by_digest_alone(house: House) -> None:
    made = entry_of(await ask(house, WHOLE))
    assert entry_of(await ask(house, BY_DIGEST)) == made
    assert entry_of(await ask(house, WHOLE)) == made
    assert house.upstream.calls == 1
    [(asked, _)] = house.upstream.asked
    assert asked.inputs[0].data == PNG


@pytest.mark.parametrize("policy", [CachePolicy.USE_CACHE, CachePolicy.REFRESH, CachePolicy.NO_STORE])
async def test_of_a_digest_alone_nothing_is_made_and_nothing_spent(house: House, policy: CachePolicy) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await ask(house, WHOLE, BY_DIGEST, cache_policy=policy)
    assert list(caught.value.violations) == ["spec.inputs[1].data"]
    assert (house.upstream.calls, house.ledger.opened) == (0, [])


async def test_who_looks_only_or_may_only_look_is_told_so(house: House) -> None:
    with pytest.raises(NotCachedError):
        await ask(house, BY_DIGEST, cache_policy=CachePolicy.ONLY_IF_CACHED)
    for policy in (CachePolicy.USE_CACHE, CachePolicy.NO_STORE):
        with pytest.raises(PermissionDeniedError):
            await ask(house, BY_DIGEST, caller=READER, cache_policy=policy)


async def test_who_gives_a_digest_has_the_picture_that_another_pays_for(house: House) -> None:
    house.upstream.hold()
    guest = asyncio.create_task(ask(house, BY_DIGEST))
    payer = asyncio.create_task(ask(house, WHOLE))
    await house.upstream.arrived(1)
    house.upstream.release()
    assert entry_of(await guest) == entry_of(await payer)
    assert house.upstream.calls == 1


async def test_who_gives_a_digest_hears_that_the_picture_waits_for_review(house: House) -> None:
    house.namespace = replace(house.namespace, min_score=0.999)
    house.restart()
    made = await ask(house, WHOLE, candidates=2)
    assert isinstance(made, Pending)
    assert made.in_review
    assert await ask(house, BY_DIGEST) == made
    with pytest.raises(InvalidRequestError):
        await ask(house, BY_DIGEST, cache_policy=CachePolicy.REFRESH)


@pytest.mark.parametrize(
    ("data", "said", "text"),
    [
        (b"no image at all", "image/png", "not a whole PNG, JPEG or WebP image"),
        (PNG[:-20], "image/png", "cut off"),
        (small_image(1, "webp"), "image/png", "is image/webp"),
    ],
)
async def test_what_is_no_image_is_refused_before_anything_is_spent(
    house: House, data: bytes, said: str, text: str
) -> None:
    wrong = InputImage(InputRole.STYLE, hashlib.sha256(data).hexdigest(), said, data)
    with pytest.raises(InvalidRequestError) as caught:
        await ask(house, WHOLE, wrong)
    assert list(caught.value.violations) == ["spec.inputs[1].data"]
    assert text in caught.value.violations["spec.inputs[1].data"]
    assert (house.upstream.calls, house.ledger.opened) == (0, [])


async def test_an_edit_that_waits_takes_of_the_queue_what_its_images_take(house: House) -> None:
    house.restart(max_concurrent=1)
    house.upstream.hold()
    first = asyncio.create_task(house.ask())
    await house.upstream.arrived(1)
    waiting = asyncio.create_task(ask(house, WHOLE))
    queue = house.generator._scheduler._queue
    await until(lambda: len(queue) == 1)
    assert len(PNG) < queue.size_bytes < len(PNG) + 4_000
    house.upstream.release()
    await asyncio.gather(first, waiting)


def test_a_request_without_its_bytes_is_the_same_request(house: House) -> None:
    request, identity = edit(house, WHOLE, BY_DIGEST)
    bare = request.without_bytes
    assert [image.data for image in bare.inputs] == [None, None]
    assert (bare, identify(bare, house.namespace)) == (request, identity)


async def test_nobody_keeps_the_bytes_of_an_edit_when_it_is_over(house: House) -> None:
    house.namespace = replace(house.namespace, remake_degraded=True)
    await ask(house, own_copy("made"))
    house.upstream.fail_next(UpstreamDownError("down"))
    with pytest.raises(UpstreamDownError):
        await ask(house, own_copy("failed"))
    house.upstream.fail_next(UpstreamDownError("down"))
    assert isinstance(await ask(house, own_copy("put off and failed"), max_wait_s=0), Pending)
    await house.upstream.arrived(3)
    await house.generator.settled()
    await house.settle()
    house.upstream.asked.clear()
    assert kept_copies() == []


# --- by gRPC


SENT = pb.InputImage(data=PNG)
NAMED = pb.InputImage(digest=f"sha256:{DIGEST.upper()}")


async def test_a_message_may_hold_an_input_image_or_name_it(house: House) -> None:
    async with open_front(house) as front:
        made = await front.stub.GetImage(request(of={"inputs": [SENT]}))
        found = await front.stub.GetImage(request(of={"inputs": [NAMED]}))
        assert (found.images[0].key, found.status.tier) == (made.images[0].key, pb.TIER_MEMORY)
        [event, *_] = await front.stream(pb.StreamImageRequest(request=request(of={"inputs": [SENT]})))
        assert event.header.image.key == made.images[0].key
        [(asked, _)] = house.upstream.asked
        assert asked.inputs == (WHOLE,)
        assert (asked.inputs[0].data, asked.inputs[0].content_type) == (PNG, "image/png")


async def test_what_only_looks_takes_input_images_either_way(house: House) -> None:
    async with open_front(house) as front:
        made = await front.stub.GetImage(request(of={"inputs": [SENT]}))
        for given in (SENT, NAMED):
            spec = request(of={"inputs": [given]}).spec
            found = await front.stub.FindCached(pb.FindCachedRequest(items=[pb.FindItem(spec=spec)]))
            assert found.items[0].presence == pb.PRESENCE_CACHED
            explained = await front.stub.ExplainKey(pb.ExplainKeyRequest(spec=spec, other=request().spec))
            assert explained.explanation.key == made.images[0].key
            assert [each.field for each in explained.differences] == ["inputs"]
        purged = await front.stub.PurgeImages(pb.PurgeImagesRequest(spec=request(of={"inputs": [NAMED]}).spec))
        assert purged.images == 1
        await front.put(pb.PutImageHeader(spec=request(of={"inputs": [NAMED]}).spec), small_image(7))
        answer = await front.stub.GetImage(request(of={"inputs": [SENT]}))
        assert answer.images[0].data == small_image(7)
    assert house.upstream.calls == 1


async def test_no_rpc_digests_input_images_where_others_wait_for_their_turn(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    class Digests:
        @staticmethod
        def sha256(data: bytes) -> object:
            threads.append(threading.current_thread())
            return hashlib.sha256(data)

    monkeypatch.setattr(inputs, "hashlib", Digests)
    spec = request(of={"inputs": [SENT]}).spec
    async with open_front(house) as front:
        await front.put(pb.PutImageHeader(spec=spec), small_image(7))
        await front.stub.GetImage(request(of={"inputs": [SENT]}))
        await front.stub.FindCached(pb.FindCachedRequest(items=[pb.FindItem(spec=spec)]))
        await front.stub.ExplainKey(pb.ExplainKeyRequest(spec=spec, other=spec))
        await front.stub.PurgeImages(pb.PurgeImagesRequest(spec=spec))
        parts = [
            pb.WarmImagesRequest(options=pb.WarmOptions(job="night")),
            pb.WarmImagesRequest(items=pb.WarmItems(items=[pb.WarmItem(request=request(of={"inputs": [SENT]}))])),
        ]
        assert [answer async for answer in front.stub.WarmImages(iter(parts))]
    assert len(threads) == 7
    assert threading.current_thread() not in threads


async def test_input_images_of_all_calls_take_so_much_memory_until_their_picture_is_made(house: House) -> None:
    memory = UploadMemory(5 * len(PNG))
    async with open_front(house, uploads=memory) as front:
        house.upstream.hold()
        asking = front.stub.GetImage(request(of={"inputs": [SENT]}))
        await house.upstream.arrived(1)
        again = request(of={"inputs": [SENT]})
        for refused in (front.stub.GetImage(again), front.stream(pb.StreamImageRequest(request=again))):
            assert (await failure(refused)).reason == "OVERLOADED"
        asking.cancel()
        await until(lambda: memory.free_bytes == 4 * len(PNG))  # the load goes on, and still needs them
        house.upstream.release()
        await until(lambda: house.upstream.images == 1)
        await front.stub.GetImage(request(of={"inputs": [SENT]}))
        house.upstream.asked.clear()
        await house.settle()
        gc.collect()
        await until(lambda: memory.free_bytes == 5 * len(PNG))


async def test_a_warm_up_makes_no_edits(house: House) -> None:
    async with open_front(house) as front:
        parts = [
            pb.WarmImagesRequest(options=pb.WarmOptions(job="night")),
            pb.WarmImagesRequest(
                items=pb.WarmItems(
                    items=[
                        pb.WarmItem(row=row, request=request(of={"inputs": [given]}))
                        for row, given in enumerate((SENT, NAMED))
                    ]
                )
            ),
        ]
        answers = [answer async for answer in front.stub.WarmImages(iter(parts))]
    outcomes = [outcome for answer in answers for outcome in answer.outcomes]
    assert [(outcome.result, outcome.failure.reason) for outcome in outcomes] == [
        (pb.WARM_RESULT_FAILED, "INVALID_FIELD")
    ] * 2
    assert house.upstream.calls == 0


class Copy(bytes):
    """The bytes of an input image that this test can tell from all others."""


def own_copy(name: str) -> InputImage:
    data = Copy(small_image(sum(name.encode())))
    return InputImage(InputRole.IMAGE, hashlib.sha256(data).hexdigest(), "image/png", data)


def kept_copies() -> list[bytes]:
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, Copy)]
