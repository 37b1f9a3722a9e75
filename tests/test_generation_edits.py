"""Edits over HTTP: a form with the input images, to whoever speaks OpenAI's API or Azure's."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from cacheserver.errors import PromptRefusedError, UpstreamInvalidError
from cacheserver.generation.providers.openai import OpenAIUpstream, Style
from cacheserver.model import ImageRequest, InputImage, InputRole, PartialImage
from tests.fakes import FakeClock
from tests.openai_upstreams import Make, openai_upstreams
from tests.provider import API_KEY, FormPart, OpenAIStandIn, large_png, small_image


def given(number: int, role: InputRole = InputRole.IMAGE, image_format: str = "png") -> InputImage:
    data = small_image(number, image_format)
    return InputImage(role, hashlib.sha256(data).hexdigest(), f"image/{image_format}", data)


FOX, MASK = given(1), given(2, InputRole.MASK)
STYLE = given(3, InputRole.STYLE, "jpeg")


def edit(*inputs: InputImage, model: str = "gpt-image-2", **fields: Any) -> ImageRequest:
    return ImageRequest("a hät on it", model, inputs=inputs or (FOX,), **fields)


@pytest.fixture
async def make(provider: OpenAIStandIn, clock: FakeClock) -> AsyncIterator[Make]:
    async with openai_upstreams(provider, clock) as make:
        yield make


@pytest.fixture
def upstream(make: Make) -> OpenAIUpstream:
    return make()


def files(provider: OpenAIStandIn) -> list[FormPart]:
    return [part for part in provider.requests[-1].form() if part.file_name is not None]


def texts(provider: OpenAIStandIn) -> dict[str, str]:
    return {part.name: part.data.decode() for part in provider.requests[-1].form() if part.file_name is None}


async def test_an_edit_is_a_form_with_its_images_in_order(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    [image] = await upstream.generate(edit(FOX, MASK, STYLE, size="1024x1024", quality="low"), [0])
    assert image.data in provider.made["a hät on it"]
    sent = provider.requests[0]
    assert sent.path == "/v1/images/edits"
    assert sent.headers["authorization"] == f"Bearer {API_KEY}"
    assert int(sent.headers["content-length"]) == len(sent.body)
    assert [(part.name, part.file_name, part.content_type) for part in files(provider)] == [
        ("image[]", "0.png", "image/png"),
        ("mask", "1.png", "image/png"),
        ("image[]", "2.jpeg", "image/jpeg"),
    ]
    assert [part.data for part in files(provider)] == [FOX.data, MASK.data, STYLE.data]
    assert texts(provider) == {
        "prompt": "a hät on it",
        "model": "gpt-image-2",
        "n": "1",
        "size": "1024x1024",
        "quality": "low",
        "output_format": "png",
    }


async def test_further_parameters_are_fields_of_the_form(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    extra = {"steps": 7.0, "hires": True, "lora": ["a", {"weight": 0.5}], "scheduler": "euler", "nothing": None}
    request = edit(
        model="qwen-image", extra=extra, seed=3, output_format="jpeg", output_compression=80, moderation="low"
    )
    await upstream.generate(request, [0, 1])
    sent = texts(provider)
    assert {name: sent.get(name) for name in extra} == {
        "steps": "7",
        "hires": "true",
        "lora": '["a", {"weight": 0.5}]',
        "scheduler": "euler",
        "nothing": None,
    }
    assert (sent["n"], sent["seed"], sent["output_compression"], sent["moderation"]) == ("2", "3", "80", "low")


async def test_azure_has_the_model_in_the_path_of_an_edit(make: Make, provider: OpenAIStandIn) -> None:
    azure = make(style=Style.AZURE, base_url=provider.root_url, models={"ours": "gpt-image-2"})
    await azure.generate(edit(model="ours"), [0])
    sent = provider.requests[0]
    assert sent.path == "/openai/deployments/gpt-image-2/images/edits"
    assert sent.query == {"api-version": ["2025-04-01-preview"]}
    assert sent.headers["api-key"] == API_KEY
    assert "model" not in texts(provider)


async def test_an_edits_input_tokens_are_paid_at_their_own_price(upstream: OpenAIUpstream) -> None:
    [image] = await upstream.generate(edit(FOX, STYLE, size="1024x1024", quality="low"), [0])
    assert image.usage is not None
    assert image.usage.input_image_tokens == 2 * 1_024
    text, pictures = image.usage.input_text_tokens, image.usage.input_image_tokens
    assert image.paid_microusd == text * 5 + pictures * 8 + image.usage.output_tokens * 30


async def test_an_edit_streams_as_well(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    seen: list[PartialImage] = []
    [image] = await upstream.generate(edit(), [0], partial_images=2, on_partial=seen.append)
    assert [partial.index for partial in seen] == [0, 1]
    assert image.usage is not None
    assert (texts(provider)["stream"], texts(provider)["partial_images"]) == ("true", "2")


async def test_an_edit_that_streams_and_has_no_usage_costs_what_it_may(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    provider.edit_next(lambda answer: answer.update(usage=None))
    request = edit(FOX, STYLE, size="1024x1024", quality="low")
    [image] = await upstream.generate(request, [0], partial_images=2, on_partial=lambda _: None)
    assert image.paid_microusd == 6_000 + 2 * (64 * 5 + 1_536 * 8) + 2 * 100 * 30


async def test_an_edit_that_is_refused_means_what_a_refused_generation_does(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    provider.fail_next(400, "moderation_blocked", kind="image_generation_user_error")
    with pytest.raises(PromptRefusedError):
        await upstream.generate(edit(), [0])
    with pytest.raises(UpstreamInvalidError) as caught:
        await upstream.generate(edit(extra={"input_fidelity": "high"}), [0])
    assert caught.value.field == "input_fidelity"


async def test_a_connection_that_failed_is_tried_again_with_the_whole_form(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = aiohttp.TCPConnector.connect
    failures = iter([True])

    async def fail_first(self: aiohttp.TCPConnector, *rest: Any, **more: Any) -> Any:
        if next(failures, False):
            raise aiohttp.ConnectionTimeoutError
        return await connect(self, *rest, **more)

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", fail_first)
    await upstream.generate(edit(FOX, MASK), [0])
    assert next(failures, None) is None
    assert [part.data for part in files(provider)] == [FOX.data, MASK.data]


async def test_a_large_image_goes_out_whole(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    data = large_png(1, 5_000_000)
    await upstream.generate(edit(InputImage(InputRole.IMAGE, hashlib.sha256(data).hexdigest(), "image/png", data)), [0])
    assert files(provider)[0].data == data
