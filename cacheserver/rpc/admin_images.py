"""The rpcs of AdminService that import pictures and list what is stored: messages in, `Imports` asked, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import structlog

from cacheserver.calls.call import Call
from cacheserver.errors import CacheServerError, InvalidRequestError
from cacheserver.identity import canonical_key, identify
from cacheserver.imports import Import, Imports
from cacheserver.interfaces import Clock
from cacheserver.model import CacheKey, GeneratedImage, Head, ImageRequest, Namespace
from cacheserver.pb import admin_pb2 as pb
from cacheserver.pb import promptcache_pb2 as public_pb
from cacheserver.precheck import PromptPolicy
from cacheserver.rpc import messages, replies
from cacheserver.rpc.admin import check_right, page_token, read_page
from cacheserver.rpc.calls import Parts
from cacheserver.rpc.inputs import reading
from cacheserver.rpc.messages import Problems
from cacheserver.rpc.status import status_of
from cacheserver.tasks import end

_log = structlog.get_logger(__name__)

DEFAULT_NAMESPACE = "default"

_WINDOW = 64
"""Pictures of one stream that are on their way or whose outcome has not been taken yet."""

_AT_ONCE = 64
_LARGE_AT_ONCE = 4
_LARGE_BYTES = 1024 * 1024
"""Of all streams so many pictures are in hand at a time, and so many more that are large or come from a bucket."""

_SHA256_BYTES = 32
_MAX_NAME = 256
_MAX_REVISED_PROMPT = 32_000
_CHOICES = {"what": "spec or identity", "source": "data or s3_uri"}


class AdminImages:
    """ImportImages and ListImages of promptcache.admin.v1alpha1.AdminService."""

    def __init__(
        self,
        imports: Imports,
        *,
        namespaces: Iterable[Namespace],
        clock: Clock,
        policies: Mapping[str, PromptPolicy] = MappingProxyType({}),
    ) -> None:
        """`policies` are by namespace: a prompt is keyed as callers' prompts are."""
        self._imports = imports
        self._clock = clock
        self._policies = policies
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._large_places = asyncio.Semaphore(_LARGE_AT_ONCE)
        self.replace(namespaces)

    def replace(self, namespaces: Iterable[Namespace]) -> None:
        """From now on these are the namespaces."""
        self._namespaces = {namespace.name: namespace for namespace in namespaces}

    # ── coming in ───────────────────────────────────────────────────────────────────────────────────────────

    async def import_images(self, parts: Parts[pb.ImportImagesRequest], call: Call) -> AsyncGenerator[bytes, None]:
        """Store pictures that were paid for elsewhere, several at a time; one outcome each, in any order."""
        check_right(call)
        window = asyncio.Semaphore(_WINDOW)
        outcomes: asyncio.Queue[bytes | None] = asyncio.Queue()
        taking = asyncio.create_task(self._take_all(parts, call, window, outcomes), name="import")
        try:
            while (outcome := await outcomes.get()) is not None:
                yield outcome
                window.release()
            if (failure := await taking) is not None:
                raise failure
        finally:
            await end([taking])

    async def _take_all(
        self,
        parts: Parts[pb.ImportImagesRequest],
        call: Call,
        window: asyncio.Semaphore,
        outcomes: asyncio.Queue[bytes | None],
    ) -> CacheServerError | None:
        """Take what comes as fast as outcomes are read; None follows the last outcome, also if the stream breaks.

        Returns what broke it.
        """
        failure: CacheServerError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    while True:
                        await window.acquire()
                        message = await anext(parts)
                        places = self._places_for(message)
                        await places.acquire()
                        task = group.create_task(self._take(message, call, outcomes))
                        # Not in the task: one that is cancelled before it has begun would give nothing back.
                        task.add_done_callback(partial(_give_back, places))
                except StopAsyncIteration:
                    pass
                except CacheServerError as error:  # what was taken before gets its outcome all the same
                    failure = error
        finally:
            outcomes.put_nowait(None)
        return failure

    def _places_for(self, message: pb.ImportImagesRequest) -> asyncio.Semaphore:
        """Where it has to find a place: pictures in hand take memory, large ones most of it."""
        is_large = message.HasField("s3_uri") or len(message.data) > _LARGE_BYTES
        return self._large_places if is_large else self._places

    async def _take(self, message: pb.ImportImagesRequest, call: Call, outcomes: asyncio.Queue[bytes | None]) -> None:
        response = pb.ImportImagesResponse(row=message.row)
        try:
            item = await self._read(message)
            key, response.created = await self._imports.take(item, dry_run=message.dry_run)
            response.key = key.name
        except Exception as error:  # noqa: BLE001 - whatever it was, it is this picture's outcome and no other's
            if not isinstance(error, CacheServerError):
                _log.error("import_failed", exc_info=error)
            response.failure.CopyFrom(status_of(error, request_id=call.request_id).as_failure())
        outcomes.put_nowait(response.SerializeToString())

    async def _read(self, message: pb.ImportImagesRequest) -> Import:
        namespace = self._namespace(message.namespace)
        problems = Problems()
        is_export = message.WhichOneof("what") == "identity"
        if is_export:
            origin = _exported(message, namespace, problems)
        else:
            request = await reading(message.spec.inputs, messages.read_spec, message.spec, "spec", namespace, problems)
        if not 0 <= message.paid_microusd <= messages.MAX_PAID_MICROUSD:
            problems.add("paid_microusd", f"must be 0 to {messages.MAX_PAID_MICROUSD}")
        create_time_s = None
        if message.HasField("create_time"):
            now_s = self._clock.now_s()
            create_time_s = messages.read_create_time(message.create_time, now_s, "create_time", problems)
        for field in ("what", "source"):
            if message.WhichOneof(field) is None:
                problems.add(field, f"set {_CHOICES[field]}")
        digest = messages.read_digest(message.digest, "digest", problems)
        tags = messages.read_tags(message.tags, "tags", problems)
        problems.check()
        if not is_export:
            origin = _asked(await self._passed(request, namespace), namespace)
        return Import(
            namespace=namespace,
            key=origin.key,
            prompt_digest=origin.prompt_digest,
            known=origin.known,
            source=message.s3_uri if message.HasField("s3_uri") else message.data,
            paid_microusd=message.paid_microusd,
            sha256=digest,
            image_format=origin.image_format,
            create_time_s=create_time_s,
            tags=tags,
            canonical=origin.canonical,
        )

    async def _passed(self, request: ImageRequest, namespace: Namespace) -> ImageRequest:
        """The request with the prompt that its namespace lets pass. Raises PromptDeniedError or PiiFoundError."""
        policy = self._policies.get(namespace.name)
        if policy is None:
            return request
        prompt = policy.screened(request.prompt)
        return replace(request, prompt=await policy.screen(request.prompt) if prompt is None else prompt)

    def _namespace(self, name: str) -> Namespace:
        namespace = self._namespaces.get(name or DEFAULT_NAMESPACE)
        if namespace is None:
            raise InvalidRequestError({"namespace": "is not a namespace of this service"})
        return namespace

    # ── what is there ───────────────────────────────────────────────────────────────────────────────────────

    async def list_images(self, message: pb.ListImagesRequest, call: Call) -> bytes:
        """A page of the pictures that a namespace has stored, without their bytes."""
        check_right(call)
        problems = Problems()
        namespace = self._namespace(message.namespace)
        page = read_page(message.page_size, message.page_token, problems)
        after = messages.read_key(page.after, "page_token", namespace, problems) if page.after else None
        problems.check()
        heads, last = await self._imports.page(namespace, after=after, limit=page.size)
        return pb.ListImagesResponse(
            images=[_stored_image(head) for head in heads], next_page_token=page_token(last.name) if last else ""
        ).SerializeToString()


def _give_back(places: asyncio.Semaphore, task: asyncio.Task[None]) -> None:  # noqa: ARG001 - asyncio passes it
    places.release()


class _Origin(NamedTuple):
    """Whose picture it is, and what is known of it. `image_format` None: any. An export tells no canonical key."""

    key: CacheKey
    prompt_digest: bytes
    known: GeneratedImage
    image_format: str | None
    canonical: CacheKey | None = None


def _asked(request: ImageRequest, namespace: Namespace) -> _Origin:
    """The origin of a picture that answers a request."""
    identity = identify(request, namespace)
    known = GeneratedImage(
        data=b"",
        content_type="",
        width=0,
        height=0,
        sha256="",
        model=request.model,
        size="",
        quality=request.quality,
        background=request.background,
        seed=request.seed,
    )
    canonical = canonical_key(request, namespace) if namespace.shares_spellings else None
    return _Origin(identity.key, identity.prompt_digest, known, request.output_format, canonical)


def _exported(message: pb.ImportImagesRequest, namespace: Namespace, problems: Problems) -> _Origin:
    """The origin of a picture whose identity an export told."""
    identity = message.identity
    key = messages.read_key(identity.key, "identity.key", namespace, problems)
    if len(identity.digest) != _SHA256_BYTES or not key.matches(identity.digest):
        problems.add("identity.digest", "must be 32 bytes, and begin with the part of it that is in the key")
    if len(identity.prompt_digest) != _SHA256_BYTES:
        problems.add("identity.prompt_digest", "must be 32 bytes")
    known = _known(message.facts, problems)
    return _Origin(replace(key, digest=identity.digest), identity.prompt_digest, known, None)


def _known(facts: public_pb.Image, problems: Problems) -> GeneratedImage:
    """What an export told of the picture; its bytes tell the rest."""
    for name in ("model", "quality", "background"):
        if len(getattr(facts, name)) > _MAX_NAME:
            problems.add(f"facts.{name}", f"must be at most {_MAX_NAME} characters")
    if len(facts.revised_prompt) > _MAX_REVISED_PROMPT:
        problems.add("facts.revised_prompt", f"must be at most {_MAX_REVISED_PROMPT} characters")
    return GeneratedImage(
        data=b"",
        content_type="",
        width=0,
        height=0,
        sha256="",
        model=facts.model,
        size="",
        quality=facts.quality,
        background=facts.background,
        revised_prompt=facts.revised_prompt,
        seed=facts.seed if facts.HasField("seed") else None,
    )


def _stored_image(head: Head) -> pb.StoredImage:
    entry = head.bare
    facts = replies.image_facts(entry)
    facts.size_bytes = head.size_bytes
    return pb.StoredImage(
        image=facts,
        identity=pb.ExportedIdentity(key=entry.key.name, digest=entry.key.digest, prompt_digest=entry.prompt_digest),
        tags=entry.tags,
        expire_time=None if entry.expire_time_s is None else replies.timestamp(entry.expire_time_s),
    )
