"""Many prompts at once: what a batch is made of, and how both clients run it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from typing import Any, Final

import grpc

from cacheserver.client import channel, messages
from cacheserver.client.errors import CacheError, InvalidRequestError, TryAgainError, error_of_item
from cacheserver.client.values import Delivery, ImageResult, ImageSpec, SpecOptions
from cacheserver.model import CachePolicy, MatchLevel, Priority, TierName, VariantPolicy
from cacheserver.pb import promptcache_pb2 as pb

BatchPrompt = str | ImageSpec | Mapping[str, Any]
"""A prompt alone, or with parameters of its own: an ImageSpec, or a mapping that holds its fields."""

BatchAnswer = tuple[str, ImageResult | CacheError]
"""A request's id, and its pictures or how it failed."""

_MAX_TRIES: Final = 5
"""How often an item is asked for in all while the service says when to come back."""

_SPEC_FIELDS: Final = frozenset(each.name for each in fields(ImageSpec))


class BatchOptions(SpecOptions, total=False):
    """What is said of every prompt of a batch, as keyword arguments; see ImageOptions and GetOptions.

    What a prompt says of itself goes before it.
    """

    namespace: str | None
    n: int
    cache_policy: CachePolicy | None
    max_age_s: float | None
    ttl_s: float | None
    variant_policy: VariantPolicy | None
    delivery: Delivery | None
    max_inline_bytes: int | None
    priority: Priority | None
    tags: Sequence[str]
    allow_degraded: bool
    use: str | None
    candidates: int | None
    match_level: MatchLevel | None


@dataclass(frozen=True, slots=True)
class BatchItem:
    """What became of one prompt: either `result` or `error` is there.

    Attributes:
        index: Its place among the prompts, from 0.
        prompt: As it was given.
        seconds: How long it took, waits between tries included.
    """

    index: int
    prompt: BatchPrompt = field(repr=False)
    result: ImageResult | None
    error: CacheError | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether there are pictures: a result that is not still waiting for a person's review."""
        return self.result is not None and not self.result.pending


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """How far a batch has come: `item` has just ended, `done` of `asked` have, and `failed` of those failed."""

    item: BatchItem
    asked: int
    done: int
    failed: int
    cost_microusd: int
    saved_microusd: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """A batch in numbers.

    Attributes:
        asked: How many prompts.
        ok: How many were answered with pictures.
        pending: How many have pictures that wait for a person's review: collect them by their keys.
        failed: How many failed, by the reason; where the service gave none, by the code.
        tiers: How many were answered by each tier; UPSTREAM for pictures generated now.
        cost_microusd: What the batch paid.
        saved_microusd: What it would have paid without the cache.
        seconds: How long it took.
    """

    asked: int
    ok: int
    pending: int
    failed: Mapping[str, int]
    tiers: Mapping[TierName, int]
    cost_microusd: int
    saved_microusd: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of every prompt, in the order given, and all of it in numbers."""

    items: tuple[BatchItem, ...]
    summary: BatchSummary


class Requests:
    """Makes the messages of a batch.

    Raises:
        TypeError: an option nobody knows, or that makes no sense for several prompts.
        InvalidRequestError: an option cannot be sent.
    """

    def __init__(self, options: BatchOptions) -> None:
        if unknown := options.keys() - BatchOptions.__optional_keys__:
            raise TypeError(f"no option of a batch: {', '.join(sorted(unknown))}")
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        self._common = {name: value for name, value in given.items() if name in _SPEC_FIELDS}
        self._terms = {name: value for name, value in given.items() if name not in _SPEC_FIELDS}
        self("a prompt")  # what is wrong with the options is wrong with all of them

    def __call__(self, prompt: BatchPrompt, request_id: str | None = None) -> pb.GetImageRequest:
        """The message for one prompt. One request_id, if any, is that of all its tries: none of them pays twice.

        Raises:
            InvalidRequestError: it cannot be sent.
        """
        spec = ImageSpec(**(self._common | _fields(prompt)))
        return messages.image_request(spec, request_id=request_id, **self._terms)


class BatchStream:
    """One stream of requests and answers. What cannot be sent is answered here.

    Requests are made as gRPC takes them, in a thread or task of its own, and answers read in the caller's. What
    making them raises ends the requests; the caller hears of it after the answers to those that were sent.
    """

    def __init__(self, options: BatchOptions) -> None:
        """`options` are those of `Requests`, which raises what is wrong with them."""
        self.call_id = channel.call_id()
        """The x-request-id of the stream."""
        self._request = Requests(options)
        self._sent = 0
        self._waiting: dict[str, str] = {}  # the x-request-ids of those without an answer
        self._unsent: deque[tuple[str, CacheError]] = deque()
        self._error: Exception | None = None

    def messages(self, requests: Iterable[tuple[str, BatchPrompt]]) -> Iterator[pb.BatchGetImagesRequest]:
        """A message for each request, as it is sent."""
        try:
            for request_id, prompt in requests:
                if (message := self._message(request_id, prompt)) is not None:
                    yield message
        except Exception as error:  # noqa: BLE001 - the caller's own, and raised to it by `finish`
            self._error = error

    async def messages_async(
        self, requests: Iterable[tuple[str, BatchPrompt]] | AsyncIterable[tuple[str, BatchPrompt]]
    ) -> AsyncIterator[pb.BatchGetImagesRequest]:
        """The same for a source that may be asynchronous."""
        if not isinstance(requests, AsyncIterable):
            for ready in self.messages(requests):
                yield ready
            return
        try:
            async for request_id, prompt in requests:
                if (message := self._message(request_id, prompt)) is not None:
                    yield message
        except Exception as error:  # noqa: BLE001 - the caller's own, and raised to it by `finish`
            self._error = error

    def read(self, response: pb.BatchGetImagesResponse) -> Iterator[BatchAnswer]:
        """What has been answered by now."""
        yield from self._unsendable()
        for item in response.items:
            call_id = self._waiting.pop(item.request_id, "")
            if item.HasField("response"):
                yield item.request_id, messages.read_result(item.response, call_id)
            else:
                yield item.request_id, error_of_item(item.failure)

    def finish(self) -> Iterator[BatchAnswer]:
        """What is left to be answered once the stream has ended; raises what making the requests raised."""
        yield from self._unsendable()
        if self._error is not None:
            raise self._error

    def _message(self, request_id: str, prompt: BatchPrompt) -> pb.BatchGetImagesRequest | None:
        if not request_id or request_id in self._waiting:
            raise ValueError("every request of a batch needs a request_id that none still unanswered has")
        try:
            request = self._request(prompt, request_id)
        except InvalidRequestError as error:
            self._unsent.append((request_id, error))
            return None
        self._sent += 1
        self._waiting[request_id] = channel.item_id(self.call_id, request_id, self._sent)
        return pb.BatchGetImagesRequest(requests=[request])

    def _unsendable(self) -> Iterator[BatchAnswer]:
        while self._unsent:
            yield self._unsent.popleft()


class Batch:
    """A batch that runs: makes its messages, and collects what comes back. Belongs to one thread or loop."""

    def __init__(
        self,
        prompts: Iterable[BatchPrompt],
        *,
        options: BatchOptions,
        timeout_s: float,
        on_progress: Callable[[BatchProgress], None] | None,
    ) -> None:
        """`options` hold for every prompt, and each may take `timeout_s`.

        Raises:
            TypeError: an option nobody knows, or that makes no sense for several prompts.
            InvalidRequestError: an option cannot be sent.
        """
        self.prompts = list(prompts)
        self.timeout_s = timeout_s
        self._request = Requests(options)
        self._on_progress = on_progress
        self._items: list[BatchItem | None] = [None] * len(self.prompts)
        self._failed: Counter[str] = Counter()
        self._tiers: Counter[TierName] = Counter()
        self._done = self._cost_microusd = self._saved_microusd = 0
        self._begun_s = time.monotonic()

    def begin(self, index: int) -> Attempts:
        """Begin with one prompt.

        Raises:
            InvalidRequestError: it cannot be sent.
        """
        return Attempts(self._request(self.prompts[index]), self.timeout_s)

    def end(self, index: int, answer: ImageResult | CacheError, seconds: float) -> None:
        """Note what became of one prompt, and tell of it."""
        if isinstance(answer, ImageResult):
            item = BatchItem(index, self.prompts[index], answer, None, seconds)
            self._cost_microusd += answer.status.cost_microusd
            self._saved_microusd += answer.status.saved_microusd
            if answer.tier is not None:
                self._tiers[answer.tier] += 1
        else:
            item = BatchItem(index, self.prompts[index], None, answer, seconds)
            self._failed[answer.reason or answer.code.name] += 1
        self._items[index] = item
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._progress(item))

    def result(self) -> BatchResult:
        """What became of everything, once every prompt has ended."""
        items = tuple(item for item in self._items if item is not None)
        summary = BatchSummary(
            asked=len(self.prompts),
            ok=sum(item.ok for item in items),
            pending=sum(item.result is not None and item.result.pending for item in items),
            failed=dict(self._failed.most_common()),
            tiers={tier: self._tiers[tier] for tier in TierName if self._tiers[tier]},
            cost_microusd=self._cost_microusd,
            saved_microusd=self._saved_microusd,
            seconds=time.monotonic() - self._begun_s,
        )
        return BatchResult(items, summary)

    def _progress(self, item: BatchItem) -> BatchProgress:
        return BatchProgress(
            item=item,
            asked=len(self.prompts),
            done=self._done,
            failed=self._failed.total(),
            cost_microusd=self._cost_microusd,
            saved_microusd=self._saved_microusd,
            seconds=time.monotonic() - self._begun_s,
        )


class Attempts:
    """The tries at one prompt: its message, how much time is left, and whether there is another try."""

    def __init__(self, request: pb.GetImageRequest, timeout_s: float) -> None:
        self.request = request
        self._ends_s = time.monotonic() + timeout_s
        self._tries = 1

    @property
    def left_s(self) -> float:
        """Seconds that the prompt still has."""
        return self._ends_s - time.monotonic()

    def pause_s(self, error: TryAgainError) -> float:
        """Seconds to wait before another try; raises `error` on if there is none: no word when, no time, too many."""
        pause_s = error.retry_after_s
        if pause_s is None or pause_s >= self.left_s or self._tries == _MAX_TRIES:
            raise error
        self._tries += 1
        return pause_s


async def run_async(
    batch: Batch, get_image: Callable[[pb.GetImageRequest, float], Awaitable[ImageResult]], max_in_flight: int
) -> BatchResult:
    """Run a batch with at most `max_in_flight` prompts at once. Cancelling it cancels the calls that run."""

    async def ask(index: int) -> ImageResult:
        attempts = batch.begin(index)
        while True:
            try:
                return await get_image(attempts.request, attempts.left_s)
            except TryAgainError as error:
                await asyncio.sleep(attempts.pause_s(error))

    async def work() -> None:
        for index in waiting:
            begun_s = time.monotonic()
            answer: ImageResult | CacheError
            try:
                answer = await ask(index)
            except CacheError as error:
                answer = error
            batch.end(index, answer, time.monotonic() - begun_s)

    waiting = iter(range(len(batch.prompts)))  # shared: whoever is free takes the next
    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(_at_least_one(max_in_flight), len(batch.prompts))):
                workers.create_task(work(), name="generate_many")
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None  # what on_progress raised, as it raised it
    return batch.result()


def run_in_threads(
    batch: Batch, get_image: Callable[[pb.GetImageRequest, float], Any], max_in_flight: int
) -> BatchResult:
    """Run a batch in `max_in_flight` threads. What ends it early waits for the calls that run, and starts no other."""

    def ask(index: int) -> ImageResult:
        attempts = batch.begin(index)
        while True:
            try:
                return messages.read_result(get_image(attempts.request, attempts.left_s))
            except TryAgainError as error:
                time.sleep(attempts.pause_s(error))

    def work(index: int) -> tuple[int, ImageResult | CacheError, float]:
        begun_s = time.monotonic()
        answer: ImageResult | CacheError
        try:
            answer = ask(index)
        except CacheError as error:
            answer = error
        return index, answer, time.monotonic() - begun_s

    with ThreadPoolExecutor(_at_least_one(max_in_flight), thread_name_prefix="generate_many") as threads:
        try:
            for ended in as_completed([threads.submit(work, index) for index in range(len(batch.prompts))]):
                batch.end(*ended.result())
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
    return batch.result()


def _at_least_one(max_in_flight: int) -> int:
    if max_in_flight < 1:
        raise ValueError("max_in_flight must be at least 1")
    return max_in_flight


def _fields(prompt: BatchPrompt) -> dict[str, Any]:
    """What a prompt says of itself.

    Raises:
        InvalidRequestError: it is no prompt, or says what no ImageSpec does.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, ImageSpec):
        return {name: value for name in _SPEC_FIELDS if (value := getattr(prompt, name)) is not None}
    if isinstance(prompt, Mapping) and "prompt" in prompt and prompt.keys() <= _SPEC_FIELDS:
        return dict(prompt)
    what = "must be a text, an ImageSpec, or a mapping with a prompt and no other than the fields of an ImageSpec"
    raise InvalidRequestError(
        f"spec: {what}", code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_FIELD", violations={"spec": what}
    )
