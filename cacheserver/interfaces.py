"""What the parts of the house promise one another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from cacheserver.model import (
    CachedImage,
    CacheKey,
    GeneratedImage,
    ImageRequest,
    Labels,
    Outcome,
    Priority,
    Replay,
    TierName,
)


class Clock(Protocol):
    """Time, passed in so that tests decide it."""

    def now_s(self) -> float:
        """Wall-clock seconds since 1970: for what outlives the process."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that only go forward: for durations and deadlines inside the process."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        ...


class Tier(Protocol):
    """A slower cache under memory. May lose entries at any time; never returns a wrong one.

    Every read is verified: length and xxh3-128 of the bytes, identity digest, codec version. Raises
    TierError and nothing else: TierTimeoutError, CorruptEntryError and NewerEntryError where they apply.
    A raised TierError means unknown; None means known absent. Every call may be repeated.
    """

    @property
    def name(self) -> TierName:
        """Which tier this is."""
        ...

    async def get(self, key: CacheKey) -> CachedImage | None:
        """The intact, fresh entry stored under `key`; None if there is none, it expired or is another identity's.

        The entry's own key may name another variant: a stand-in keeps the key it was made for.
        """
        ...

    async def find(self, keys: Sequence[CacheKey]) -> list[bool]:
        """For each key whether something is stored under it. Cheap: neither reads nor verifies the bytes."""
        ...

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        """Store `entry` under `key`; on True the tier has acknowledged exactly these bytes.

        Without `replace`, False means that an intact, fresh entry of this identity with other bytes holds the
        key, and nothing was written; equal bytes are True. A damaged, expired or foreign entry is overwritten.
        With `replace` whatever is there is overwritten, except that False still means another writer was
        faster. An entry above the tier's size limit raises TierError.
        """
        ...

    async def delete(self, key: CacheKey) -> bool:
        """Remove what is stored under `key`; whether there was something."""
        ...

    def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        """Every key of a partition, in no order; one that comes or goes meanwhile may be missed. Stand-ins included."""
        ...

    async def labels(self, key: CacheKey) -> Labels | None:
        """The labels of the entry under `key`, without its bytes; None if there is none or it is damaged."""
        ...

    async def ping(self) -> None:
        """Return if reads and writes would work now; raise TierError if not."""
        ...

    async def aclose(self) -> None:
        """Let go of connections and threads. Nothing else may be called afterwards."""
        ...


class SigningTier(Tier, Protocol):
    """A tier that hands out URLs."""

    async def signed_url(self, entry: CachedImage, expires_s: int) -> str:
        """A URL that serves `entry`'s bytes for `expires_s` seconds.

        The object is written first unless the tier has acknowledged this very digest. Raises TierError.
        """
        ...


class Upstream(Protocol):
    """One endpoint, credential and model deployment that makes pictures. Slow, and every call costs money."""

    @property
    def name(self) -> str:
        """Its name in config, metrics and logs."""
        ...

    async def generate(self, request: ImageRequest, variants: Sequence[int]) -> list[GeneratedImage]:
        """Make one picture for each of `variants`, in as few calls as the provider allows.

        Providers read only how many there are. Fewer pictures may come back, never none, and each has been
        decoded. Raises UpstreamError. Cancelling loses what was paid for, so only the owner of a flight may.
        """
        ...

    async def check(self) -> None:
        """Return if the endpoint answers and accepts our key, at no cost; raise UpstreamError if not."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...


class Generation(Protocol):
    """The miss path: everything between a true miss and a picture. It knows nothing of the cache."""

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        ...

    async def generate(
        self,
        request: ImageRequest,
        variants: Sequence[int],
        *,
        priority: Priority,
        on_spending: Callable[[], None],
    ) -> list[GeneratedImage]:
        """Make pictures for `variants`, in order; fewer may come back, never none.

        `on_spending` is called right before money is spent: until then the call may be cancelled for free,
        from then on cancelling it loses what was paid. Raises UpstreamError, or InvalidRequestError for a
        model nobody serves.
        """
        ...

    def estimated_wait_s(self, model: str, since_s: float) -> float:
        """How much longer a generation asked for at `since_s` (monotonic) is expected to take."""
        ...

    def estimate_microusd(self, request: ImageRequest, n: int) -> int:
        """What `n` pictures may cost at most, in micro-dollars; 0 where no price is known."""
        ...


class Replays(Protocol):
    """What calls with a request_id were given, for 24 hours: a call sent again never pays again.

    Control state, not cache: it must survive Redis eviction. Never raises: where Redis is gone, what this
    process remembers is all there is.
    """

    async def recall(self, replay_id: str) -> Replay | None:
        """What the call of this id was given, None if nothing is known."""
        ...

    async def remember(self, replay_id: str, replay: Replay) -> None:
        """Keep what the call of this id was given."""
        ...


class Books(Protocol):
    """Where everything that happened is counted, once. Plain counters: cheap enough for the hit path."""

    def answered(  # noqa: PLR0913 - as many columns as a row of the books
        self,
        namespace: str,
        outcome: Outcome,
        tier: TierName | None,
        *,
        seconds: float,
        image_bytes: int = 0,
        saved_microusd: int = 0,
    ) -> None:
        """One picture was answered."""
        ...

    def spent(self, namespace: str, microusd: int) -> None:
        """A generation was paid for: booked where it is spent, whether or not anyone still waits."""
        ...

    def tier_seconds(self, tier: TierName, op: str, seconds: float) -> None:
        """A tier took this long for `op`."""
        ...

    def breaker(self, tier: TierName, *, is_open: bool) -> None:
        """A tier's breaker opened or closed."""
        ...

    def corrupt(self, tier: TierName) -> None:
        """A damaged entry was found."""
        ...

    def error(self, reason: str) -> None:
        """A call failed for this published reason."""
        ...

    def upstream_call(self, upstream: str, model: str, result: str, seconds: float) -> None:
        """An upstream was called; `result` is "ok" or the published reason."""
        ...

    def paid_unknown(self) -> None:
        """A picture was paid for though the last tier could not be asked."""
        ...

    def unsaved(self, change: int) -> None:
        """So many more (or fewer) images are held that no lower tier has acknowledged."""
        ...
