"""PromptCacheService: a message in, the cache asked, a message out. Nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import grpc

from cacheserver.accounting.books import CounterBooks
from cacheserver.accounting.reading import Query, Report
from cacheserver.cache import PromptCache
from cacheserver.calls import directives
from cacheserver.calls.asking import Asking
from cacheserver.calls.call import Call
from cacheserver.calls.downloads import STALLED_S, DownloadMemory
from cacheserver.calls.reception import Reception
from cacheserver.calls.uploads import Hold, UploadMemory
from cacheserver.errors import (
    ImageChangedError,
    ImageTooLargeError,
    InvalidRequestError,
    NoSignedUrlsError,
    OffsetOutOfRangeError,
    PermissionDeniedError,
)
from cacheserver.identity import canonical_key, canonical_prompt, differences, identify, other_identities
from cacheserver.images import BadImageError, ImageFacts
from cacheserver.interfaces import Clock
from cacheserver.model import (
    CachedImage,
    CacheKey,
    CachePolicy,
    GeneratedImage,
    ImageRequest,
    LiveState,
    Pending,
    Permission,
    Served,
    StatsField,
    VariantPolicy,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.precheck import PromptPolicy
from cacheserver.recall import Recall
from cacheserver.rpc import messages, replies, wire
from cacheserver.rpc.batch import Batch
from cacheserver.rpc.calls import Calls, Parts, Service, parse
from cacheserver.rpc.find import FindCached, KnownKeys
from cacheserver.rpc.inputs import reading
from cacheserver.rpc.live import live_message
from cacheserver.rpc.messages import Delivery, Problems, PutHeader, Resume, RpcAsked
from cacheserver.rpc.ready import ReadyImages
from cacheserver.rpc.stats import read_query
from cacheserver.rpc.warm import WarmImages
from cacheserver.warming import Warming

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["PromptCacheService"].full_name

_COPIES_OF_INPUTS = 3
"""How often input images are in memory until their call is over: as they came, in their message, and on their own."""


class Inspect(Protocol):
    """Decodes an image to tell what it is."""

    async def __call__(self, data: bytes, *, expect_format: str) -> ImageFacts:
        """The facts of `data`; raises BadImageError if it is no whole picture of that format ("png", …)."""
        ...


class FigureSource(Protocol):
    """Where the figures of all replicas are read."""

    async def report(self, query: Query) -> Report:
        """The figures that `query` wants, our own up to this moment.

        Raises:
            AccountsUnavailableError: they cannot be read now.
            InvalidRequestError: they are too many rows.
        """
        ...


class ImageLinks(Protocol):
    """Where pictures are had over HTTP."""

    def url(self, entry: CachedImage) -> tuple[str, float | None]:
        """A URL of this picture, and when it expires in seconds since 1970; None for never."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on calls: bytes that one may move, how many run at a time, seconds between reports of progress.

    `stalled_s` are the seconds in which a caller has to take a little more of a picture that is streamed.

    `batch_in_flight` are the items of one batch that are worked on at a time. `known_requests` are answered again from
    memory without being read.
    """

    batch_in_flight: int = 32
    known_requests: int = 10_000
    max_image_bytes: int = 50_000_000
    chunk_bytes: int = 256 * 1024
    progress_s: float = 2.0
    stalled_s: float = STALLED_S


class PromptCacheService:
    """The rpcs of promptcache.v1.PromptCacheService."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        cache: PromptCache,
        asking: Asking,
        reception: Reception,
        books: CounterBooks,
        inspect: Inspect,
        clock: Clock,
        limits: Limits,
        warming: Warming,
        recall: Recall,
        uploads: UploadMemory,
        downloads: DownloadMemory,
        policies: Mapping[str, PromptPolicy] = MappingProxyType({}),
        figures: FigureSource | None = None,
        live: Callable[[], LiveState] | None = None,
        urls: ImageLinks | None = None,
    ) -> None:
        """`uploads` is for the input images of calls, `downloads` for the pictures that are streamed.

        `policies` are by namespace, those that `asking` has too. `figures` are those of all replicas; None where none
        are kept. `live` tells how the process stands now.
        `urls` are those where no tier signs any; None where nobody knows where callers would reach us.
        """
        self._urls = urls
        self._figures = figures
        self._live = live
        self._cache = cache
        self._asking = asking
        self._books = books
        self._inspect = inspect
        self._clock = clock
        self._limits = limits
        self._recall = recall
        self._uploads = uploads
        self._downloads = downloads
        self._reception = reception
        self._calls = Calls(reception)
        self._ready = ReadyImages(
            reception=reception, asking=asking, cache=cache, clock=clock, most_known=limits.known_requests
        )
        self._find = FindCached(cache=cache, asking=asking, known=KnownKeys())
        self._warm = WarmImages(
            warming, read=self._asked, namespace_of=asking.namespace, policies=policies, books=books
        )

    def handler(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server needs to serve this.

        Messages are parsed inside the handlers: grpc's own deserializer answers UNKNOWN to bytes it cannot
        parse, and names our types.
        """
        calls = self._calls
        places = (("x-batch-in-flight", str(self._limits.batch_in_flight)),)
        stream_image = calls.streams_out(
            "StreamImage", pb.StreamImageRequest, self.stream_image, stalled_s=self._limits.stalled_s
        )
        return Service(
            SERVICE_NAME,
            {
                "GetImage": calls.unary_ready("GetImage", self.get_image, self._ready.again),
                "StreamImage": stream_image,
                "BatchGetImages": calls.streams_both(
                    "BatchGetImages", pb.BatchGetImagesRequest, self.batch_get_images, headers=places
                ),
                "FindCached": calls.unary("FindCached", pb.FindCachedRequest, self._find.find_cached),
                "PutImage": calls.streams_in("PutImage", pb.PutImageRequest, self.put_image),
                "PurgeImages": calls.unary("PurgeImages", pb.PurgeImagesRequest, self.purge_images),
                "ExplainKey": calls.unary("ExplainKey", pb.ExplainKeyRequest, self.explain_key),
                "WarmImages": calls.streams_both("WarmImages", pb.WarmImagesRequest, self._warm.warm_images),
                "GetStats": calls.unary("GetStats", pb.GetStatsRequest, self.get_stats),
                "ExplainCall": calls.unary("ExplainCall", pb.ExplainCallRequest, self.explain_call),
            },
        )

    async def idle(self) -> None:
        """Return when every call that has begun is answered. Warm-ups end where they stand."""
        self._warm.stop()
        await self._reception.idle()

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────

    async def get_image(self, raw: bytes, call: Call) -> bytes:
        """Images from the fastest tier that has them; what is missing is generated."""
        with self._asking.booked(call), self._uploads.hold() as hold:
            asked = self._ready.asked(call)
            if asked is None:
                asked = await self._asking.screened(await self._read(parse(pb.GetImageRequest, raw), call, hold))
            self._check_delivery(asked)
            answer = await self._asking.answer(asked, call)
            if isinstance(answer, Pending):
                call.trailers.append(("cache-status", directives.pending_status()))
                return replies.pending_response(answer).SerializeToString()
            response = await self._deliver(answer, asked, raw, call)
            self._asking.book(answer, asked, call)
        self._add_status(answer, asked, call)
        return response

    def _add_status(self, answer: Sequence[Served], asked: RpcAsked, call: Call) -> None:
        slowest = directives.slowest(answer)
        status = directives.cache_status(slowest, asked.terms.cache_policy, self._clock.now_s())
        call.trailers.append(("cache-status", status))

    async def stream_image(self, message: pb.StreamImageRequest, call: Call) -> AsyncGenerator[bytes, None]:
        """Progress while waiting, then each image as a header and chunks."""
        with self._downloads.hold() as in_hand:
            with self._asking.booked(call), self._uploads.hold() as hold:
                asked = await self._asking.screened(await self._read(message.request, call, hold, prefix="request."))
                resume = messages.read_resume(message, asked.terms, Problems())
                waiting = asyncio.create_task(self._asking.answer(asked, call), name="stream_image")
                try:
                    while not await self._is_done_within(waiting, self._limits.progress_s):
                        yield self._progress(asked, call)
                    answer = waiting.result()
                finally:
                    await _end(waiting)
                if isinstance(answer, Pending):
                    for event in _pending_headers(answer):
                        yield event
                    return
                _check_resume(answer[0].entry, resume)
                pictures = [served.entry.image.data for served in answer]
                if asked.terms.cache_policy is CachePolicy.NO_STORE:
                    in_hand.count(pictures)  # who asks again would pay again
                else:
                    in_hand.take(pictures)
                self._asking.book(answer, asked, call)
            for event in _image_events(answer, resume.read_offset, self._limits.chunk_bytes):
                yield event

    def batch_get_images(self, parts: Parts[pb.BatchGetImagesRequest], call: Call) -> AsyncGenerator[bytes, None]:
        """Each request of a stream as `get_image` answers it, as soon as it is ready."""
        batch = Batch(
            calls=self._calls,
            get_image=self.get_image,
            ready=self._ready.answer,
            in_flight=self._limits.batch_in_flight,
        )
        return batch.answers(parts, call)

    async def _read(self, message: pb.GetImageRequest, call: Call, hold: Hold, prefix: str = "") -> RpcAsked:
        asked = await reading(message.spec.inputs, self._asked, message, call, prefix)
        if isinstance(asked.what, ImageRequest) and asked.what.inputs:
            hold.take(_COPIES_OF_INPUTS * sum(len(image.data or b"") for image in asked.what.inputs))
            hold.hand_over(asked.what.inputs)
        return asked

    def _asked(self, message: pb.GetImageRequest, call: Call, prefix: str = "") -> RpcAsked:
        namespace = self._asking.namespace(message.namespace, Permission.READ, call, prefix)
        asked = messages.read_get_image(message, namespace, call, Problems(prefix))
        if isinstance(asked.what, ImageRequest):
            call.model, call.quality = asked.what.model, asked.what.quality
        return asked

    def _check_delivery(self, asked: RpcAsked) -> None:
        """Refuse before any spend what could not be delivered after it."""
        if asked.delivery is not Delivery.URL:
            return
        if asked.terms.cache_policy is CachePolicy.NO_STORE:
            raise InvalidRequestError({"delivery": "NO_STORE leaves nothing for a URL to lead to: use INLINE"})
        if not self._has_urls:
            raise NoSignedUrlsError(
                "This service has no URLs of images (no S3 and no delivery.public_url): "
                "ask for INLINE or use StreamImage."
            )

    @property
    def _has_urls(self) -> bool:
        return self._cache.can_sign_urls or self._urls is not None

    async def _deliver(self, answer: list[Served], asked: RpcAsked, raw: bytes, call: Call) -> bytes:
        """The response with bytes inline or URLs, all pictures the same way: `max_inline_bytes` is for the answer."""
        is_small = sum(served.entry.size_bytes for served in answer) <= asked.max_inline_bytes
        if len(answer) == 1 and asked.delivery is not Delivery.URL and is_small:
            return self._ready.tell(answer[0], asked, raw, call)
        rest = pb.GetImageResponse(
            status=replies.status_of_answer(answer),
            image_status=[replies.status_of_image(served) for served in answer],
        )
        if asked.delivery is not Delivery.URL and is_small:
            pictures = [(replies.image_facts(served.entry), served.entry.image.data) for served in answer]
            return wire.image_response(pictures, rest)
        is_stored = asked.terms.cache_policy is not CachePolicy.NO_STORE
        if asked.delivery is Delivery.INLINE or not is_stored or not self._has_urls:
            kept = "It is kept: fetch it with" if is_stored else "NO_STORE kept nothing of it: ask again with"
            raise ImageTooLargeError(f"The answer is larger than {asked.max_inline_bytes} bytes. {kept} StreamImage.")
        rest.images.extend([await self._image_by_url(served.entry) for served in answer])
        return rest.SerializeToString()

    async def _image_by_url(self, entry: CachedImage) -> pb.Image:
        expire_time_s: float | None
        facts = replies.image_facts(entry)
        if self._cache.can_sign_urls or self._urls is None:
            facts.url, expire_time_s = await self._cache.signed_url(entry)
        else:
            facts.url, expire_time_s = self._urls.url(entry)
        if expire_time_s is not None:
            facts.url_expire_time.CopyFrom(replies.timestamp(expire_time_s))
        return facts

    async def _is_done_within(self, task: asyncio.Task[list[Served] | Pending], seconds: float) -> bool:
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
        return task.done()

    def _progress(self, asked: RpcAsked, call: Call) -> bytes:
        if isinstance(asked.what, CacheKey):
            keys = [asked.what]
        else:
            key = identify(asked.what, asked.namespace, asked.match_level).key
            keys = [key.with_variant(variant) for variant in range(asked.terms.n)]
        # The other policies choose their variants on the way: which ones is known when they are there.
        is_known = isinstance(asked.what, CacheKey) or asked.terms.variant_policy is VariantPolicy.FIRST
        progress = pb.Progress(
            keys=[key.name for key in keys] if is_known else [],
            waited=replies.duration(self._reception.seconds(call)),
            estimated_wait=replies.duration(self._cache.estimated_wait_s(keys)),
        )
        return pb.StreamImageResponse(progress=progress).SerializeToString()

    # ── storing, removing ────────────────────────────────────────────────────────────────────────────────────

    async def put_image(self, parts: Parts[pb.PutImageRequest], call: Call) -> bytes:
        """Store an image the caller already has."""
        message = await _first_header(parts)
        namespace = self._asking.namespace(message.namespace, Permission.PUT, call, prefix="header.")
        header = await reading(
            message.spec.inputs, messages.read_put_header, message, namespace, self._clock.now_s(), Problems("header.")
        )
        header = replace(header, request=await self._asking.passed(header.request, namespace))
        image = await self._inspected(await _rest(parts, self._limits.max_image_bytes), header)
        identity = identify(header.request, namespace)
        entry, created = await self._cache.put(
            image,
            identity,
            namespace=namespace,
            others=[other.identity.key for other in other_identities(header.request, identity, namespace)],
            replace=header.replace,
            tags=header.tags,
            ttl_s=header.ttl_s,
            create_time_s=header.create_time_s,
            canonical=canonical_key(header.request, namespace) if namespace.shares_spellings else None,
        )
        return pb.PutImageResponse(image=replies.image_facts(entry), created=created).SerializeToString()

    async def _inspected(self, data: bytes, header: PutHeader) -> GeneratedImage:
        request = header.request
        try:
            facts = await self._inspect(data, expect_format=request.output_format)
        except BadImageError as error:
            raise InvalidRequestError({"chunk": str(error)}) from error
        if header.sha256 not in ("", facts.sha256):
            raise InvalidRequestError({"header.digest": "the bytes have another digest: send them again"})
        return GeneratedImage(
            data=data,
            content_type=facts.content_type,
            width=facts.width,
            height=facts.height,
            sha256=facts.sha256,
            model=request.model,
            size=f"{facts.width}x{facts.height}",
            quality=request.quality,
            background=request.background,
            seed=request.seed,
            paid_microusd=header.paid_microusd,
        )

    async def purge_images(self, message: pb.PurgeImagesRequest, call: Call) -> bytes:
        """Remove images from every tier, or count them."""
        namespace = self._asking.namespace(message.namespace, Permission.PURGE, call)
        problems = Problems()
        key, tag, request = None, None, None
        match message.WhichOneof("selector"):
            case "key":
                key = messages.read_key(message.key, "key", namespace, problems)
            case "spec":
                request = await reading(
                    message.spec.inputs, messages.read_spec, message.spec, "spec", namespace, problems
                )
            case "tag":
                tag = messages.read_tag(message.tag, "tag", problems)
            case _ if not message.everything:
                problems.add("selector", "set key, spec, tag, or everything to true")
        problems.check()
        identity, others = None, list[CacheKey]()
        if request is not None:
            request = self._asking.redacted(request, namespace)
            identity = identify(request, namespace)
            others = [other.identity.key for other in other_identities(request, identity, namespace)]
        try:
            result = await self._cache.purge(
                namespace, key=key, identity=identity, others=others, tag=tag, dry_run=message.dry_run
            )
        finally:
            if key is None and tag is None and not message.dry_run:  # whatever tier could not be purged
                for each in (None if identity is None else identity.key, *others):
                    await self._asking.forget_prompts(namespace, each)
        counts = replies.tier_counts(result.per_tier)
        return pb.PurgeImagesResponse(
            images=result.images, tiers=counts, reclaiming=result.is_reclaiming
        ).SerializeToString()

    # ── explaining ──────────────────────────────────────────────────────────────────────────────────────────

    async def explain_key(self, message: pb.ExplainKeyRequest, call: Call) -> bytes:
        """How a request becomes its key and, for two requests, why their keys differ."""
        namespace = self._asking.namespace(message.namespace, Permission.READ, call)
        problems = Problems()
        level = messages.read_match_level(message.match_level, problems)
        paths = ["spec", "other"] if message.HasField("other") else ["spec"]
        specs = [(getattr(message, path), path) for path in paths]
        requests = [
            await reading(spec.inputs, messages.read_spec, spec, path, namespace, problems) for spec, path in specs
        ]
        problems.check()
        requests = [self._asking.redacted(request, namespace) for request in requests]
        first, *others = [identify(request, namespace, level) for request in requests]
        forms = [""] * len(requests)
        if namespace.shares_spellings:
            forms = [canonical_prompt(request.prompt, namespace) or "" for request in requests]
        response = pb.ExplainKeyResponse(explanation=replies.explanation(first, forms[0]))
        for other in others:
            response.other.CopyFrom(replies.explanation(other, forms[1]))
            response.differences.extend(replies.differences(differences(first, other)))
        return response.SerializeToString()

    async def explain_call(self, message: pb.ExplainCallRequest, call: Call) -> bytes:
        """What became of an earlier call, and what it missed by how little."""
        known = self._recall.explain(message.request_id, call.caller)
        return replies.call_explained(known, await self._recall.nearest(known, self._cache.find)).SerializeToString()

    async def get_stats(self, message: pb.GetStatsRequest, call: Call) -> bytes:
        """The counters of this process since it started, or the figures of all replicas for a span of time."""
        if message.namespace:
            namespaces: frozenset[str] | None = frozenset(
                {self._asking.namespace(message.namespace, Permission.READ, call).name}
            )
        elif Permission.READ in call.caller.permissions:
            namespaces = call.caller.namespaces
        else:
            raise PermissionDeniedError("This caller may not read.")
        query = read_query(message, namespaces)
        if StatsField.CALLER in query.by and Permission.ADMIN not in call.caller.permissions:
            raise PermissionDeniedError("Rows by caller need the permission admin.")
        if not (message.HasField("since") or message.HasField("until")):
            response = replies.stats_response(self._books.snapshot(namespaces, query.by))
        elif self._figures is None:
            raise InvalidRequestError({"since": "no figures are kept here: accounting.enabled is false"})
        else:
            # In a thread: many rows take longer than others should wait for their turn.
            response = await asyncio.to_thread(replies.report_response, await self._figures.report(query), query)
        if self._live is not None:
            response.live.CopyFrom(live_message(self._live()))
        return response.SerializeToString()


async def _end(task: asyncio.Task[list[Served] | Pending]) -> None:
    """Cancel a wait, see it end, and look at how it ended: nobody else does when its caller has gone."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def _check_resume(entry: CachedImage, resume: Resume) -> None:
    if resume.sha256 not in ("", entry.image.sha256):
        raise ImageChangedError("The key holds another picture now: begin the download again, without if_digest.")
    if resume.read_offset > entry.size_bytes:
        raise OffsetOutOfRangeError(f"read_offset lies beyond the {entry.size_bytes} bytes of the picture.")


def _pending_headers(pending: Pending) -> Iterator[bytes]:
    for index, key in enumerate(pending.keys):
        header = pb.ImageHeader(image=replies.pending_image(key), status=replies.pending_status(pending), index=index)
        yield pb.StreamImageResponse(header=header).SerializeToString()


def _image_events(answer: Sequence[Served], offset: int, chunk_bytes: int) -> Iterator[bytes]:
    for index, served in enumerate(answer):
        header = pb.ImageHeader(
            image=replies.image_facts(served.entry),
            status=replies.status_of_image(served),
            read_offset=offset,
            index=index,
        )
        yield pb.StreamImageResponse(header=header).SerializeToString()
        for chunk in _chunks(served.entry, offset, chunk_bytes):
            yield wire.chunk_event(chunk)


def _chunks(entry: CachedImage, offset: int, chunk_bytes: int) -> Iterator[memoryview]:
    data = memoryview(entry.image.data)
    return (data[start : start + chunk_bytes] for start in range(offset, len(data), chunk_bytes))


async def _first_header(parts: Parts[pb.PutImageRequest]) -> pb.PutImageHeader:
    async for part in parts:
        if part.WhichOneof("part") != "header":
            break
        return part.header
    raise InvalidRequestError({"header": "must be the first message"})


async def _rest(parts: Parts[pb.PutImageRequest], max_bytes: int) -> bytes:
    """The bytes of the chunks, bounded while they come."""
    chunks: list[bytes] = []
    total = 0
    async for part in parts:
        if part.WhichOneof("part") != "chunk":
            raise InvalidRequestError({"chunk": "every message after the header must be a chunk"})
        total += len(part.chunk)
        if total > max_bytes:
            raise InvalidRequestError({"chunk": f"the image is larger than {max_bytes} bytes"})
        chunks.append(part.chunk)
    # In a thread, where it holds up nobody: of a large image it takes 1 ms per megabyte.
    return await asyncio.to_thread(b"".join, chunks)
