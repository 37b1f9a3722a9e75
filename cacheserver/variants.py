"""Which of a request's pictures an answer holds: the variant policies, as functions of what is stored."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from itertools import count
from random import Random

from cachetools import TTLCache

_REMEMBERED_S = 86_400
_REMEMBERED_CALLS = 100_000


def with_new_ones(chosen: list[int], stored: set[int], n: int) -> tuple[int, ...]:
    """`chosen`, filled up to `n` with the lowest numbers not stored yet: those will be generated."""
    free = (variant for variant in count() if variant not in stored)
    return (*chosen, *(next(free) for _ in range(n - len(chosen))))


def random_ones(stored: set[int], n: int, rng: Random) -> tuple[int, ...]:
    """Any `n` of the stored ones."""
    return with_new_ones(rng.sample(sorted(stored), min(n, len(stored))), stored, n)


def sticky_ones(stored: set[int], n: int, *, caller: str, identity_name: str) -> tuple[int, ...]:
    """The same `n` of the stored ones for the same caller.

    Rendezvous hashing (Thaler and Ravishankar, 1998): a variant that comes later takes only the callers that
    rank it first, everyone else keeps theirs.
    """

    def rank(variant: int) -> bytes:
        return blake2b(f"{caller}\0{identity_name}\0{variant}".encode(), digest_size=8).digest()

    return with_new_ones(sorted(stored, key=rank)[:n], stored, n)


class AnotherOne:
    """The NEXT policy, with its memory of what each caller was given: "give me another one", and again."""

    def __init__(self, *, monotonic_s: Callable[[], float]) -> None:
        """What was given is remembered for a day, for the 100,000 latest pairs of caller and request."""
        self._given: TTLCache[tuple[str, str], dict[int, None]] = TTLCache(
            _REMEMBERED_CALLS, ttl=_REMEMBERED_S, timer=monotonic_s
        )

    def choose(  # noqa: PLR0913 - the whole of what the choice depends on
        self, *, caller: str, identity_name: str, stored: set[int], excluded: set[int], n: int, max_variants: int
    ) -> tuple[int, ...]:
        """`n` variants this caller was not given by NEXT and does not exclude, and note them as given.

        Stored ones first; then numbers nobody has, which will be generated, an excluded one last (its picture is
        gone, so another will be made); and once the request has all its `max_variants`, the ones given to this
        caller longest ago.
        """
        given = self._given.get((caller, identity_name), {})
        # A number that was given and is not stored was never made, or was purged: it is free again.
        known = excluded | (given.keys() & stored)
        chosen = [variant for variant in sorted(stored) if variant not in known][:n]
        new = sorted((v for v in range(max_variants) if v not in stored), key=excluded.__contains__)
        chosen += [variant for variant, _ in zip(new, range(n - len(chosen)), strict=False)]
        longest_ago = [v for v in given if v in stored and v not in excluded] + sorted(stored)
        chosen += [v for v in dict.fromkeys(longest_ago) if v not in chosen][: n - len(chosen)]
        for variant in chosen:
            given.pop(variant, None)
            given[variant] = None
        self._given[caller, identity_name] = given
        return tuple(chosen)
