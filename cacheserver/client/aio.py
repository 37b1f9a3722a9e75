"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc.aio

from cacheserver.client import channel, messages
from cacheserver.client.batch import (
    Batch,
    BatchAnswer,
    BatchOptions,
    BatchProgress,
    BatchPrompt,
    BatchResult,
    BatchStream,
    run_async,
)
from cacheserver.client.download import Download
from cacheserver.client.errors import UnreachableError, as_broken, error_of, unreachable
from cacheserver.client.fallback import AsyncFallback, Fallbacks, can_stand_in, result_of
from cacheserver.client.image_file import ImageFile
from cacheserver.client.multiplex import Multiplexer
from cacheserver.client.values import (
    CallExplanation,
    Delivery,
    ExplainResult,
    FindResult,
    GetOptions,
    ImageHeader,
    ImageOptions,
    ImageResult,
    ImageSpec,
    PurgeResult,
    PutOptions,
    PutResult,
    Stats,
    StreamEvent,
)
from cacheserver.client.warm import (
    DAY_S,
    WarmItem,
    WarmOptions,
    WarmProgress,
    WarmStream,
    read_progress,
)
from cacheserver.model import MatchLevel, StatsField, StatsSpan
from cacheserver.pb.promptcache_pb2 import BatchGetImagesRequest, ExplainCallRequest, GetImageRequest
from cacheserver.pb.promptcache_pb2_grpc import PromptCacheServiceStub

if TYPE_CHECKING:
    from cacheserver.client.admin import AsyncAdmin


class AsyncClient:
    """A connection to the cache service, for use from any number of tasks of one event loop.

    Connects on the first call and again whenever it must. Calls answered UNAVAILABLE are repeated, three times
    at most (and as often by a call of its own, where a stream had no place for it), as the service's pushback says;
    `batch` and `warm` are not. Every call ends within its `timeout_s` seconds and raises CacheError if it fails.
    Calls for a prompt carry `x-promptcache-route`, by which a proxy picks the replica: a hash, the same for equal
    namespaces and prompts. A stream that calls share carries none.
    """

    def __init__(  # noqa: PLR0913 - one keyword per way to connect
        self,
        address: str = channel.DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        certificate: tuple[bytes, bytes] | None = None,
        fallback: AsyncFallback | None = None,
        multiplex: bool = False,
    ) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            address: "host:port" or "unix:/path/to/socket".
            token: The caller's bearer token.
            tls: Use TLS. Implied by the next two.
            root_certificates: PEM certificates to trust instead of the usual authorities.
            certificate: The PEM certificate by which the service knows the caller, and its key.
            fallback: Makes a picture without the service: what `get_image` answers with where nobody answers at the
                address. A call that broke off when it had reached the service may then be paid for twice.
            multiplex: Let calls of `get_image`, `get_by_key` and `generate_many` that run at a time share a stream:
                hits cost the client and the service a fraction then. Answers and errors are those of calls of their
                own, and so are the deadline that the service knows and what a call that is cancelled ends there.
                What a stream has no place for, pictures that are not in memory beyond the service's
                `batch_in_flight`, goes by calls of their own. Off by default, because a proxy picks a replica once
                for a whole stream, where it would spread calls over all of them.
        """
        self._address = address
        self._fallback = fallback
        self._fallbacks = Fallbacks()
        self._is_closed = False
        self._metadata = channel.call_metadata(token)
        options = channel.CHANNEL_OPTIONS if fallback is None else channel.IMPATIENT_OPTIONS
        credentials = channel.credentials(tls=tls, root_certificates=root_certificates, certificate=certificate)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options)
        self._stub = PromptCacheServiceStub(self._channel)  # type: ignore[no-untyped-call] # generated without types
        self._multiplexer = Multiplexer(self._open_stream, self._ask_alone, address) if multiplex else None

    @functools.cached_property
    def admin(self) -> AsyncAdmin:
        """For whoever runs the service: upstreams, budgets, the ledger, reviews and stored pictures."""
        from cacheserver.client.admin import AsyncAdmin  # noqa: PLC0415 - a fifth of the import, for operators alone

        return AsyncAdmin(self._channel, self._call, self._stream)

    @property
    def fallbacks(self) -> int:
        """How many pictures the fallback has made so far."""
        return self._fallbacks.made

    async def get_image(
        self, prompt: str | ImageSpec, *, timeout_s: float = 120.0, **options: Unpack[GetOptions]
    ) -> ImageResult:
        """The picture(s) of a prompt from the fastest tier that has them, generated if none has.

        Where nobody answers at the address the client's fallback makes them, if it has one: `by_fallback` says so. An
        error that the service answers with is raised all the same.

        Raises:
            ImageTooLargeError: too large for one answer; `download` and `stream_image` carry any size.
            CacheError: the call failed otherwise.
        """
        request = messages.image_request(prompt, **options)
        try:
            return await self._ask(request, timeout_s)
        except UnreachableError:
            fallback = self._fallback
            if fallback is None or not can_stand_in(options):
                raise
            spec = messages.spec_of(prompt, options)
            return result_of([self._fallbacks.picture(await fallback(spec)) for _ in range(options.get("n", 1))])

    async def generate_many(
        self,
        prompts: Iterable[BatchPrompt],
        *,
        max_in_flight: int = 25,
        on_progress: Callable[[BatchProgress], None] | None = None,
        timeout_s: float = 300.0,
        **options: Unpack[BatchOptions],
    ) -> BatchResult:
        """The picture(s) of each of many prompts, at most `max_in_flight` of them asked for at once.

        A prompt that fails is its own item's failure and stops no other. One whose answer is UNAVAILABLE and says
        when to come back is asked for again then, five times in all and within its `timeout_s`. `on_progress` is
        called as each prompt ends. Cancelling it cancels the calls that run.
        What `on_progress` raises, too, ends the batch.

        All pictures are held in memory until the end: for thousands of them take `delivery=Delivery.URL`, or
        several batches.

        Raises:
            ValueError: `max_in_flight` is less than 1.
            TypeError: an option makes no sense for several prompts.
            InvalidRequestError: an option cannot be sent.
        """
        batch = Batch(prompts, options=options, timeout_s=timeout_s, on_progress=on_progress)
        return await run_async(batch, self._ask, max_in_flight)

    def batch(
        self,
        requests: Iterable[tuple[str, BatchPrompt]] | AsyncIterable[tuple[str, BatchPrompt]],
        *,
        timeout_s: float = 3_600.0,
        **options: Unpack[BatchOptions],
    ) -> AsyncGenerator[BatchAnswer]:
        """The answers to many requests over one stream, in the order they become ready: pairs of an id and its outcome.

        `requests` are pairs of an id of the caller's own and a prompt; they are taken from it only as fast as
        the service works on them, so there may be any number. A prompt that fails is its own outcome, a CacheError,
        and stops no other. For NEXT, REFRESH and NO_STORE the id keeps a request that is sent again from being paid
        for twice. `timeout_s` is for all of it. Close the generator to end it early.

        Raises:
            CacheError: the stream failed; what has no answer yet may be sent again.
            ValueError: an id is empty, or that of a request still unanswered.
            TypeError: an option makes no sense for several prompts.
            InvalidRequestError: an option cannot be sent.
        """
        return self._answers(BatchStream(options), requests, timeout_s)

    async def get_by_key(  # noqa: PLR0913 - one keyword per field that counts with a key
        self,
        key: str,
        *,
        namespace: str | None = None,
        delivery: Delivery | None = None,
        max_inline_bytes: int | None = None,
        max_wait_s: float | None = None,
        timeout_s: float = 120.0,
    ) -> ImageResult:
        """The picture of a key from an earlier answer; waits for one still being made, and never generates.

        Raises:
            KeyGoneError: no tier has it any more.
            CacheError: the call failed otherwise.
        """
        request = messages.image_request(
            None,
            key=key,
            namespace=namespace,
            delivery=delivery,
            max_inline_bytes=max_inline_bytes,
            max_wait_s=max_wait_s,
        )
        return await self._ask(request, timeout_s)

    def stream_image(
        self,
        prompt: str | ImageSpec | None = None,
        *,
        key: str | None = None,
        timeout_s: float = 120.0,
        **options: Unpack[ImageOptions],
    ) -> AsyncGenerator[StreamEvent]:
        """Pictures of any size: progress while waiting, then per picture a header and its bytes in chunks.

        A broken download of one picture goes on where it broke, checked against the digest announced.
        Close the generator to end it early.

        Raises:
            CorruptDownloadError: what arrived is not what was announced.
            CacheError: the call failed otherwise.
        """
        return self._events(Download(messages.image_request(prompt, key=key, **options)), timeout_s)

    async def download(
        self,
        path: str | Path,
        prompt: str | ImageSpec | None = None,
        *,
        key: str | None = None,
        timeout_s: float = 120.0,
        **options: Unpack[ImageOptions],
    ) -> ImageHeader:
        """Write one picture of any size to `path`, which is replaced once all of it is there and intact.

        A header whose state is PENDING (only with `max_wait_s`) or PENDING_REVIEW may come back, and nothing is
        written.

        Raises:
            ValueError: more than one picture was asked for.
            CacheError: the call failed.
            OSError: the file cannot be written.
        """
        if options.get("n", 1) != 1:
            raise ValueError("download writes one picture: use stream_image for several")
        events = self.stream_image(prompt, key=key, timeout_s=timeout_s, **options)
        file = ImageFile(Path(path))
        loop = asyncio.get_running_loop()
        disk = ThreadPoolExecutor(max_workers=1)  # one thread: what is discarded is discarded after all writes
        try:
            await loop.run_in_executor(disk, file.open)
            async with contextlib.aclosing(events):
                async for event in events:
                    await loop.run_in_executor(disk, file.take, event)
            return await loop.run_in_executor(disk, file.keep)
        finally:
            discarded = loop.run_in_executor(disk, file.discard)
            disk.shutdown(wait=False)
            await asyncio.shield(discarded)

    async def find_cached(
        self, items: Sequence[str | ImageSpec], *, namespace: str | None = None, timeout_s: float = 30.0
    ) -> FindResult:
        """In which tier each picture is, without bytes and without generating; at most 10,000 at once.

        Raises:
            CacheError: the call failed.
        """
        request = messages.find_request(items, namespace)
        return messages.read_found(await self._call(self._stub.FindCached, request, timeout_s))

    async def put(
        self, image: bytes | Path, prompt: str | ImageSpec, *, timeout_s: float = 120.0, **options: Unpack[PutOptions]
    ) -> PutResult:
        """Store an image the caller already has, from its bytes or a file.

        Raises:
            CacheError: the call failed.
            OSError: the file cannot be read.
        """
        data = await asyncio.to_thread(image.read_bytes) if isinstance(image, Path) else image
        requests = await asyncio.to_thread(messages.put_requests, data, prompt, **options)  # it hashes the image
        return messages.read_put(await self._call(self._stub.PutImage, requests, timeout_s))

    async def purge(  # noqa: PLR0913 - four ways to select
        self,
        *,
        prompt: str | ImageSpec | None = None,
        key: str | None = None,
        tag: str | None = None,
        everything: bool = False,
        namespace: str | None = None,
        dry_run: bool = False,
        timeout_s: float = 120.0,
    ) -> PurgeResult:
        """Remove pictures from every tier: all of a prompt, one key, a tag, or everything of the namespace.

        Raises:
            TryAgainError: a tier could not be purged; purge again.
            CacheError: the call failed otherwise.
        """
        request = messages.purge_request(
            prompt=prompt, key=key, tag=tag, everything=everything, namespace=namespace, dry_run=dry_run
        )
        return messages.read_purge(await self._call(self._stub.PurgeImages, request, timeout_s))

    async def explain(
        self,
        prompt: str | ImageSpec,
        other: str | ImageSpec | None = None,
        *,
        namespace: str | None = None,
        match_level: MatchLevel | None = None,
        timeout_s: float = 30.0,
    ) -> ExplainResult:
        """How a request becomes its key and, with `other`, why the two keys differ.

        Raises:
            CacheError: the call failed.
        """
        request = messages.explain_request(prompt, other, namespace=namespace, match_level=match_level)
        return messages.read_explained(await self._call(self._stub.ExplainKey, request, timeout_s))

    async def explain_call(self, request_id: str, *, timeout_s: float = 30.0) -> CallExplanation:
        """What became of an earlier call, by its x-request-id: one's own, or with the permission admin anybody's.

        Raises:
            UnknownCallError: the replica that answers remembers no such call.
            CacheError: the call failed otherwise.
        """
        request = ExplainCallRequest(request_id=request_id)
        return messages.read_call(await self._call(self._stub.ExplainCall, request, timeout_s))

    async def warm(
        self, items: Iterable[WarmItem], *, timeout_s: float = DAY_S, **options: Unpack[WarmOptions]
    ) -> AsyncGenerator[WarmProgress]:
        """Fill the cache with what these items ask for, at low priority; see WarmOptions.

        Items are taken from the iterable as the service works them off. Close the
        generator to end it early: what is being paid for is finished and kept. It is not begun anew by itself where it
        breaks; run again, it goes on where it was, since what is cached is not paid for.

        Raises:
            InvalidRequestError: an option or item cannot be sent, or the options are out of their range. What was
                sent before such an item is done by then, as it is where the iterable itself raises.
            CacheError: the call failed otherwise.
        """
        stream = WarmStream(items, options)
        answers = self._stream(self._stub.WarmImages, stream.messages(), timeout_s)
        async with contextlib.aclosing(answers) as responses:
            async for response in responses:
                yield read_progress(response)
        stream.finish()

    async def stats(  # noqa: PLR0913 - one keyword per field of the message
        self,
        namespace: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        span: StatsSpan | None = None,
        by: Sequence[StatsField] | None = None,
        timeout_s: float = 30.0,
    ) -> Stats:
        """Counters of one namespace, or of all the caller may read.

        With neither `since` nor `until`: those of the process that answers, since it started. With either: those of
        all replicas in that span of time. `span` tells rows apart by time, `by` by what it names (without: by
        namespace, outcome and tier); rows by caller are for those with the permission admin.

        Raises:
            CacheError: the call failed.
        """
        request = messages.stats_request(namespace=namespace, since=since, until=until, span=span, by=by)
        return messages.read_stats(await self._call(self._stub.GetStats, request, timeout_s))

    async def close(self) -> None:
        """Let go of the connection. Calls that still run end with CacheError."""
        self._fallback = None
        self._is_closed = True
        if self._multiplexer is not None:
            await self._multiplexer.aclose()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, request: GetImageRequest, timeout_s: float) -> ImageResult:
        multiplexer = self._multiplexer
        # What the fallback made is told with a call of its own: a stream's metadata are sent once, when it begins.
        if multiplexer is None or self._fallbacks.are_untold or not multiplexer.carries(request):
            return await self._ask_alone(request, timeout_s)
        return await multiplexer.ask(request, timeout_s)

    async def _ask_alone(self, request: GetImageRequest, timeout_s: float) -> ImageResult:
        call_id = channel.call_id()
        answer = await self._call(self._stub.GetImage, request, timeout_s, call_id)
        return messages.read_result(answer, call_id)

    def _open_stream(self, requests: AsyncIterator[BatchGetImagesRequest], call_id: str) -> Any:
        return self._stub.BatchGetImages(requests, metadata=(*self._metadata, ("x-request-id", call_id)))

    async def _call(self, method: Any, request: Any, timeout_s: float, call_id: str = "") -> Any:
        named = (("x-request-id", call_id),) if call_id else ()
        try:
            with self._fallbacks.telling() as told:
                metadata = (*self._metadata, *told, *named, *channel.route_metadata(request))
                return await method(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as exc:
            raise error_of(exc, self._address) from exc
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and task is not None and not task.cancelling():  # the call was cancelled, not its caller
                raise unreachable(self._address) from None
            raise

    async def _stream(self, method: Any, request: Any, timeout_s: float, call_id: str = "") -> AsyncGenerator[Any]:
        named = (("x-request-id", call_id),) if call_id else ()
        call = method(request, timeout=timeout_s, metadata=(*self._metadata, *named))
        try:
            async for response in call:
                yield response
        except grpc.RpcError as exc:
            raise as_broken(error_of(exc, self._address)) from exc
        finally:
            call.cancel()

    async def _answers(
        self,
        stream: BatchStream,
        requests: Iterable[tuple[str, BatchPrompt]] | AsyncIterable[tuple[str, BatchPrompt]],
        timeout_s: float,
    ) -> AsyncGenerator[BatchAnswer]:
        async with contextlib.aclosing(
            self._stream(self._stub.BatchGetImages, stream.messages_async(requests), timeout_s, stream.call_id)
        ) as responses:
            async for response in responses:
                for answer in stream.read(response):
                    yield answer
        for answer in stream.finish():
            yield answer

    async def _events(self, download: Download, timeout_s: float) -> AsyncGenerator[StreamEvent]:
        ends_s = time.monotonic() + timeout_s
        metadata = (*self._metadata, *channel.route_metadata(download.request))
        while not download.complete:
            call = self._stub.StreamImage(
                download.next_request(),
                timeout=ends_s - time.monotonic(),
                metadata=metadata,
                wait_for_ready=download.resumed,
            )
            try:
                async for response in call:
                    event = download.read(response)
                    if event is not None:
                        yield event
            except grpc.RpcError as exc:
                error = error_of(exc, self._address)
                pause_s = download.pause_s(error)
                if pause_s is None or (pause_s and pause_s >= ends_s - time.monotonic()):
                    raise error from exc
                if pause_s:
                    await asyncio.sleep(pause_s)
            else:
                break
            finally:
                call.cancel()
        download.finish()
