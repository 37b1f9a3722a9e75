"""Whether a failed call is worth another try: by class of failure, and within a share of all traffic."""

from __future__ import annotations

from random import Random

from cacheserver.errors import (
    UpstreamBadImageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)

MAX_TRIES = 3
"""Calls for one answer that may fail by the upstream's fault."""

_AT_ONCE = 100.0
"""What an upstream may have in flight when it dies: each of these is worth a retry, however young the service is."""

_MOST_SAVED = 400.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class RetryBudget:
    """Keeps a provider's outage from becoming a storm: retries are at most a share of all calls.

    A token bucket filled by calls instead of time (as in Finagle's retry budgets): each call earns `share` of a
    retry, each retry takes one. A hundred are there from the start, so that a quiet service may retry too.
    """

    def __init__(self, *, share: float) -> None:
        """`share` is 0 to 1; 0 never retries."""
        self._share = share
        self._saved = _AT_ONCE if share else 0.0

    def earn(self) -> None:
        """A call is made for the first time."""
        self._saved = min(self._saved + self._share, _MOST_SAVED)

    def spend(self) -> bool:
        """Take one retry; False if none is left."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class Tries:
    """The tries of one call so far."""

    def __init__(self, budget: RetryBudget) -> None:
        self._budget = budget
        self._failed = 0
        self._unknown = 0
        self._paused = 0
        budget.earn()

    def may_retry(self, error: UpstreamError, *, has_other: bool) -> bool:
        """Whether to try again after `error`; `has_other`: an upstream is left that has not failed this call.

        A rate limit is no failure: the call waits for its next turn, however often. What one upstream lacks the
        right or the money for goes to another. What the upstream did wrong is tried three times in all, but a call
        whose outcome nobody knows may have been paid for, so it is made at most once more. All else is final.
        """
        match error:
            case UpstreamLimitedError():
                return True
            case UpstreamQuotaError() | UpstreamNotEntitledError():
                return has_other
            case UpstreamDownError() | UpstreamBadImageError():
                self._failed += 1
                self._unknown += error.cost_microusd is None
                return self._failed < MAX_TRIES and self._unknown <= 1 and self._budget.spend()
            case _:
                return False

    def pause_s(self, error: UpstreamError, rng: Random, *, has_other: bool) -> float:
        """How long to wait before the next try: not at all if it goes to another upstream.

        A rate limit is waited for where turns are given. Otherwise exponentially longer, with full jitter.
        """
        if has_other or isinstance(error, UpstreamLimitedError):
            return 0.0
        self._paused += 1
        return rng.uniform(0, min(_FIRST_PAUSE_S * 2**self._paused, _LONGEST_PAUSE_S))
