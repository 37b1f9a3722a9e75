"""Imports and lists of the client against a whole cache. Both twins, sync and asyncio, go through every test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from cacheserver.client import (
    ExportedFacts,
    ExportedIdentity,
    ImageSpec,
    ImportItem,
    InvalidRequestError,
    TryAgainError,
    UnreachableError,
)
from cacheserver.model import CacheKey
from tests.admin_front import serving
from tests.house import MODEL, House
from tests.images_front import images_service
from tests.provider import small_image
from tests.test_client_admin import Ask, asking


@pytest.fixture(params=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def ask(kind: str, house: House) -> AsyncIterator[Ask]:
    async with serving(images_service(house)) as address:
        yield asking(kind, address)


def item(row: int, prompt: str = "a red fox") -> ImportItem:
    return ImportItem(row, ImageSpec(prompt, model=MODEL), small_image(row))


async def test_what_is_imported_is_listed_with_its_facts(ask: Ask) -> None:
    made = datetime(2026, 5, 4, 12, 30, tzinfo=UTC)
    sent = replace(item(7), create_time=made, paid_microusd=40_000, tags=("old",))
    [outcome] = await ask("import_images", [sent])
    assert (outcome.row, outcome.created, outcome.failure) == (7, True, None)
    [stored] = await ask("list_images")
    assert stored.identity.key == stored.image.key == outcome.key
    assert (stored.tags, stored.expire_time) == (("old",), None)
    assert (stored.image.create_time, stored.image.paid_microusd, stored.image.data) == (made, 40_000, None)
    assert stored.image.size_bytes == len(small_image(7))


async def test_an_identity_comes_in_as_it_was_listed(ask: Ask, house: House) -> None:
    identity = house.identity()[1]
    exported = ExportedIdentity(identity.key.with_variant(2).name, identity.key.digest, identity.prompt_digest)
    facts = ExportedFacts(model=MODEL, quality="high", background="opaque", revised_prompt="a fox", seed=-1)
    await ask("import_images", [ImportItem(1, exported, small_image(1), facts=facts)])
    [stored] = await ask("list_images")
    image = stored.image
    assert stored.identity == exported
    assert facts == ExportedFacts(image.model, image.quality, image.background, image.revised_prompt, image.seed)


async def test_many_pictures_go_in_several_streams_and_come_in_several_pages(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacheserver.client.importing._IMPORTS_PER_STREAM", 4)
    monkeypatch.setattr("cacheserver.client.admin._PAGE_SIZE", 3)
    outcomes = await ask("import_images", (item(row, f"prompt {row}") for row in range(12)))
    assert sorted(outcome.row for outcome in outcomes) == list(range(12))
    assert len(await ask("list_images")) == 12
    assert await ask("import_images", []) == []
    monkeypatch.setattr("cacheserver.client.importing._BYTES_PER_STREAM", 1)
    assert len(await ask("import_images", (item(row, f"prompt {row}") for row in range(3)))) == 3


async def test_a_picture_that_does_not_fit_is_a_failure_and_stops_no_other(ask: Ask, house: House) -> None:
    bad, good = await ask("import_images", [replace(item(1), digest="sha256:" + 64 * "0"), item(2)])
    bad, good = sorted((bad, good), key=lambda outcome: outcome.row)
    assert good.created
    assert isinstance(bad.failure, InvalidRequestError)
    assert bad.failure.violations == {"digest": "the bytes have another digest"}
    house.s3.is_down = True
    [away] = await ask("import_images", [item(3)])
    assert isinstance(away.failure, TryAgainError)
    assert (away.failure.reason, away.failure.retry_after_s) == ("TIER_UNREACHABLE", 5.0)
    house.s3.is_down = False


async def test_a_dry_run_stores_nothing(ask: Ask) -> None:
    [outcome] = await ask("import_images", [item(1)], dry_run=True)
    assert outcome.created
    assert await ask("list_images") == []


async def test_what_breaks_the_list_of_items_is_raised_after_what_came_before(ask: Ask) -> None:
    def items() -> Iterator[ImportItem]:
        yield item(1)
        raise FileNotFoundError(2, "No such file", "fox.png")

    with pytest.raises(FileNotFoundError):
        await ask("import_images", items())
    assert len(await ask("list_images")) == 1


async def test_an_item_that_cannot_be_sent_says_which(ask: Ask) -> None:
    with pytest.raises(InvalidRequestError, match=r"items\[5\]"):
        await ask("import_images", [replace(item(5), paid_microusd=2**70)])
    with pytest.raises(InvalidRequestError, match="spec"):
        await ask("import_images", [ImportItem(5, ImageSpec("\ud800"), b"")])


async def test_nobody_at_the_address_is_told(kind: str) -> None:
    with pytest.raises(UnreachableError):
        await asking(kind, "127.0.0.1:1")("import_images", [item(1)])


async def test_keys_of_the_list_are_keys(ask: Ask) -> None:
    await ask("import_images", [item(1)])
    [stored] = await ask("list_images")
    assert CacheKey.parse(stored.identity.key).matches(stored.identity.digest)
