"""The S3 tier keeps the contract on a real server, and says what is wrong when something is."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from random import Random
from typing import Any, ClassVar, cast

import httpx
import pytest
import pytest_asyncio
from xxhash import xxh3_128_hexdigest

from cacheserver.accounting.archive import ObjectArchive, pack, unpack
from cacheserver.errors import AccountsUnavailableError, CorruptEntryError, NewerEntryError, TierError, TierTimeoutError
from cacheserver.model import CacheKey, SourceObject, TierName
from cacheserver.tiers import codec
from cacheserver.tiers.guard import GuardedTier
from cacheserver.tiers.s3 import S3Tier
from cacheserver.tiers.s3_client import new_session
from cacheserver.tiers.s3_lifecycle import with_ours
from tests.fakes import FakeClock
from tests.servers import S3Server, TcpProxy
from tests.tier_contract import (
    MAX_ENTRY_BYTES,
    TierContract,
    as_public,
    guarded_tier,
    keys_of,
    make_entry,
    make_key,
    with_data,
)

LONG_PROMPT = "".join(chr(0x4E00 + (n * n) % 20_000) for n in range(5_000))
"""A revised prompt that no object's headers can hold."""


@asynccontextmanager
async def open_tier(server: S3Server, clock: FakeClock, **settings: Any) -> AsyncIterator[S3Tier]:
    """A tier with names of its own. Patient by default: a busy machine is no failure."""
    chosen = {
        "bucket": server.bucket,
        "prefix": f"test-{uuid.uuid4().hex}/",
        "region": server.region,
        "endpoint": server.endpoint,
        "access_key": server.access_key,
        "secret_key": server.secret_key,
        "connect_timeout_s": 5.0,
        "read_timeout_s": 20.0,
        "max_entry_bytes": MAX_ENTRY_BYTES,
        **settings,
    }
    tier = S3Tier(clock=clock, **chosen)
    yield tier
    await tier.aclose()


@pytest_asyncio.fixture
async def tier(s3_server: S3Server, clock: FakeClock) -> AsyncIterator[S3Tier]:
    async with open_tier(s3_server, clock) as tier:
        yield tier


def name_of(tier: S3Tier, key: CacheKey) -> str:
    return f"{tier._prefix}v1/{key.partition}/{key.fingerprint.hex()[:2]}/{key.name}"


def spoil(server: S3Server, tier: S3Tier, body: bytes | None = None, **metadata: str | None) -> None:
    """Write the object of make_key() again with another body or other metadata (None takes a header away)."""
    name = name_of(tier, make_key())
    old = server.client.get_object(Bucket=server.bucket, Key=name)
    headers = {**old["Metadata"], **{key.replace("_", "-"): value for key, value in metadata.items()}}
    server.client.put_object(
        Bucket=server.bucket,
        Key=name,
        Body=old["Body"].read() if body is None else body,
        Metadata={key: value for key, value in headers.items() if value is not None},
    )


def names_in(server: S3Server, tier: S3Tier) -> list[str]:
    listed = server.client.list_objects_v2(Bucket=server.bucket, Prefix=tier._prefix)
    return [item["Key"].removeprefix(tier._prefix) for item in listed.get("Contents", [])]


class TestS3Tier(TierContract):
    """The contract; the fixture above is its tier."""


class TestGuardedS3Tier(TierContract):
    @pytest.fixture
    def tier(self, tier: S3Tier, clock: FakeClock) -> GuardedTier:
        return guarded_tier(tier, clock)


async def test_it_says_which_tier_it_is(tier: S3Tier) -> None:
    assert tier.name is TierName.S3


async def test_the_object_is_the_plain_image(tier: S3Tier, s3_server: S3Server) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    stored = s3_server.client.get_object(Bucket=s3_server.bucket, Key=name_of(tier, entry.key), ChecksumMode="ENABLED")
    assert stored["Body"].read() == entry.image.data
    assert stored["ContentType"] == "image/png"
    assert stored["CacheControl"] == "private, max-age=31536000, immutable"
    assert stored["ChecksumCRC32"] == base64.b64encode(zlib.crc32(entry.image.data).to_bytes(4, "big")).decode()
    assert stored["Metadata"]["sha256"] == entry.image.sha256


async def test_short_metadata_needs_no_second_object(tier: S3Tier, s3_server: S3Server) -> None:
    await tier.put(make_key(), make_entry(revised_prompt="A cat that sits in the sun. " * 40), replace=False)
    assert len(names_in(s3_server, tier)) == 1


async def test_long_metadata_goes_and_comes_with_its_object(tier: S3Tier, s3_server: S3Server) -> None:
    long, short = make_entry(revised_prompt=LONG_PROMPT), make_entry(data=b"other")
    await tier.put(long.key, long, replace=False)
    assert len(names_in(s3_server, tier)) == 2
    await tier.put(long.key, long, replace=False)  # a second writer of the same leaves what the first needs
    assert await tier.get(long.key) == long
    assert not await tier.put(long.key, with_data(long, b"lost"), replace=False)
    assert len(names_in(s3_server, tier)) == 2
    assert await tier.get(long.key) == long
    await tier.put(long.key, short, replace=True)
    assert len(names_in(s3_server, tier)) == 1


@pytest.mark.parametrize("damage", ["gone", "other", "bomb"])
async def test_a_damaged_sidecar_is_damage_and_mended(tier: S3Tier, s3_server: S3Server, damage: str) -> None:
    entry = make_entry(revised_prompt=LONG_PROMPT)
    await tier.put(entry.key, entry, replace=False)
    (sidecar,) = [name for name in names_in(s3_server, tier) if ".meta." in name]
    if damage == "gone":
        s3_server.client.delete_object(Bucket=s3_server.bucket, Key=tier._prefix + sidecar)
    if damage == "other":
        s3_server.client.put_object(Bucket=s3_server.bucket, Key=tier._prefix + sidecar, Body=b"{}")
    if damage == "bomb":
        bomb = zlib.compress(bytes(50_000_000))
        image = name_of(tier, entry.key)
        s3_server.client.put_object(Bucket=s3_server.bucket, Key=f"{image}.meta.{xxh3_128_hexdigest(bomb)}", Body=bomb)
        spoil(s3_server, tier, sidecar=xxh3_128_hexdigest(bomb))
    with pytest.raises(CorruptEntryError):
        await tier.get(entry.key)
    assert await tier.labels(entry.key) is None
    assert await tier.put(entry.key, entry, replace=False)
    assert await tier.get(entry.key) == entry


SPOILS: dict[str, dict[str, Any]] = {
    "bit flipped": {"body": b"\x89PNG a cau"},
    "cut short": {"body": b"\x89PNG a c"},
    "too long": {"body": b"\x89PNG a cat."},
    "not an entry": {"codec_version": None, "entry": None, "sha256": None},
    "version lost": {"codec_version": None},
    "version garbled": {"codec_version": "one"},
    "version zero": {"codec_version": "0"},
    "metadata lost": {"entry": None},
    "metadata not base64": {"entry": "!"},
    "metadata not compressed": {"entry": base64.b64encode(b"{}").decode()},
    "metadata cut": {"entry": base64.b64encode(zlib.compress(b"{}")[:-2]).decode()},
    "metadata empty": {"entry": base64.b64encode(zlib.compress(b"{}")).decode()},
    "metadata a bomb": {"entry": base64.b64encode(zlib.compress(bytes(1_000_000), 9)).decode()},
}


@pytest.mark.parametrize("kind", SPOILS)
async def test_a_damaged_object_is_damage_and_mended(tier: S3Tier, s3_server: S3Server, kind: str) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    spoil(s3_server, tier, **SPOILS[kind])
    with pytest.raises(CorruptEntryError):
        await tier.get(entry.key)
    assert await tier.put(entry.key, with_data(entry, b"new"), replace=False)
    assert await tier.get(entry.key) == with_data(entry, b"new")


async def test_of_many_writers_who_mend_one_wins(tier: S3Tier, s3_server: S3Server) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    spoil(s3_server, tier, body=b"damage")
    writers = [with_data(entry, b"writer %d" % n) for n in range(4)]
    won = await asyncio.gather(*(tier.put(entry.key, writer, replace=False) for writer in writers))
    assert won.count(True) == 1
    assert await tier.get(entry.key) == writers[won.index(True)]


async def test_an_object_larger_than_any_entry_is_damage(tier: S3Tier, s3_server: S3Server) -> None:
    await tier.put(make_key(), make_entry(), replace=False)
    spoil(s3_server, tier, body=bytes(MAX_ENTRY_BYTES + 1))
    with pytest.raises(CorruptEntryError, match="more than an entry can"):
        await tier.get(make_key())


async def test_a_newer_entry_is_unknown_and_stays(tier: S3Tier, s3_server: S3Server) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    spoil(s3_server, tier, body=b"a layout of tomorrow", codec_version=str(max(codec.LAYOUTS) + 1))
    for call in (tier.get(entry.key), tier.put(entry.key, entry, replace=False), tier.labels(entry.key)):
        with pytest.raises(NewerEntryError):
            await call
    stored = s3_server.client.get_object(Bucket=s3_server.bucket, Key=name_of(tier, entry.key))
    assert stored["Body"].read() == b"a layout of tomorrow"


async def test_of_many_replacing_writers_a_winner_is_what_stays(tier: S3Tier) -> None:
    await tier.put(make_key(), make_entry(), replace=False)
    writers = [with_data(make_entry(), b"writer %d" % n) for n in range(8)]
    won = await asyncio.gather(*(tier.put(make_key(), writer, replace=True) for writer in writers))
    assert await tier.get(make_key()) in [writer for writer, has_won in zip(writers, won, strict=True) if has_won]


async def test_replacing_mends_damage(tier: S3Tier, s3_server: S3Server) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    spoil(s3_server, tier, body=b"damage")
    assert await tier.put(entry.key, entry, replace=True)
    assert await tier.get(entry.key) == entry


@pytest.mark.no_cover
async def test_scan_reads_every_page(tier: S3Tier, s3_server: S3Server) -> None:
    names = [name_of(tier, make_key("a", variant=n)) for n in range(1_100)]
    await asyncio.gather(
        *(asyncio.to_thread(s3_server.client.put_object, Bucket=s3_server.bucket, Key=name, Body=b"") for name in names)
    )
    assert len(await keys_of(tier, "studio")) == 1_100


@pytest.fixture
def pages_of_fifty(tier: S3Tier, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Pages small enough for a test to need many, and how often which call was made."""
    calls: Counter[str] = Counter()
    clients = tier._clients

    def counted(call: Callable[..., Any], name: str, **fixed: Any) -> Callable[..., Any]:

        def count(**arguments: Any) -> Any:
            calls[name] += 1
            return call(**arguments, **fixed)

        return count

    pages = counted(clients.reading.list_objects_v2, "list_objects_v2", MaxKeys=50)
    monkeypatch.setattr(clients.reading, "list_objects_v2", pages)
    monkeypatch.setattr(clients.reads, "head_object", counted(clients.reads.head_object, "head_object"))
    return calls


def put_all(server: S3Server, names: Iterable[str]) -> None:
    def put(name: str) -> None:
        server.client.put_object(Bucket=server.bucket, Key=name, Body=b"")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, names))


@pytest.mark.no_cover
async def test_find_by_pages_says_what_heads_say(
    tier: S3Tier, s3_server: S3Server, pages_of_fifty: Counter[str]
) -> None:
    rng = Random(7)  # noqa: S311 - what to store and ask for in a test
    keys = [
        key
        for n in range(250)
        for variant in (0, 1, 2, 10)
        for key in (make_key(f"prompt {n}", variant=variant), make_key(f"prompt {n}", variant=variant).stand_in)
    ]
    elsewhere = [make_key(f"prompt {n}", partition=partition) for n in range(60) for partition in ("st", "studio-2")]
    names = [name_of(tier, key) for key in (*rng.sample(keys, 500), *elsewhere[::2])]
    sidecars = [f"{name_of(tier, key)}.meta.{xxh3_128_hexdigest(key.name.encode())}" for key in rng.sample(keys, 150)]
    await asyncio.to_thread(put_all, s3_server, [*names, *sidecars])
    for share in (140, 400, 900):
        asked = [*rng.choices(keys, k=share), *rng.sample(elsewhere, 40)]
        asked = [as_public(key) if rng.random() < 0.5 else key for key in asked]
        heads = await tier._run("find", tier._heads, [name_of(tier, key) for key in asked])
        pages_of_fifty.clear()
        assert await tier.find(asked) == heads
        assert 0 < heads.count(True) < len(heads)
        assert pages_of_fifty["list_objects_v2"] > 0
        assert pages_of_fifty["list_objects_v2"] * 12.5 + pages_of_fifty["head_object"] < len(set(asked))


async def test_what_others_put_beside_our_objects_is_no_hit_and_hides_none(
    tier: S3Tier, s3_server: S3Server, pages_of_fifty: Counter[str]
) -> None:
    keys = [make_key(f"prompt {n}") for n in range(300)]
    folder = f"{tier._prefix}v1/studio/"
    foreign = [f"{folder}{part}{end}" for part in ("0", "4b", "80", "fe") for end in (".txt", "-1/x", "/!", "/~/y")]
    await asyncio.to_thread(put_all, s3_server, [*(name_of(tier, key) for key in keys[::2]), *foreign])
    assert await tier.find(keys) == [n % 2 == 0 for n in range(300)]
    assert pages_of_fifty["list_objects_v2"] > 0


@pytest.mark.no_cover
async def test_a_bucket_too_full_for_pages_is_asked_key_by_key(
    tier: S3Tier, s3_server: S3Server, pages_of_fifty: Counter[str]
) -> None:
    stored = [make_key(f"other {n}") for n in range(900)]
    await asyncio.to_thread(put_all, s3_server, [name_of(tier, key) for key in stored])
    asked = [*stored[:70], *(make_key(f"prompt {n}") for n in range(70))]
    assert await tier.find(asked) == [n < 70 for n in range(140)]
    assert pages_of_fifty["list_objects_v2"] == 1
    assert pages_of_fifty["head_object"] >= 127


async def test_a_signed_url_shows_the_picture(tier: S3Tier) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    async with httpx.AsyncClient() as browser:
        shown = await browser.get(await tier.signed_url(entry, 60))
        assert (shown.status_code, shown.content) == (200, entry.image.data)
        assert shown.headers["content-type"] == "image/png"
        bare = await browser.get((await tier.signed_url(entry, 60)).partition("?")[0])
        assert bare.status_code == 403


async def test_what_s3_has_not_acknowledged_is_written_before_it_is_signed(tier: S3Tier) -> None:
    entry = make_entry()
    async with httpx.AsyncClient() as browser:
        assert (await browser.get(await tier.signed_url(entry, 60))).content == entry.image.data


async def test_no_url_is_signed_that_would_show_another_picture(tier: S3Tier) -> None:
    entry = make_entry()
    await tier.put(entry.key, with_data(entry, b"other"), replace=False)
    with pytest.raises(TierError, match="another picture"):
        await tier.signed_url(entry, 60)


async def test_urls_are_signed_for_the_endpoint_that_callers_know(s3_server: S3Server, clock: FakeClock) -> None:
    public = f"http://localhost:{s3_server.port}"
    async with open_tier(s3_server, clock, public_endpoint=public) as tier:
        entry = make_entry()
        url = await tier.signed_url(entry, 60)
        assert url.startswith(public + "/")
        async with httpx.AsyncClient() as browser:
            assert (await browser.get(url)).content == entry.image.data


async def _each_call(tier: S3Tier) -> list[TierError]:
    """What every call raises, all of which must."""
    key, entry = make_key(), make_entry()
    errors = []
    calls: list[Awaitable[object]] = [
        tier.get(key),
        tier.put(key, entry, replace=False),
        tier.put(key, entry, replace=True),
        tier.signed_url(entry, 60),
        tier.ping(),
    ]
    for call in calls:
        with pytest.raises(TierError) as caught:
            await call
        errors.append(caught.value)
    return errors


async def test_wrong_credentials_are_said_without_being_said(s3_server: S3Server, clock: FakeClock) -> None:
    for wrong in ({"secret_key": "battery-staple"}, {"access_key": "battery"}):
        async with open_tier(s3_server, clock, **wrong) as tier:
            errors = await _each_call(tier)
            for call in (tier.find([make_key()]), tier.labels(make_key()), tier.delete(make_key())):
                with pytest.raises(TierError, match="403"):
                    await call
            assert all("credentials" in str(error) and "battery" not in str(error) for error in errors)
            assert "battery" not in repr(tier)


async def test_a_missing_bucket_is_unknown_and_named(s3_server: S3Server, clock: FakeClock) -> None:
    async with open_tier(s3_server, clock, bucket="no-such-bucket") as tier:
        assert all("no such bucket; see s3.bucket" in str(error) for error in await _each_call(tier))


async def test_a_bucket_name_that_cannot_be_is_unknown(s3_server: S3Server, clock: FakeClock) -> None:
    async with open_tier(s3_server, clock, bucket="no such bucket") as tier:
        await _each_call(tier)


async def test_no_credentials_are_said(s3_server: S3Server, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    async with open_tier(s3_server, clock, access_key=None, secret_key=None) as tier:
        with pytest.raises(TierError, match="AWS_ACCESS_KEY_ID"):
            await tier.ping()


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://host", "http://", "https://host/path", "https://a b"])
async def test_an_endpoint_that_cannot_be_is_refused(endpoint: str, clock: FakeClock) -> None:
    with pytest.raises(ValueError, match="an S3 endpoint is"):
        S3Tier(bucket="images", clock=clock, endpoint=endpoint)


async def test_a_server_that_is_down_is_unknown_and_one_that_is_back_answers(
    own_s3: Callable[[], S3Server], clock: FakeClock
) -> None:
    server = own_s3()
    hasty = open_tier(server, clock, read_timeout_s=0.5, write_timeout_s=0.5)
    async with open_tier(server, clock) as patient, hasty as tier:
        await patient.put(make_key(), make_entry(), replace=False)
        server.stop()
        with pytest.raises(TierTimeoutError):
            await tier.get(make_key())
        with pytest.raises(TierTimeoutError):
            await tier.put(make_key(), make_entry(), replace=False)
        server.cont()
        server.kill()
        assert all("cannot be reached" in str(error) for error in await _each_call(tier))
        await asyncio.to_thread(server.start)
        assert await patient.get(make_key()) == make_entry()


async def test_an_answer_cut_short_is_unknown_and_a_put_may_be_repeated(s3_server: S3Server, clock: FakeClock) -> None:
    entry = make_entry(data=bytes(MAX_ENTRY_BYTES))
    async with (
        TcpProxy("127.0.0.1", s3_server.port) as proxy,
        open_tier(s3_server, clock, endpoint=f"http://127.0.0.1:{proxy.port}") as tier,
    ):
        proxy.cut_after(10)
        with pytest.raises(TierError):
            await tier.put(entry.key, entry, replace=False)
        proxy.resume()
        assert await tier.put(entry.key, entry, replace=False)
        proxy.cut_after(50_000)
        with pytest.raises(TierError):
            await tier.get(entry.key)
        proxy.resume()
        assert await tier.get(entry.key) == entry


async def test_a_connection_that_went_stale_costs_no_call(s3_server: S3Server, clock: FakeClock) -> None:
    async with (
        TcpProxy("127.0.0.1", s3_server.port) as proxy,
        open_tier(s3_server, clock, endpoint=f"http://127.0.0.1:{proxy.port}") as tier,
    ):
        await tier.put(make_key(), make_entry(), replace=False)
        await tier.get(make_key())
        proxy.cut()
        proxy.resume()
        assert await tier.get(make_key()) == make_entry()


async def test_a_probe_that_hangs_keeps_its_thread_no_longer_than_a_read(s3_server: S3Server, clock: FakeClock) -> None:
    async with (
        TcpProxy("127.0.0.1", s3_server.port) as proxy,
        open_tier(s3_server, clock, endpoint=f"http://127.0.0.1:{proxy.port}", read_timeout_s=0.1) as tier,
    ):
        proxy.hang()
        with pytest.raises(TierTimeoutError):
            await asyncio.wait_for(tier.ping(), timeout=5)


@asynccontextmanager
async def answering(*answers: bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """The endpoint of a server that gives these answers, one per request, whatever it is asked; the last for ever."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await reader.readexactly(int(length[0].split(b":")[1]) if length else 0)
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, bytes):
            writer.write(answer)
        else:
            await answer(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def http(status: int, code: str = "", headers: str = "") -> bytes:
    body = f"<Error><Code>{code}</Code><Message>about {make_key().name}</Message></Error>" if code else ""
    return f"HTTP/1.1 {status} -\r\n{headers}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize("answer", [http(500, "InternalError"), http(503, "SlowDown"), http(502), b"nonsense\r\n"])
async def test_a_server_that_fails_is_unknown_and_no_key_is_repeated(
    s3_server: S3Server, clock: FakeClock, answer: bytes
) -> None:
    async with answering(answer) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        errors = await _each_call(tier)
        for call in (tier.find([make_key()]), tier.labels(make_key()), tier.delete(make_key()), keys_of(tier, "p")):
            with pytest.raises(TierError) as caught:
                await call
            errors.append(caught.value)
        assert not any(make_key().name in str(error) for error in errors)


CONFLICT = http(409, "ConditionalRequestConflict")
CHANGED = http(412, "PreconditionFailed")
STORED = http(200, headers='ETag: "new"\r\n')
ABSENT = http(404, "NoSuchKey")


async def test_a_conflict_of_conditions_is_tried_again(s3_server: S3Server, clock: FakeClock) -> None:
    async with answering(CONFLICT, STORED) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        assert await tier.put(make_key(), make_entry(), replace=False)


async def test_a_conflict_without_end_is_unknown(s3_server: S3Server, clock: FakeClock) -> None:
    async with answering(CONFLICT) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        with pytest.raises(TierError, match="keep S3 from deciding"):
            await tier.put(make_key(), make_entry(), replace=False)


async def test_an_object_that_comes_and_goes_is_written_in_the_end(s3_server: S3Server, clock: FakeClock) -> None:
    async with (
        answering(CHANGED, ABSENT, STORED) as endpoint,
        open_tier(s3_server, clock, endpoint=endpoint) as tier,
    ):
        assert await tier.put(make_key(), make_entry(), replace=False)
    async with (
        answering(*[CHANGED, ABSENT] * 4) as endpoint,
        open_tier(s3_server, clock, endpoint=endpoint) as tier,
    ):
        with pytest.raises(TierError, match="changed each time"):
            await tier.put(make_key(), make_entry(), replace=False)


async def test_replacing_what_is_deleted_meanwhile_is_lost(s3_server: S3Server, clock: FakeClock) -> None:
    seen = http(200, headers='ETag: "old"\r\n')
    async with answering(seen, ABSENT, ABSENT) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        assert not await tier.put(make_key(), make_entry(), replace=True)


async def test_a_body_that_drips_is_given_up_at_the_deadline(s3_server: S3Server, clock: FakeClock) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 -\r\nETag: "x"\r\nContent-Length: 50000000\r\n\r\n')
        for _ in range(20):
            writer.write(bytes(2_500_000))
            await writer.drain()
            clock.advance(1)

    async with (
        answering(drip) as endpoint,
        open_tier(s3_server, clock, endpoint=endpoint, max_entry_bytes=50_000_000, read_timeout_s=5.0) as tier,
    ):
        with pytest.raises(TierTimeoutError, match="within 5 s"):
            await tier.get(make_key())


async def test_a_small_body_that_drips_is_given_up_at_the_deadline_too(s3_server: S3Server, clock: FakeClock) -> None:
    sent, ended = 0, asyncio.Event()

    async def drip(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b'HTTP/1.1 200 -\r\nETag: "x"\r\nContent-Length: 1000000\r\n\r\n')
        with suppress(ConnectionError):
            while sent < 100_000:
                writer.write(b"x")
                await writer.drain()
                clock.advance(1)
                sent += 1
                await asyncio.sleep(0)  # to drain gives nobody a turn while there is room
        writer.close()
        ended.set()

    async with (
        answering(drip) as endpoint,
        open_tier(s3_server, clock, endpoint=endpoint, max_entry_bytes=1_000_000, read_timeout_s=5.0) as tier,
    ):
        with pytest.raises(TierTimeoutError, match="within 5 s"):
            await tier.get(make_key())
        await ended.wait()
    assert sent < 100_000


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 200 -\r\nETag: "x"\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n',
        b'HTTP/1.1 200 -\r\nETag: "x"\r\nContent-Length: many\r\n\r\nabc',
        b'HTTP/1.1 200 -\r\nETag: "x"\r\nLast-Modified: lately\r\nContent-Length: 3\r\n\r\nabc',
        b"HTTP/1.1 200 -\r\nContent-Length: 3\r\n\r\nabc",
        b'HTTP/1.1 200 -\r\nETag: "x"\r\nContent-Length: 3\r\n\r\na',
        b"HTTP/1.1 200 -\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<p>hi<",
    ],
    ids=["no length", "a length that is none", "a date that is none", "no version", "a short body", "a web page"],
)
async def test_an_answer_that_is_not_s3s_is_unknown(s3_server: S3Server, clock: FakeClock, answer: bytes) -> None:
    async with answering(answer) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        for call in (tier.get(make_key()), tier.labels(make_key()), tier.put(make_key(), make_entry(), replace=True)):
            with suppress(TierError):
                assert await call is None
        with pytest.raises(TierError):
            await tier.get(make_key())
        with suppress(TierError):
            assert await keys_of(tier, "studio") == set()


async def test_a_connection_whose_body_was_read_is_used_again(s3_server: S3Server, clock: FakeClock) -> None:
    connections = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with suppress(asyncio.IncompleteReadError), closing(writer):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b'HTTP/1.1 200 -\r\nETag: "x"\r\nContent-Length: 5\r\n\r\nhello')

    server = await asyncio.start_server(count, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        for _ in range(3):
            assert await tier.read_file("a", 5) == b"hello"
    assert connections == 1


async def test_a_cancelled_put_goes_on_and_closing_waits_for_it(s3_server: S3Server, clock: FakeClock) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hold(writer: asyncio.StreamWriter) -> None:
        asked.set()
        await go_on.wait()
        writer.write(STORED)

    async with answering(hold) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        put = asyncio.create_task(tier.put(make_key(), make_entry(), replace=False))
        await asked.wait()
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put
        closing = asyncio.create_task(tier._workers.aclose(60))
        _, waiting = await asyncio.wait({closing}, timeout=0.05)
        assert waiting
        go_on.set()
        await closing


def source_in(server: S3Server, data: bytes) -> SourceObject:
    """A picture that lies in another bucket of the same store."""
    bucket = server.new_bucket()
    etag = server.client.put_object(Bucket=bucket, Key="old/fox.png", Body=data)["ETag"]
    return SourceObject(bucket, "old/fox.png", etag, data)


async def test_a_picture_of_the_same_store_is_copied_with_its_own_metadata(tier: S3Tier, s3_server: S3Server) -> None:
    for entry in (make_entry(), make_entry(make_key("a dog"), revised_prompt=LONG_PROMPT)):
        source = source_in(s3_server, entry.image.data)
        assert await tier.copy(entry.key, entry, source)
        assert await tier.get(entry.key) == entry
    stored = s3_server.client.head_object(Bucket=s3_server.bucket, Key=name_of(tier, make_key()))
    assert (stored["ContentType"], stored["CacheControl"]) == ("image/png", "private, max-age=31536000, immutable")


async def test_what_is_copied_is_not_sent(tier: S3Tier, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = make_entry()
    source = source_in(s3_server, entry.image.data)
    await tier.ping()
    monkeypatch.setattr(tier, "_write", lambda *_: pytest.fail("it was sent"))
    assert await tier.copy(entry.key, entry, source)


async def test_a_source_that_has_changed_since_is_not_copied(tier: S3Tier, s3_server: S3Server) -> None:
    entry = make_entry()
    source = source_in(s3_server, entry.image.data)
    s3_server.client.put_object(Bucket=source.bucket, Key=source.name, Body=b"another picture")
    assert await tier.copy(entry.key, entry, source)
    assert await tier.get(entry.key) == entry


async def test_a_copy_never_takes_the_place_of_another_picture(tier: S3Tier, s3_server: S3Server) -> None:
    first, second = make_entry(), with_data(make_entry(), b"another")
    assert await tier.put(first.key, first, replace=False)
    assert not await tier.copy(second.key, second, source_in(s3_server, second.image.data))
    assert await tier.copy(first.key, first, source_in(s3_server, first.image.data))
    assert await tier.get(first.key) == first


async def test_files_lie_beside_the_entries_and_are_none(s3_server: S3Server, clock: FakeClock) -> None:
    async with open_tier(s3_server, clock) as tier:
        await tier.write_file("figures/b", b"old")
        await tier.write_file("figures/b", b"new")
        await tier.write_file("figures/a", b"")
        assert await tier.files("figures/") == ["figures/a", "figures/b"]
        assert await tier.read_file("figures/b", 3) == b"new"
        assert await tier.read_file("figures/c", 3) is None
        with pytest.raises(CorruptEntryError, match="3 bytes"):
            await tier.read_file("figures/b", 2)
        assert [key async for key in tier.scan("figures")] == []


async def test_old_figures_are_files_of_object_storage(s3_server: S3Server, clock: FakeClock) -> None:
    async with open_tier(s3_server, clock) as tier:
        archive = ObjectArchive(tier)
        assert await archive.days() == []
        await archive.write("2026-05-02", pack({0: {"one": "1"}}))
        await archive.write("2026-05-01", b"x")
        await tier.write_file("figures/notes.txt", b"no day")
        assert await archive.days() == ["2026-05-01", "2026-05-02"]
        assert unpack("2026-05-02", await archive.read("2026-05-02")) == {0: {"one": "1"}}
        assert await archive.read("2026-05-03") is None


async def test_old_figures_that_cannot_be_asked_for_say_so(clock: FakeClock, s3_server: S3Server) -> None:
    async with open_tier(s3_server, clock, endpoint="http://127.0.0.1:1", connect_timeout_s=0.2) as tier:
        with pytest.raises(AccountsUnavailableError, match="Object storage"):
            await ObjectArchive(tier).days()


@pytest.mark.parametrize(
    "spelled", ["2009-10-12T17:50:00.000Z", "Mon, 12 Oct 2009 17:50:00 GMT", 1255369800, "1255369800"]
)
def test_dates_are_understood_in_each_form_that_s3_knows(spelled: str | int) -> None:
    core = new_session("key", "secret")._session
    read = core.get_component("response_parser_factory").create_parser("rest-xml")._timestamp_parser
    assert read(spelled) == dt.datetime(2009, 10, 12, 17, 50, tzinfo=dt.UTC)


class TestLifecycleRule:
    THEIRS: ClassVar[dict[str, Any]] = {
        "ID": "theirs",
        "Status": "Enabled",
        "Filter": {"Prefix": "logs/"},
        "Expiration": {"Days": 7},
    }

    def rules(self, s3_server: S3Server, bucket: str) -> list[Any]:
        return list(s3_server.client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"])

    async def test_the_bucket_gets_it_for_our_prefix(self, s3_server: S3Server, clock: FakeClock) -> None:
        bucket = s3_server.new_bucket()
        async with open_tier(s3_server, clock, bucket=bucket, prefix="shop/") as tier:
            await tier.expire_after(30)
        [rule] = self.rules(s3_server, bucket)
        assert (rule["ID"], rule["Status"]) == ("cacheserver shop/v1/", "Enabled")
        assert (rule["Filter"], rule["Expiration"]) == ({"Prefix": "shop/v1/"}, {"Days": 30})

    async def test_others_stay_and_ours_is_there_once(self, s3_server: S3Server, clock: FakeClock) -> None:
        bucket = s3_server.new_bucket()
        s3_server.client.put_bucket_lifecycle_configuration(
            Bucket=bucket, LifecycleConfiguration={"Rules": [cast("Any", self.THEIRS)]}
        )
        for prefix, days in (("a/", 30), ("b/", 40), ("a/", 30), ("a/", 50)):
            async with open_tier(s3_server, clock, bucket=bucket, prefix=prefix) as tier:
                await tier.expire_after(days)
        found = {rule["ID"]: rule["Expiration"]["Days"] for rule in self.rules(s3_server, bucket)}
        assert found == {"theirs": 7, "cacheserver a/v1/": 50, "cacheserver b/v1/": 40}

    async def test_a_bucket_that_cannot_be_told_is_an_error_of_the_tier(
        self, s3_server: S3Server, clock: FakeClock
    ) -> None:
        async with open_tier(s3_server, clock, bucket="no-such-bucket") as tier:
            with pytest.raises(TierError):
                await tier.expire_after(30)

    def test_a_rule_that_is_there_already_is_not_set_again(self) -> None:
        rules = with_ours([self.THEIRS], prefix="a/", days=3)
        assert rules is not None
        assert rules[0] == self.THEIRS
        assert with_ours(rules, prefix="a/", days=3) is None
