"""What a client with a fallback answers while nobody is there, and what the service hears of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from contextlib import AsyncExitStack
from typing import Any

import grpc
import httpx
import pytest

from cacheserver.client import (
    CachePolicy,
    ImageSpec,
    InputImage,
    QuotaExhaustedError,
    State,
    TierName,
    TryAgainError,
    UnreachableError,
)
from cacheserver.client import channel as client_channel
from cacheserver.client.openai import async_openai_fallback, openai_fallback
from tests.house import House
from tests.provider import API_KEY, OpenAIStandIn, Reply, small_image
from tests.rpc_front import ask, open_front
from tests.test_client import Fail, Service, answer, connected, serving
from tests.waiting import until

PICTURE = small_image(1)
NOBODY = "127.0.0.1:1"


class Elsewhere:
    """Makes pictures without the service, for either client, and remembers which."""

    def __init__(self, kind: str, *, fails: Exception | None = None, after: int = 0, gives: Any = PICTURE) -> None:
        self.asked: list[ImageSpec] = []
        self._fails = fails
        self._after = after
        self._gives = gives
        self.fallback: Any = self._make if kind == "sync" else self._make_async

    def _make(self, spec: ImageSpec) -> Any:
        self.asked.append(spec)
        if self._fails is not None and len(self.asked) > self._after:
            raise self._fails
        return self._gives

    async def _make_async(self, spec: ImageSpec) -> Any:
        return self._make(spec)


@pytest.fixture(params=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _tries_in_quick_succession(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tries as ever, a hundredth of the time apart."""
    options = dict(client_channel.IMPATIENT_OPTIONS)
    config = str(options["grpc.service_config"]).replace('"0.2s"', '"0.002s"').replace('"5s"', '"0.05s"')
    quick = tuple({**options, "grpc.service_config": config}.items())
    monkeypatch.setattr(client_channel, "IMPATIENT_OPTIONS", quick)


async def made_by(client: Any) -> int:
    """The client's count, whichever twin it is."""
    return int(getattr(client, "inner", client).fallbacks)


async def test_where_nobody_answers_the_fallback_makes_the_picture_and_the_result_says_so(kind: str) -> None:
    elsewhere = Elsewhere(kind)
    async with connected(kind, NOBODY, fallback=elsewhere.fallback) as client:
        result = await client.get_image(ImageSpec("a red fox", quality="low"), size="1024x1024", tags=["spring"])
        assert (result.data, result.by_fallback, result.pending) == (PICTURE, True, False)
        assert (result.tier, result.status.state) == (TierName.UPSTREAM, State.READY)
        assert (result.key, result.image.content_type, result.image.size_bytes) == ("", "image/png", len(PICTURE))
        assert elsewhere.asked == [ImageSpec("a red fox", quality="low", size="1024x1024")]
        assert await made_by(client) == 1


async def test_several_pictures_are_made_one_by_one(kind: str) -> None:
    elsewhere = Elsewhere(kind)
    async with connected(kind, NOBODY, fallback=elsewhere.fallback) as client:
        result = await client.get_image("a red fox", n=3)
        assert (len(result.images), len(result.image_status), await made_by(client)) == (3, 3, 3)


async def test_an_answer_of_the_service_says_it_was_not_made_elsewhere(kind: str) -> None:
    service, elsewhere = Service([answer()]), Elsewhere(kind)
    async with serving(service) as address, connected(kind, address, fallback=elsewhere.fallback) as client:
        assert not (await client.get_image("a red fox")).by_fallback
    assert elsewhere.asked == []
    assert "x-fallbacks" not in service.metadata[0]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "BUDGET_EXHAUSTED"), QuotaExhaustedError),
        (Fail(grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL", trailers=(("grpc-retry-pushback-ms", "-1"),)), TryAgainError),
    ],
)
async def test_what_the_service_itself_refuses_is_not_made_elsewhere(
    kind: str, failure: Fail, error: type[Exception]
) -> None:
    service, elsewhere = Service([failure]), Elsewhere(kind)
    async with serving(service) as address, connected(kind, address, fallback=elsewhere.fallback) as client:
        with pytest.raises(error):
            await client.get_image("a red fox")
    assert elsewhere.asked == []


async def test_a_call_for_cached_pictures_alone_is_not_answered_with_a_new_one(kind: str) -> None:
    elsewhere = Elsewhere(kind)
    async with connected(kind, NOBODY, fallback=elsewhere.fallback) as client:
        with pytest.raises(UnreachableError):
            await client.get_image("a red fox", cache_policy=CachePolicy.ONLY_IF_CACHED)
        with pytest.raises(UnreachableError):
            await client.get_by_key("v1.default.x.y.0")
    assert elsewhere.asked == []


async def test_what_the_fallback_raises_reaches_the_caller_and_is_not_counted(kind: str) -> None:
    elsewhere = Elsewhere(kind, fails=ZeroDivisionError("elsewhere"))
    async with connected(kind, NOBODY, fallback=elsewhere.fallback) as client:
        with pytest.raises(ZeroDivisionError):
            await client.get_image("a red fox")
        assert await made_by(client) == 0


async def test_pictures_made_before_one_that_failed_are_counted_for_somebody_paid_for_them(kind: str) -> None:
    elsewhere = Elsewhere(kind, fails=ZeroDivisionError("elsewhere"), after=2)
    async with connected(kind, NOBODY, fallback=elsewhere.fallback) as client:
        with pytest.raises(ZeroDivisionError):
            await client.get_image("a red fox", n=3)
        assert await made_by(client) == 2


@pytest.mark.parametrize("gives", [None, b"", "text"])
async def test_a_fallback_that_gives_no_bytes_is_a_mistake(kind: str, gives: Any) -> None:
    elsewhere = Elsewhere(kind, gives=gives)
    async with connected(kind, NOBODY, fallback=elsewhere.fallback) as client:
        with pytest.raises(TypeError, match="bytes of an image"):
            await client.get_image("a red fox")
        assert await made_by(client) == 0


async def test_a_host_that_takes_connections_and_says_nothing_counts_as_unreachable_long_before_the_deadline(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**dict(client_channel.IMPATIENT_OPTIONS), "grpc.min_reconnect_backoff_ms": 300}
    monkeypatch.setattr(client_channel, "IMPATIENT_OPTIONS", tuple(options.items()))
    connections: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    elsewhere = Elsewhere(kind)
    async with asyncio.timeout(20), connected(kind, f"127.0.0.1:{port}", fallback=elsewhere.fallback) as client:
        assert (await client.get_image("a red fox", timeout_s=60.0)).by_fallback
    for writer in connections:
        writer.close()
    silent.close()
    await silent.wait_closed()


async def test_a_service_that_dies_and_comes_back_is_told_once_how_many_were_made_without_it(kind: str) -> None:
    service, elsewhere = Service([answer()]), Elsewhere(kind)
    async with AsyncExitStack() as stack:
        async with serving(service) as address:
            client = await stack.enter_async_context(connected(kind, address, fallback=elsewhere.fallback))
            assert not (await client.get_image("a red fox")).by_fallback
        for _ in range(2):
            assert (await client.get_image("a red fox", n=2)).by_fallback
        refusal = Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "BUDGET_EXHAUSTED")
        back = Service([refusal, answer(), answer()])
        async with serving(back, address):
            result = None
            while result is None or result.by_fallback:  # it connects again after a moment
                try:
                    result = await client.get_image("a red fox")
                except QuotaExhaustedError:
                    result = None
            await client.get_image("a red fox")
        made = await made_by(client)
    told = [metadata.get("x-fallbacks") for metadata in back.metadata]
    assert told == [str(made), str(made), None]


async def test_the_service_counts_what_it_is_told_by_namespace(kind: str, house: House) -> None:
    elsewhere = Elsewhere(kind)
    async with open_front(house) as front:
        address = f"127.0.0.1:{front.server.port}"
        async with connected(kind, address, fallback=elsewhere.fallback) as client:
            twin = getattr(client, "inner", client)
            for _ in range(3):
                twin._fallbacks.picture(PICTURE)
            assert not (await client.get_image("a red fox")).by_fallback
    assert counted(house) == {"default": 3.0}


@pytest.mark.parametrize("stated", ["0", "-1", "1000000", "1e3", "a", "٣", "", " 5"])
async def test_a_count_that_is_none_is_not_counted_and_the_call_is_answered(house: House, stated: str) -> None:
    async with open_front(house) as front:
        name = "x-fallbacks-bin" if not stated.isascii() else "x-fallbacks"
        value: Any = stated.encode() if name.endswith("-bin") else stated
        await front.stub.GetImage(ask(), metadata=((name, value),))
    assert counted(house) == {}


def counted(house: House) -> dict[str, float]:
    metric = house.books._metrics.client_fallbacks
    samples = [sample for family in metric.collect() for sample in family.samples if sample.name.endswith("_total")]
    return {sample.labels["namespace"]: sample.value for sample in samples}


# --- the one for OpenAI ---


async def make(kind: str, spec: ImageSpec, provider: OpenAIStandIn, api_key: str = API_KEY) -> bytes:
    return await made_at(kind, spec, api_key=api_key, base_url=f"{provider.base_url}/")


async def made_at(kind: str, spec: ImageSpec, **options: Any) -> bytes:
    given = {"model": "gpt-image-2", **options}
    if kind == "sync":
        return await asyncio.to_thread(openai_fallback(**given), spec)
    made = async_openai_fallback(**given)(spec)
    assert inspect.isawaitable(made)
    return await made


async def test_the_ready_made_fallback_asks_an_images_api_for_the_very_same_picture(
    kind: str, provider: OpenAIStandIn
) -> None:
    data = await make(kind, ImageSpec("a red fox", model="ours", size="1024x1024", quality="low"), provider)
    assert data.startswith(b"\x89PNG")
    assert provider.requests[0].json() == {
        "prompt": "a red fox",
        "model": "gpt-image-2",
        "n": 1,
        "size": "1024x1024",
        "quality": "low",
    }


async def test_it_makes_no_picture_of_an_edits_prompt_alone(kind: str, provider: OpenAIStandIn) -> None:
    with pytest.raises(ValueError, match="makes no edits"):
        await make(kind, ImageSpec("a hat on it", inputs=[InputImage(b"\x89PNG")]), provider)
    assert provider.calls == 0


async def test_a_key_it_refuses_is_said_and_neither_key_nor_prompt_is_repeated(
    kind: str, provider: OpenAIStandIn
) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        await make(kind, ImageSpec("a red fox"), provider, api_key="sk-wrong")
    assert "sk-wrong" not in str(caught.value)
    assert "fox" not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"data": []}', b'{"data": [{"b64_json": "%"}]}', b"[1]"])
async def test_an_answer_without_a_picture_is_said_to_be_one(kind: str, provider: OpenAIStandIn, body: bytes) -> None:
    provider.answer_next(Reply(200, body))
    with pytest.raises(ValueError, match="without a picture"):
        await make(kind, ImageSpec("a red fox"), provider)


async def test_an_api_that_answers_byte_by_byte_without_end_is_given_up(kind: str) -> None:
    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while True:
                writer.write(b"1\r\n \r\n")
                await writer.drain()
                await asyncio.sleep(0)

    async with asyncio.timeout(20), await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(httpx.ReadTimeout):
            await made_at(kind, ImageSpec("a red fox"), api_key="k", base_url=address, timeout_s=0.3)
        await until(lambda: len(asyncio.all_tasks()) == 1)
