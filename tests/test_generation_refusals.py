"""Refusals that would come again are remembered a while, and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cacheserver.errors import PromptRefusedError, UpstreamDownError, UpstreamError, UpstreamInvalidError
from cacheserver.generation.refusals import Refusals
from cacheserver.model import ImageRequest, InputImage, InputRole, Order
from tests.fakes import FakeClock

REQUEST = ImageRequest("a red fox", "gpt-image-2", size="1024x1024")
ORDER = Order(REQUEST, 1, namespace="shop", caller="ann")


@pytest.fixture
def refusals(clock: FakeClock) -> Refusals:
    return Refusals(ttl_s=600, monotonic_s=clock.monotonic_s)


def order(namespace: str = "shop", **fields: object) -> Order:
    return replace(ORDER, namespace=namespace, request=replace(REQUEST, **fields))  # type: ignore[arg-type] # test convenience


def test_a_refused_prompt_is_refused_again_until_its_time_is_over(refusals: Refusals, clock: FakeClock) -> None:
    refusals.check(ORDER)
    refusals.remember(ORDER, PromptRefusedError("its moderation refuses the prompt"))
    with pytest.raises(PromptRefusedError, match="its moderation") as caught:
        refusals.check(ORDER)
    assert caught.value.cached
    clock.advance(601)
    refusals.check(ORDER)


def test_a_refused_prompt_is_refused_at_any_size_and_quality(refusals: Refusals) -> None:
    refusals.remember(ORDER, PromptRefusedError("no"))
    with pytest.raises(PromptRefusedError):
        refusals.check(order(size="auto", quality="low", output_format="webp", seed=7))


@pytest.mark.parametrize(
    "other",
    [
        order(prompt="a blue fox"),
        order(model="flux"),
        order(moderation="low"),
        order(extra={"style": "kind"}),
        order(namespace="games"),
        order(inputs=(InputImage(InputRole.IMAGE, "0" * 64),)),
    ],
)
def test_another_prompt_model_policy_or_namespace_is_not_refused(refusals: Refusals, other: Order) -> None:
    refusals.remember(ORDER, PromptRefusedError("no"))
    refusals.check(other)


def test_a_parameter_that_is_not_taken_is_remembered_for_this_very_request(refusals: Refusals) -> None:
    refusals.remember(ORDER, UpstreamInvalidError("not that size", field="size"))
    with pytest.raises(UpstreamInvalidError) as caught:
        refusals.check(ORDER)
    assert (caught.value.field, caught.value.cached) == ("size", True)
    refusals.check(order(size="auto"))


@pytest.mark.parametrize("error", [UpstreamDownError("down"), PromptRefusedError("no", after_seeing=True)])
def test_what_may_pass_next_time_is_not_remembered(refusals: Refusals, error: UpstreamError) -> None:
    refusals.remember(ORDER, error)
    refusals.check(ORDER)


@pytest.mark.parametrize("error", [PromptRefusedError("no"), UpstreamInvalidError("no", field="image")])
def test_a_refusal_of_an_edit_holds_for_the_same_images_in_the_same_roles(
    refusals: Refusals, error: UpstreamError
) -> None:
    image, mask = InputImage(InputRole.IMAGE, "0" * 64, "image/png", b"bytes"), InputImage(InputRole.MASK, "0" * 64)
    refusals.remember(order(inputs=(image,)), error)
    with pytest.raises(type(error)):
        refusals.check(order(inputs=(replace(image, data=None, content_type=""),)))
    refusals.check(order(inputs=(image, mask)))
    refusals.check(order(inputs=(replace(image, sha256="1" * 64),)))
    refusals.check(ORDER)
