"""An upgrade pays for nothing that is cached, and overwrites nothing: replicas of two releases on one Redis and S3."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cacheserver
from cacheserver.control.replays import LocalReplays
from cacheserver.epochs import Epochs
from cacheserver.errors import ConfigError, EntryNewerError, KeyGoneError
from cacheserver.identity import PROFILES, VERSIONS, identify
from cacheserver.model import AnswerFrom, CachePolicy, MatchLevel, Served, Terms, TierName, VariantPolicy
from cacheserver.renditions.renderer import ThreadRenderer
from cacheserver.settings import load_settings
from cacheserver.tiers import codec
from cacheserver.tiers.redis_client import connect, disconnect
from tests.emulated import ServiceProcess, in_its_own_process
from tests.fakes import FakeClock
from tests.house import EVERYTHING, House, open_tier
from tests.next_release import CODEC, IDENTITY
from tests.provider import OpenAIStandIn
from tests.running import ask, environment
from tests.servers import S3Server, ValkeyServer
from tests.tier_contract import make_entry
from tests.waiting import until

ROOT = Path(cacheserver.__file__).parent.parent
THIS_RELEASE = (str(Path(sys.executable).with_name("cacheserver")),)
NEXT_RELEASE = (sys.executable, "-m", "tests.next_release")
PROMPTS = [f"please paint fox {number}" for number in range(8)]
RAISED = {"CACHESERVER_IDENTITY__WRITE_VERSION": "2", "CACHESERVER_CODEC__WRITE_VERSION": "2"}


class Fleet:
    """Three replicas, each replaced at will by one of another release or with other settings."""

    def __init__(self, directory: Path, env: dict[str, str], redis: ValkeyServer, s3: S3Server) -> None:
        self._directory = directory
        self._env = env
        self._redis = redis
        self._s3 = s3
        self._stacks: dict[int, AsyncExitStack] = {}
        self.replicas: dict[int, ServiceProcess] = {}

    async def replace(self, number: int, command: Sequence[str], **settings: str) -> None:
        """End the replica of this number, and start one of this release."""
        await self.end(number)
        data_dir = self._directory / f"replica-{number}"
        data_dir.mkdir(exist_ok=True)
        env = {**self._env, "CACHESERVER_DATA_DIR": str(data_dir), "PYTHONPATH": str(ROOT), **settings}
        stack = self._stacks[number] = AsyncExitStack()
        self.replicas[number] = await stack.enter_async_context(in_its_own_process(env, "", command))

    async def end(self, number: int) -> None:
        self.replicas.pop(number, None)
        if (stack := self._stacks.pop(number, None)) is not None:
            await stack.aclose()

    async def aclose(self) -> None:
        for number in list(self._stacks):
            await self.end(number)

    async def everywhere(self, prompt: str, **fields: object) -> list[bytes]:
        """The picture that every replica gives for a prompt asked for at all of them at once."""
        calls = (each.stub.GetImage(ask(prompt, **fields)) for each in self.replicas.values())
        return [answer.images[0].data for answer in await asyncio.gather(*calls)]

    def in_s3(self) -> dict[str, str]:
        """The version (ETag) of every entry in S3, by its key."""
        page = self._s3.client.list_objects_v2(
            Bucket=self._s3.bucket, Prefix=f"{self._env['CACHESERVER_S3_PREFIX']}v1/"
        )
        return {item["Key"].rpartition("/")[2]: item["ETag"] for item in page.get("Contents", [])}

    def codec_versions(self) -> set[str]:
        """The codec versions that entries in S3 are written in."""
        folder = f"{self._env['CACHESERVER_S3_PREFIX']}v1/default/"
        names = [f"{folder}{key.split('.')[2][:2]}/{key}" for key in self.in_s3()]
        heads = [self._s3.client.head_object(Bucket=self._s3.bucket, Key=name) for name in names]
        return {head["Metadata"]["codec-version"] for head in heads}

    async def empty_redis(self) -> None:
        """Take every entry out of Redis, and leave control state where it is."""
        client = connect(self._redis.url, timeout_s=5.0, connect_timeout_s=5.0)
        names = [name async for name in client.scan_iter(match=f"{self._env['CACHESERVER_REDIS__PREFIX']}{{v1.*")]
        assert await client.delete(*names) > 0
        await disconnect(client)


@pytest.fixture
async def fleet(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer, s3_server: S3Server
) -> AsyncIterator[Fleet]:
    env = environment(tmp_path, provider=provider, redis=valkey_server, s3=s3_server)
    fleet = Fleet(tmp_path, env, valkey_server, s3_server)
    yield fleet
    await fleet.aclose()


@pytest.mark.timeout(300)
async def test_a_rolling_upgrade_and_raising_the_versions_pay_for_nothing_and_overwrite_nothing(
    fleet: Fleet, provider: OpenAIStandIn
) -> None:
    for number in range(3):
        await fleet.replace(number, THIS_RELEASE)
    cached = {prompt: (await fleet.everywhere(prompt))[0] for prompt in PROMPTS}
    await until(lambda: len(fleet.in_s3()) == len(PROMPTS))
    stored, calls = fleet.in_s3(), provider.calls
    assert calls == len(PROMPTS)

    async def traffic() -> None:
        """Everything that is cached is asked for at every replica there is; one that comes meanwhile may not be."""
        for prompt, picture in cached.items():
            assert set(await fleet.everywhere(prompt)) == {picture}

    async def replaced(number: int, command: Sequence[str], **settings: str) -> None:
        await fleet.end(number)
        await asyncio.gather(traffic(), fleet.replace(number, command, **settings))
        await traffic()
        assert provider.calls == calls
        assert stored.items() <= fleet.in_s3().items()

    for number in range(3):
        await replaced(number, NEXT_RELEASE)
    assert (fleet.in_s3(), fleet.codec_versions()) == (stored, {"1"})
    await fleet.empty_redis()
    for number in range(3):
        await replaced(number, NEXT_RELEASE, **RAISED)
        # Both versions are written now: what is new is paid for once all the same.
        new = f"please paint owl {number}"
        (cached[new],) = set(await fleet.everywhere(new))
        calls += 1
        assert provider.calls == calls
    await until(lambda: len(fleet.in_s3().keys() - stored.keys()) >= len(cached))
    assert set(await fleet.everywhere("paint fox 0")) == {cached[PROMPTS[0]]}, "carried on under the new identity"
    assert (provider.calls, stored.items() <= fleet.in_s3().items()) == (calls, True)
    assert fleet.codec_versions() == {"1", "2"}


# ── identity ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """This release knows version 2 of the identity, which leaves "please" out."""
    monkeypatch.setitem(VERSIONS, 2, IDENTITY)


def writes(house: House, version: int) -> None:
    """From now on the service is one that writes this version, in a new process."""
    house.namespace = replace(house.namespace, identity_version=version)
    house.restart()


@pytest.mark.usefixtures("two_versions")
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
async def test_a_picture_of_another_version_is_carried_on_and_found_in_one_step_then(
    house: House, before: int, after: int
) -> None:
    writes(house, before)
    made = await house.get("please a fox")
    await house.settle()
    writes(house, after)
    found = await house.get("please a fox")
    assert (found.entry.image.data, found.tier, found.cost_microusd) == (made.entry.image.data, TierName.REDIS, 0)
    assert found.entry.key != made.entry.key
    await house.settle()
    writes(house, after)
    house.redis.gets.clear()
    again = await house.get("please a fox")
    assert (again.entry, house.redis.gets) == (found.entry, [found.entry.key.name])
    assert house.upstream.calls == 1


@pytest.mark.usefixtures("two_versions")
async def test_nothing_else_is_looked_for_where_a_tier_has_the_picture_or_its_profile_has_not_changed(
    house: House,
) -> None:
    writes(house, 2)
    made = await house.get("a fox")
    await house.settle()
    house.restart()
    house.s3.gets.clear()
    await house.get("a fox")
    assert house.s3.gets == []
    request, identity = house.identity("please a fox")
    exact = identify(request, house.namespace, MatchLevel.EXACT)
    assert exact == identify(request, replace(house.namespace, identity_version=1), MatchLevel.EXACT)
    assert identity.key == made.entry.key


@pytest.mark.usefixtures("two_versions")
async def test_a_prompt_that_only_shared_a_picture_before_pays_for_its_own(house: House) -> None:
    writes(house, 1)
    await house.get("Please a fox")
    writes(house, 2)
    await house.get("please a fox")
    assert house.upstream.calls == 2


@pytest.mark.usefixtures("two_versions")
async def test_a_widening_step_lets_it_share_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    writes(house, 1)
    made = await house.get("Please a fox")
    monkeypatch.setitem(VERSIONS, 2, IDENTITY._replace(is_widening=True))
    writes(house, 2)
    found = await house.get("please a fox")
    assert (found.entry.image.data, found.matched) == (made.entry.image.data, MatchLevel.STANDARD)


@pytest.mark.usefixtures("two_versions")
async def test_what_is_unknown_under_an_older_version_is_unknown(house: House) -> None:
    writes(house, 1)
    made = await house.get("please a fox")
    await house.settle()
    writes(house, 2)
    house.s3.is_down = True
    assert (await house.get("please a fox")).entry.image == made.entry.image
    house.s3.is_down = False
    await house.settle()
    _, identity = house.identity("please a fox")
    assert await house.s3.find([identity.key]) == [False]
    assert (await house.get("please a fox")).entry.image == made.entry.image
    assert house.upstream.calls == 1


@pytest.mark.usefixtures("two_versions")
async def test_each_of_several_variants_is_carried_on_and_another_one_is_another_one(house: House) -> None:
    writes(house, 1)
    made = await house.ask("please a fox", n=2)
    assert isinstance(made, list)
    writes(house, 2)
    excluded = frozenset({made[0].entry.key.name})
    other = await house.get("please a fox", variant_policy=VariantPolicy.NEXT, exclude_keys=excluded)
    assert other.entry.image == made[1].entry.image
    both = await house.ask("please a fox", n=2)
    assert isinstance(both, list)
    assert [each.entry.image for each in both] == [each.entry.image for each in made]
    assert house.upstream.calls == 1


@pytest.mark.usefixtures("two_versions")
@pytest.mark.parametrize(("asked", "calls"), [("please a fox", 1), ("Please a fox", 2)])
async def test_one_of_another_version_is_derived_from_for_the_prompt_that_it_was_made_from(
    house: House, asked: str, calls: int
) -> None:
    house.renderer = renderer = ThreadRenderer(max_pixels=10_000, max_bytes=100_000)
    house.namespace = replace(house.namespace, answer_from=frozenset({AnswerFrom.QUALITY}))

    async def get(prompt: str, quality: str) -> None:
        request, identity = house.identity(prompt, quality=quality)
        await house.cache.get(request, identity, namespace=house.namespace, caller=EVERYTHING, terms=Terms())

    writes(house, 1)
    await get("please a fox", "high")
    writes(house, 2)
    await get(asked, "low")
    assert house.upstream.calls == calls
    await renderer.aclose()


@pytest.mark.usefixtures("two_versions")
async def test_a_call_that_is_sent_again_to_a_replica_that_writes_another_version_pays_nothing(
    house: House, clock: FakeClock
) -> None:
    house.replays = LocalReplays(monotonic_s=clock.monotonic_s)  # as Redis has it for all replicas
    writes(house, 1)
    terms: dict[str, Any] = {"cache_policy": CachePolicy.REFRESH, "request_id": "once"}
    made = await house.get("please a fox", **terms)
    await house.cache.aclose(5)
    writes(house, 2)
    assert (await house.get("please a fox", **terms)).entry.image == made.entry.image
    assert house.upstream.calls == 1


@pytest.mark.usefixtures("two_versions")
async def test_a_picture_put_again_is_the_one_there_is_and_another_takes_no_variant_that_is_taken(house: House) -> None:
    writes(house, 1)
    made = await house.get("please a fox")
    old = made.entry.key
    writes(house, 2)
    _, identity = house.identity("please a fox")
    terms: dict[str, Any] = {"namespace": house.namespace, "others": [old]}
    assert await house.cache.put(made.entry.image, identity, **terms) == (made.entry, False)
    entry, is_new = await house.cache.put(make_entry(data=b"other").image, identity, **terms)
    assert (entry.key.variant, is_new) == (1, True)


@pytest.mark.usefixtures("two_versions")
async def test_a_picture_that_waits_for_review_is_not_made_again(house: House) -> None:
    house.namespace = replace(house.namespace, min_score=0.5)
    writes(house, 1)
    _, identity = house.identity("please a fox")
    entry = make_entry(identity.key)
    await house.reviews.hold(entry)
    await house.settle()
    writes(house, 2)
    answer = await house.ask("please a fox")
    assert not isinstance(answer, list)
    assert answer.in_review
    assert house.upstream.calls == 0


# ── purges ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def house_of_purges(clock: FakeClock, tmp_path: Path) -> AsyncIterator[House]:
    """A house whose tiers know what was purged, too."""
    epochs = Epochs()
    tiers = {name: await open_tier(tmp_path / name, name, clock, epochs) for name in (TierName.REDIS, TierName.S3)}
    house = House(clock=clock, redis=tiers[TierName.REDIS], s3=tiers[TierName.S3], epochs=epochs)
    yield house
    await house.aclose()
    for tier in tiers.values():
        await tier.aclose()


async def carried(house: House) -> tuple[Served, Served]:
    """A picture as one version has it, and as the next does."""
    writes(house, 1)
    old = await house.get("please a fox")
    writes(house, 2)
    new = await house.get("please a fox")
    await house.settle()
    return old, new


async def has_any(house: House, *pictures: Served) -> bool:
    for picture in pictures:
        try:
            await house.cache.get_by_key(picture.entry.key, namespace=house.namespace, caller=EVERYTHING, terms=Terms())
        except KeyGoneError:
            continue
        return True
    return False


@pytest.mark.usefixtures("two_versions")
async def test_what_was_purged_by_its_request_is_gone_under_every_version(house: House) -> None:
    old, new = await carried(house)
    _, identity = house.identity("please a fox")
    result = await house.cache.purge(house.namespace, identity=identity, others=[old.entry.key], dry_run=False)
    assert result.images == 2
    assert not await has_any(house, old, new)
    await house.get("please a fox")
    assert house.upstream.calls == 2


@pytest.mark.usefixtures("two_versions")
@pytest.mark.parametrize("by", range(3))
async def test_what_was_purged_by_one_of_its_keys_comes_back_under_none(
    house_of_purges: House, by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = house_of_purges
    profiles = {name: profile._replace(versioned=f"{name}/3") for name, profile in PROFILES.items()}
    monkeypatch.setitem(VERSIONS, 3, IDENTITY._replace(profiles=profiles))
    pictures = list(await carried(house))
    writes(house, 3)
    pictures.append(await house.get("please a fox"))
    assert house.upstream.calls == 1
    await house.settle()
    await house.cache.purge(house.namespace, key=pictures[by].entry.key, dry_run=False)
    assert not await has_any(house, *pictures)
    await house.get("please a fox")
    assert house.upstream.calls == 2


@pytest.mark.usefixtures("two_versions")
async def test_what_was_purged_by_its_new_key_before_it_was_carried_on_is_not_carried_on(
    house_of_purges: House,
) -> None:
    house = house_of_purges
    writes(house, 1)
    await house.get("please a fox")
    writes(house, 2)
    _, identity = house.identity("please a fox")
    await house.cache.purge(house.namespace, key=identity.key, dry_run=False)
    await house.get("please a fox")
    assert house.upstream.calls == 2


# ── codec ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_entries_of_every_layout_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codec.LAYOUTS, 2, CODEC)
    entry = make_entry()
    stored = [codec.encode(entry, version) for version in codec.LAYOUTS]
    assert stored[0] != stored[1]
    assert [codec.decode(each) for each in stored] == [entry, entry]


def as_of_a_newer_release(directory: Path) -> dict[Path, bytes]:
    """Every entry in a directory, with a codec version that nobody here can read."""
    files = [file for file in directory.rglob("v1.*") if file.is_file()]
    for file in files:
        stored = file.read_bytes()
        file.write_bytes(stored[:4] + (max(codec.LAYOUTS) + 1).to_bytes(2, "big") + stored[6:])
    assert files
    return {file: file.read_bytes() for file in files}


@pytest.mark.parametrize("tiers", ["", "redis", "s3"])
@pytest.mark.parametrize("policy", [CachePolicy.USE_CACHE, CachePolicy.ONLY_IF_CACHED])
async def test_a_picture_that_only_a_newer_release_can_read_is_neither_paid_for_nor_overwritten(
    house: House, tmp_path: Path, tiers: str, policy: CachePolicy
) -> None:
    made = await house.get()
    await house.settle()
    if tiers:  # the other one has lost it
        await (house.s3 if tiers == "redis" else house.redis).delete(made.entry.key)
    files = as_of_a_newer_release(tmp_path / "tiers" / tiers)
    house.restart()
    with pytest.raises(EntryNewerError):
        await house.get(cache_policy=policy)
    with pytest.raises(EntryNewerError):
        await house.cache.put(make_entry(data=b"x").image, house.identity()[1], namespace=house.namespace)
    await house.settle()
    assert {file: file.read_bytes() for file in files} == files
    assert house.upstream.calls == 1


async def test_a_tier_that_can_be_read_answers_for_one_that_cannot(house: House, tmp_path: Path) -> None:
    made = await house.get()
    await house.settle()
    files = as_of_a_newer_release(tmp_path / "tiers" / "redis")
    house.restart()
    assert (await house.get()).entry == made.entry
    await house.settle()
    assert {file: file.read_bytes() for file in files} == files


@pytest.mark.parametrize("section", ["identity", "codec"])
def test_a_version_that_this_release_does_not_know_is_refused(tmp_path: Path, section: str) -> None:
    (file := tmp_path / "cacheserver.toml").touch()
    env = environment(tmp_path, **{f"{section}__write_version": 2})
    with pytest.raises(ConfigError, match=rf"{section}.write_version.*one that this release knows: 1"):
        load_settings(file, env)
