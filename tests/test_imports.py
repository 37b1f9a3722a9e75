"""Pictures come in by the last tier alone, each once, and what is stored is listed; over a real port."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from structlog.testing import capture_logs

from cacheserver.clock import SystemClock
from cacheserver.imports import Imports
from cacheserver.model import CacheKey, MatchLevel, Namespace, TierName
from cacheserver.pb import admin_pb2 as pb
from cacheserver.pb import promptcache_pb2 as public_pb
from cacheserver.precheck import PromptPolicy
from cacheserver.rpc.admin import page_token
from cacheserver.rpc.admin_images import _WINDOW
from cacheserver.tiers.objects import Objects
from tests.admin_front import calling, serving
from tests.house import House
from tests.images_front import MAX_IMAGE_BYTES, images_service, incoming, spec, taken
from tests.provider import large_png, small_image
from tests.rpc_front import failure
from tests.servers import S3Server
from tests.waiting import until


@asynccontextmanager
async def connected(house: House, *namespaces: Namespace, **options: Any) -> AsyncIterator[Any]:
    async with serving(images_service(house, *namespaces, **options)) as address, calling(address) as stub:
        yield stub


@pytest.fixture
async def stub(house: House) -> AsyncIterator[Any]:
    async with connected(house) as stub:
        yield stub


def in_last_tier(house_directory: Path) -> list[Path]:
    return sorted((house_directory / "tiers/s3/v1").rglob("v1.*"))


def identity_of(house: House, prompt: str = "a red fox", variant: int = 0, **fields: Any) -> pb.ExportedIdentity:
    identity = house.identity(prompt)[1]
    facts = {
        "key": identity.key.with_variant(variant).name,
        "digest": identity.key.digest,
        "prompt_digest": identity.prompt_digest,
    }
    return pb.ExportedIdentity(**facts | fields)


def reasons(outcomes: list[pb.ImportImagesResponse]) -> list[str]:
    return [outcome.failure.reason for outcome in outcomes]


# --- one picture ---


async def test_an_imported_picture_is_a_hit_that_nobody_pays_for(house: House, stub: Any) -> None:
    [outcome] = await taken(stub, incoming(1, tags=["old"]))
    assert (outcome.row, outcome.key, outcome.created) == (1, house.identity()[1].key.name, True)
    assert not outcome.HasField("failure")
    served = await house.get()
    assert (served.tier, served.saved_microusd, served.entry.image.data) == (TierName.S3, 40_000, small_image(1))
    assert (served.entry.tags, served.entry.image.model, served.entry.image.size) == (("old",), "gpt-image-2", "64x48")
    assert house.upstream.calls == 0


async def test_an_imported_picture_answers_other_spellings_of_its_prompt(house: House) -> None:
    house.namespace = replace(house.namespace, similarity=MatchLevel.CANONICAL)
    async with connected(house, house.namespace) as stub:
        await taken(stub, incoming(1))
    served = await house.get("Please draw a red fox, 8k")
    assert (served.matched, house.upstream.calls) == (MatchLevel.CANONICAL, 0)


async def test_an_import_leaves_memory_and_the_faster_tiers_alone(house: House, stub: Any) -> None:
    for _ in range(2):  # what is there already is not promoted either
        await taken(stub, *(incoming(number, f"prompt {number}") for number in range(20)))
    await house.settle()
    assert len(house.memory) == 0
    assert await house.redis.page("default", after=None, limit=5) == []
    assert len(await house.s3.page("default", after=None, limit=50)) == 20


async def test_equal_bytes_are_there_already_and_others_are_the_next_variant(stub: Any) -> None:
    [first] = await taken(stub, incoming(1))
    [again] = await taken(stub, incoming(1))
    [other] = await taken(stub, incoming(2))
    assert (again.key, again.created) == (first.key, False)
    assert (CacheKey.parse(other.key).variant, other.created) == (1, True)


async def test_pictures_of_one_request_side_by_side_are_each_stored_once(stub: Any) -> None:
    outcomes = await taken(stub, *(incoming(row, data=small_image(row % 5)) for row in range(40)))
    created = [outcome for outcome in outcomes if outcome.created]
    assert len(created) == 5
    assert {CacheKey.parse(outcome.key).variant for outcome in created} == set(range(5))
    for n in range(5):
        assert len({outcome.key for outcome in outcomes[n::5]}) == 1


async def test_a_damaged_picture_in_the_last_tier_is_mended(house: House, stub: Any, tmp_path: Path) -> None:
    await taken(stub, incoming(1))
    [file] = in_last_tier(tmp_path)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    [outcome] = await taken(stub, incoming(1))
    assert (outcome.key, outcome.created) == (house.identity()[1].key.name, True)
    assert (await house.get()).entry.image.data == small_image(1)


async def test_more_pictures_than_variants_are_told_so(house: House) -> None:
    async with connected(house, replace(house.namespace, max_variants=2)) as stub:
        outcomes = await taken(stub, *(incoming(row) for row in range(3)))
    assert sorted(reasons(outcomes)) == ["", "", "VARIANTS_EXHAUSTED"]


async def test_it_was_made_when_it_is_said_and_lasts_as_its_namespace_says(house: House) -> None:
    now_s = house.clock.now_s()
    async with connected(house, replace(house.namespace, ttl_s=3600.0)) as stub:
        message = incoming(1)
        message.create_time.FromSeconds(int(now_s) - 86_400)
        await taken(stub, message)
        [stored] = (await stub.ListImages(pb.ListImagesRequest())).images
    assert stored.image.create_time.seconds == int(now_s) - 86_400
    assert stored.expire_time.seconds == int(now_s) + 3600


async def test_a_dry_run_tells_and_stores_nothing(house: House, stub: Any, tmp_path: Path) -> None:
    [outcome, bad] = await taken(stub, incoming(1, dry_run=True), incoming(2, data=b"no picture", dry_run=True))
    assert (outcome.key, outcome.created) == (house.identity()[1].key.name, True)
    assert bad.failure.reason == "INVALID_FIELD"
    assert in_last_tier(tmp_path) == []


async def test_a_prompt_is_keyed_as_its_namespace_keys_callers(house: House) -> None:
    policy = PromptPolicy(name="default", deny=None, pii="redact", moderation=None)
    async with connected(house, policies={"default": policy}) as stub:
        [outcome] = await taken(stub, incoming(1, "a card for ann@example.com"))
    assert outcome.key == house.identity(policy.redacted("a card for ann@example.com"))[1].key.name
    assert outcome.key != house.identity("a card for ann@example.com")[1].key.name


# --- what does not fit ---


@pytest.mark.parametrize(
    ("fields", "violated"),
    [
        ({"data": b"no picture"}, "source"),
        ({"data": small_image(1, "webp")}, "source"),
        ({"digest": f"sha256:{'0' * 64}"}, "digest"),
        ({"digest": "md5:1"}, "digest"),
        ({"namespace": "nobody"}, "namespace"),
        ({"paid_microusd": -1}, "paid_microusd"),
        ({"tags": ["no blanks"]}, "tags[0]"),
        ({"spec": spec("")}, "spec.prompt"),
        ({"spec": None}, "what"),
        ({"data": None}, "source"),
        ({"s3_uri": "s3://bucket/name"}, "s3_uri"),
    ],
)
async def test_what_is_wrong_with_one_picture_is_its_outcome_alone(
    stub: Any, tmp_path: Path, fields: dict[str, Any], violated: str
) -> None:
    bad = incoming(2, "another", **fields)
    outcomes = await taken(stub, incoming(1), bad, incoming(3, "a third"))
    assert reasons(outcomes) == ["", "INVALID_FIELD", ""]
    assert violated in outcomes[1].failure.violations
    assert outcomes[1].failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert len(in_last_tier(tmp_path)) == 2


async def test_a_picture_from_the_future_is_refused(house: House, stub: Any) -> None:
    message = incoming(1)
    message.create_time.FromSeconds(int(house.clock.now_s()) + 3600)
    [outcome] = await taken(stub, message)
    assert "create_time" in outcome.failure.violations


async def test_bytes_that_are_no_message_end_the_stream_after_what_came_before(house: House) -> None:
    async with (
        serving(images_service(house)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        method = channel.stream_stream("/promptcache.admin.v1alpha1.AdminService/ImportImages")
        call = method(iter([incoming(1).SerializeToString(), b"\xff"]))
        assert pb.ImportImagesResponse.FromString(await call.read()).created  # type: ignore[arg-type]  # bytes, as nothing parses them
        failed = await failure(call.read())
    assert failed.reason == "MALFORMED_MESSAGE"


async def test_a_bug_met_by_one_picture_is_in_the_log_and_its_outcome_reveals_nothing(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Imports, "_entry", lambda *_: 1 // 0)
    with capture_logs() as logs:
        [outcome] = await taken(stub, incoming(1))
    assert outcome.failure.reason == "INTERNAL"
    assert "division" not in outcome.failure.message
    assert [type(line["exc_info"]) for line in logs if line["event"] == "import_failed"] == [ZeroDivisionError]


async def test_while_the_last_tier_is_away_nothing_is_said_to_be_stored(house: House, stub: Any) -> None:
    house.s3.is_down = True
    [outcome] = await taken(stub, incoming(1))
    assert (outcome.failure.reason, outcome.failure.code) == ("TIER_UNREACHABLE", 14)
    assert outcome.failure.retry_delay.seconds == 5
    assert len(house.memory) == 0
    house.s3.is_down = False
    [outcome] = await taken(stub, incoming(1))
    assert outcome.created


async def test_a_number_that_a_held_picture_waits_for_is_not_taken(house: House, stub: Any) -> None:
    house.s3.is_down = True
    request, identity = house.identity()
    image = (await house.upstream.generate(request, [0])).images[0]
    await house.cache.put(image, identity, namespace=house.namespace, replace=True)
    house.s3.is_down = False
    [outcome] = await taken(stub, incoming(1))
    assert outcome.failure.reason == "TIER_UNREACHABLE"
    house.clock.advance(60)
    await until(lambda: house.keeper.held(identity.key) is None)
    [outcome] = await taken(stub, incoming(1))
    assert CacheKey.parse(outcome.key).variant == 1


async def test_no_more_is_taken_than_outcomes_are_read(house: House, stub: Any) -> None:
    house.s3.gate.clear()
    sent = 0

    async def endless() -> AsyncIterator[pb.ImportImagesRequest]:
        nonlocal sent
        while True:
            sent += 1
            yield incoming(sent, f"prompt {sent}", data=small_image(1) + bytes(60_000))

    call = stub.ImportImages(endless())
    await until(lambda: len(house.s3.gets) == _WINDOW)
    # What lies in the transport's own buffers is bounded by it, and by the kernel's, which take 6 MB each way at most.
    assert sent < _WINDOW + 200
    house.s3.gate.set()
    for _ in range(3):
        assert (await call.read()).created
    call.cancel()
    await until(lambda: not house.keeper._writes)


async def test_who_hangs_up_gives_its_places_back(house: House, stub: Any) -> None:
    large = large_png(1, 1_100_000)
    for _ in range(4):
        house.s3.gate.clear()
        gets = len(house.s3.gets)
        messages = [incoming(n, f"prompt {n}", **({"data": large} if n % 3 else {})) for n in range(40)]
        call = stub.ImportImages(iter(messages))
        await until(lambda gets=gets: len(house.s3.gets) > gets)  # type: ignore[misc]  # mypy knows no default here
        call.cancel()
        house.s3.gate.set()
    async with asyncio.timeout(15):
        outcomes = await taken(stub, *(incoming(n, f"prompt {n}") for n in range(70)))
    assert reasons(outcomes) == [""] * 70


# --- exported identities ---


async def test_a_picture_whose_prompt_is_lost_comes_back_under_its_own_key(house: House, stub: Any) -> None:
    facts = public_pb.Image(
        model="gpt-image-2", quality="high", background="opaque", revised_prompt="a fox", seed=7, width=9, key="no"
    )
    [outcome] = await taken(stub, incoming(1, identity=identity_of(house, variant=3), facts=facts))
    assert outcome.key == house.identity()[1].key.with_variant(3).name
    [stored] = (await stub.ListImages(pb.ListImagesRequest())).images
    assert stored.identity == identity_of(house, variant=3)
    image = stored.image
    assert (image.model, image.quality, image.background, image.revised_prompt) == (
        "gpt-image-2",
        "high",
        "opaque",
        "a fox",
    )
    assert (image.seed, image.width, image.size, image.paid_microusd) == (7, 64, "64x48", 40_000)


async def test_a_number_that_is_taken_gives_way_to_the_next_free_one(house: House, stub: Any) -> None:
    await taken(stub, incoming(1))
    for _ in range(2):
        [outcome] = await taken(stub, incoming(2, identity=identity_of(house)))
        assert CacheKey.parse(outcome.key).variant == 1
    assert not outcome.created
    [outcome] = await taken(stub, incoming(3, identity=identity_of(house, variant=500)))
    assert CacheKey.parse(outcome.key).variant == 2


@pytest.mark.parametrize(
    ("fields", "violated"),
    [
        ({"key": "no key"}, "identity.key"),
        ({"key": CacheKey("elsewhere", bytes(16), bytes(16), 0).name}, "identity.key"),
        ({"digest": bytes(32)}, "identity.digest"),
        ({"digest": b"short"}, "identity.digest"),
        ({"prompt_digest": b""}, "identity.prompt_digest"),
    ],
)
async def test_an_identity_has_to_be_one_of_this_namespace(
    house: House, stub: Any, fields: dict[str, Any], violated: str
) -> None:
    [outcome] = await taken(stub, incoming(1, identity=identity_of(house, **fields)))
    assert violated in outcome.failure.violations


# --- lists ---


async def listed(stub: Any, **fields: Any) -> tuple[list[str], int]:
    """The keys of all pages, and how many pages there were."""
    keys: list[str] = []
    request, pages = pb.ListImagesRequest(**fields), 0
    while True:
        page = await stub.ListImages(request)
        pages += 1
        keys += [each.identity.key for each in page.images]
        if not page.next_page_token:
            return keys, pages
        request.page_token = page.next_page_token


async def test_what_is_stored_is_listed_in_pages_without_bytes(stub: Any) -> None:
    outcomes = await taken(stub, *(incoming(row, f"prompt {row}") for row in range(10)))
    keys, pages = await listed(stub, page_size=4)
    assert sorted(keys) == sorted(outcome.key for outcome in outcomes)
    assert pages == 3
    [image, *_] = (await stub.ListImages(pb.ListImagesRequest())).images
    assert not image.image.HasField("data")
    assert image.image.size_bytes in {len(small_image(row)) for row in range(10)}


async def test_a_namespace_lists_what_it_stored_and_no_other_of_its_partition(house: House) -> None:
    theirs = replace(house.namespace, name="theirs")
    async with connected(house, house.namespace, theirs) as stub:
        outcomes = await taken(stub, incoming(1), incoming(2, "a blue fox", namespace="theirs"))
        assert await listed(stub) == ([outcomes[0].key], 1)
        assert await listed(stub, namespace="theirs", page_size=1) == ([outcomes[1].key], 3)


async def test_expired_and_damaged_pictures_are_not_listed(house: House, tmp_path: Path) -> None:
    async with connected(house, replace(house.namespace, ttl_s=60.0)) as stub:
        await taken(stub, incoming(1), incoming(2, "a blue fox"))
        in_last_tier(tmp_path)[0].write_bytes(b"damaged")
        assert len((await listed(stub))[0]) == 1
        house.clock.advance(60)
        assert await listed(stub) == ([], 1)


async def test_a_list_fails_where_it_cannot_be_had(house: House, stub: Any) -> None:
    other = CacheKey("elsewhere", bytes(16), bytes(16), 0).name
    for fields in ({"page_token": "nonsense"}, {"page_size": 1001}, {"namespace": "nobody"}):
        assert (await failure(stub.ListImages(pb.ListImagesRequest(**fields)))).reason == "INVALID_FIELD"
    assert (await failure(stub.ListImages(pb.ListImagesRequest(page_token=page_token(other))))).fields.keys() == {
        "page_token"
    }
    house.s3.is_down = True
    failed = await failure(stub.ListImages(pb.ListImagesRequest()))
    assert (failed.code, failed.reason) == ("UNAVAILABLE", "TIER_UNREACHABLE")


async def test_memory_alone_keeps_nothing_for_good(house: House) -> None:
    service = images_service(house)
    service._images._imports._last = None  # type: ignore[attr-defined]  # a service without a lower tier
    async with serving(service) as address, calling(address) as stub:
        [outcome] = await taken(stub, incoming(1))
        assert outcome.failure.reason == "NOT_IMPLEMENTED"
        assert (await failure(stub.ListImages(pb.ListImagesRequest()))).code == "UNIMPLEMENTED"


# --- sources in buckets ---


@pytest.fixture
async def bucket(s3_server: S3Server) -> str:
    return await asyncio.to_thread(s3_server.new_bucket)


@pytest.fixture
async def objects(s3_server: S3Server, bucket: str) -> AsyncIterator[Objects]:
    objects = Objects(
        [bucket, "gone"],
        clock=SystemClock(),
        region=s3_server.region,
        endpoint=s3_server.endpoint,
        access_key=s3_server.access_key,
        secret_key=s3_server.secret_key,
    )
    yield objects
    await objects.aclose()


async def test_the_service_reads_an_object_of_an_open_bucket(
    house: House, s3_server: S3Server, bucket: str, objects: Objects
) -> None:
    data = small_image(1)
    await asyncio.to_thread(s3_server.client.put_object, Bucket=bucket, Key="old/füchse 1.png", Body=data)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    async with connected(house, objects=objects) as stub:
        [outcome] = await taken(stub, incoming(1, s3_uri=f"s3://{bucket}/old/füchse 1.png", digest=digest))
    assert outcome.created, outcome.failure
    assert (await house.get()).entry.image.data == data


async def test_an_object_that_may_not_be_had_is_told_apart(
    house: House, s3_server: S3Server, bucket: str, objects: Objects
) -> None:
    large = large_png(1, MAX_IMAGE_BYTES + 1)
    await asyncio.to_thread(s3_server.client.put_object, Bucket=bucket, Key="large.png", Body=large)
    uris = {
        f"s3://{s3_server.bucket}/secret.png": "is none of imports.buckets",
        f"s3://{bucket}/absent.png": "no such object",
        f"s3://{bucket}/large.png": "larger than",
        f"https://{bucket}/x.png": "must be s3://",
        f"s3://{bucket}/": "must be s3://",
    }
    async with connected(house, objects=objects) as stub:
        outcomes = await taken(stub, *(incoming(row, s3_uri=uri) for row, uri in enumerate(uris)))
    for outcome, words in zip(outcomes, uris.values(), strict=True):
        assert words in outcome.failure.violations["s3_uri"]


async def test_a_bucket_that_is_open_and_not_there_is_told_by_its_setting(house: House, objects: Objects) -> None:
    async with connected(house, objects=objects) as stub:
        [outcome] = await taken(stub, incoming(1, s3_uri="s3://gone/x.png"))
    assert outcome.failure.reason == "TIER_UNREACHABLE"
    assert "no such bucket; see imports.buckets" in outcome.failure.message


async def test_a_store_that_is_away_is_told_as_such(house: House, own_s3: Callable[[], S3Server]) -> None:
    server = await asyncio.to_thread(own_s3)
    objects = Objects(
        [server.bucket],
        clock=SystemClock(),
        region=server.region,
        endpoint=server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
    )
    await asyncio.to_thread(server.kill)
    async with connected(house, objects=objects) as stub:
        [outcome] = await taken(stub, incoming(1, s3_uri=f"s3://{server.bucket}/x.png"))
    assert outcome.failure.reason == "TIER_UNREACHABLE"
    await objects.aclose()
