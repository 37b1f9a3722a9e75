"""ImportImages and ListImages over a whole cache, as part of the admin API on a real port."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from cacheserver.errors import InvalidRequestError
from cacheserver.generation.images import inspect_in_thread
from cacheserver.imports import Imports, Objects
from cacheserver.model import Namespace, SourceObject
from cacheserver.pb import admin_pb2 as pb
from cacheserver.pb import promptcache_pb2 as public_pb
from cacheserver.precheck import PromptPolicy
from cacheserver.rpc.admin import AdminService
from cacheserver.rpc.admin_images import AdminImages
from tests.admin_front import Sources, admin_service
from tests.house import MODEL, House
from tests.provider import small_image

MAX_IMAGE_BYTES = 1_000_000


class NoBuckets:
    """Objects of which none may be read."""

    async def read(self, uri: str, *, max_bytes: int) -> SourceObject:  # noqa: ARG002 - the protocol's
        raise InvalidRequestError({"s3_uri": "no bucket is open in this test"})


def images_service(
    house: House,
    *namespaces: Namespace,
    objects: Objects | None = None,
    policies: Mapping[str, PromptPolicy] = MappingProxyType({}),
) -> AdminService:
    """The admin API over the tiers of `house`."""
    imports = Imports(
        last=house.s3,
        keeper=house.keeper,
        objects=objects or NoBuckets(),
        inspect=partial(inspect_in_thread, max_pixels=50_000_000, max_bytes=MAX_IMAGE_BYTES),
        clock=house.clock,
        max_image_bytes=MAX_IMAGE_BYTES,
        on_stored=house.cache.matching.add,
    )
    spaces = namespaces or (house.namespace,)
    return admin_service(Sources(images=AdminImages(imports, namespaces=spaces, clock=house.clock, policies=policies)))


def spec(prompt: str = "a red fox", **fields: Any) -> public_pb.ImageSpec:
    return public_pb.ImageSpec(prompt=prompt, model=MODEL, **fields)


def incoming(number: int = 1, prompt: str = "a red fox", **fields: Any) -> pb.ImportImagesRequest:
    """One picture of its own for every number, unless told otherwise."""
    chosen: dict[str, Any] = {"row": number, "paid_microusd": 40_000, **fields}
    if "identity" not in chosen:
        chosen.setdefault("spec", spec(prompt))
    if "s3_uri" not in chosen:
        chosen.setdefault("data", small_image(number))
    return pb.ImportImagesRequest(**chosen)


async def taken(stub: Any, *messages: pb.ImportImagesRequest) -> list[pb.ImportImagesResponse]:
    """The outcomes of one stream, by row."""
    outcomes = [outcome async for outcome in stub.ImportImages(iter(messages))]
    return sorted(outcomes, key=lambda outcome: outcome.row)
