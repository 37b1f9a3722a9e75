"""The renderer makes few pictures at a time, each once, and drops what nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from cacheserver.errors import InvalidRequestError, OverloadedError, ShuttingDownError
from cacheserver.images import ImageFacts
from cacheserver.model import GeneratedImage, Rendition
from cacheserver.renditions import pixels
from cacheserver.renditions.renderer import ThreadRenderer
from tests.renditions_pictures import decoded, encoded, generated, scene
from tests.waiting import until

SMALL = Rendition(width=8)


@pytest.fixture(scope="module")
def image() -> GeneratedImage:
    return generated(encoded(scene(32, 16)))


class GatedRenderer(ThreadRenderer):
    """A renderer of one thread that stops in it at a gate, and remembers what came there."""

    def __init__(self, *, queue_max: int) -> None:
        super().__init__(max_pixels=10_000, max_bytes=100_000, threads=1, queue_max=queue_max)
        self.gate = threading.Event()
        self.begun: list[Rendition] = []
        self._render = partial(self._render_at_gate)  # type: ignore[assignment] # the same arguments but its limits

    def _render_at_gate(self, data: bytes, rendition: Rendition) -> tuple[bytes, ImageFacts]:
        self.begun.append(rendition)
        self.gate.wait(30)
        return pixels.render(data, rendition, max_pixels=10_000, max_bytes=100_000)


@pytest_asyncio.fixture
async def renderer() -> AsyncIterator[GatedRenderer]:
    renderer = GatedRenderer(queue_max=2)
    yield renderer
    renderer.gate.set()
    await renderer.aclose()


async def test_a_rendition_keeps_the_other_facts_and_costs_nothing(image: GeneratedImage) -> None:
    renderer = ThreadRenderer(max_pixels=10_000, max_bytes=100_000)
    made = await renderer.render(image, Rendition(width=8, output_format="webp"))
    await renderer.aclose()
    assert (made.width, made.height, made.size, made.content_type) == (8, 4, "8x4", "image/webp")
    assert decoded(made.data).size == (8, 4)
    assert made.paid_microusd == 0 < image.paid_microusd
    assert (made.model, made.quality, made.usage, made.seed) == (image.model, image.quality, image.usage, image.seed)


async def test_a_picture_that_cannot_be_read_or_had_like_that_is_told_so(image: GeneratedImage) -> None:
    renderer = ThreadRenderer(max_pixels=32 * 16 - 1, max_bytes=100_000)
    with pytest.raises(InvalidRequestError, match="key: its picture cannot be read: the image is 32x16"):
        await renderer.render(image, SMALL)
    with pytest.raises(InvalidRequestError, match="width"):
        await renderer.render(image, Rendition(width=0))
    await renderer.aclose()


async def test_identical_renditions_are_made_once(renderer: GatedRenderer, image: GeneratedImage) -> None:
    asked = [asyncio.create_task(renderer.render(image, SMALL)) for _ in range(5)]
    await until(lambda: renderer.begun == [SMALL])
    asked[0].cancel()  # whoever leaves takes nothing from the others
    renderer.gate.set()
    made = await asyncio.gather(*asked[1:])
    assert all(each is made[0] for each in made)
    assert renderer.begun == [SMALL]


async def test_beyond_its_queue_it_refuses(renderer: GatedRenderer, image: GeneratedImage) -> None:
    asked = [asyncio.create_task(renderer.render(image, Rendition(width=width))) for width in (1, 2, 3)]
    await until(lambda: renderer.waiting == 2)
    with pytest.raises(OverloadedError, match="2 images wait"):
        await renderer.render(image, Rendition(width=4))
    joined = asyncio.create_task(renderer.render(image, Rendition(width=3)))  # takes no place of its own
    renderer.gate.set()
    assert [made.width for made in await asyncio.gather(*asked, joined)] == [1, 2, 3, 3]


async def test_whoever_leaves_before_its_turn_frees_its_place(renderer: GatedRenderer, image: GeneratedImage) -> None:
    running, leaving, staying = (
        asyncio.create_task(renderer.render(image, Rendition(width=width))) for width in (1, 2, 3)
    )
    await until(lambda: renderer.waiting == 2)
    leaving.cancel()
    await until(lambda: renderer.waiting == 1)
    renderer.gate.set()
    assert [made.width for made in await asyncio.gather(running, staying)] == [1, 3]
    assert Rendition(width=2) not in renderer.begun


async def test_a_turn_is_held_until_its_thread_is_free(renderer: GatedRenderer, image: GeneratedImage) -> None:
    leaving = asyncio.create_task(renderer.render(image, Rendition(width=1)))
    await until(lambda: len(renderer.begun) == 1)
    leaving.cancel()
    await asyncio.wait({leaving})
    asked = asyncio.create_task(renderer.render(image, Rendition(width=2)))
    await until(lambda: renderer.waiting == 1)
    assert len(renderer.begun) == 1
    renderer.gate.set()
    assert (await asked).width == 2


async def test_closing_drops_what_waits(renderer: GatedRenderer, image: GeneratedImage) -> None:
    asked = [asyncio.create_task(renderer.render(image, Rendition(width=width))) for width in (1, 2)]
    await until(lambda: renderer.waiting == 1)
    closing = asyncio.create_task(renderer.aclose())
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(outcome, ShuttingDownError) for outcome in outcomes)
    renderer.gate.set()
    await closing
    assert renderer.begun == [Rendition(width=1)]
