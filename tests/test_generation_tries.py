"""What is tried again, and what is not: by class of failure, and within a share of all traffic."""

from __future__ import annotations

from random import Random

import pytest

from cacheserver.errors import (
    PromptRefusedError,
    QueueFullError,
    UpstreamBadImageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamInvalidError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
from cacheserver.generation.tries import MAX_TRIES, RetryBudget, Tries

NOT_SENT = UpstreamDownError("refused")
UNKNOWN = UpstreamDownError("reset", cost_microusd=None)


def tries(share: float = 0.1) -> Tries:
    return Tries(RetryBudget(share=share))


def granted(of: Tries, error: UpstreamError, *, has_other: bool = True) -> int:
    """How many retries in a row `error` is worth, counted up to ten."""
    return next((n for n in range(10) if not of.may_retry(error, has_other=has_other)), 10)


@pytest.mark.parametrize(
    "error", [PromptRefusedError("no"), UpstreamInvalidError("no"), QueueFullError("no")], ids=lambda e: e.reason
)
def test_what_would_fail_again_is_never_tried_again(error: UpstreamError) -> None:
    assert granted(tries(), error) == 0


def test_what_failed_before_it_was_sent_or_was_answered_with_an_error_is_tried_three_times_in_all() -> None:
    assert granted(tries(), NOT_SENT) == MAX_TRIES - 1 == 2


def test_a_bad_picture_that_was_billed_is_tried_three_times_in_all() -> None:
    assert granted(tries(), UpstreamBadImageError("blank", cost_microusd=53_000)) == 2


def test_what_may_have_been_paid_for_is_tried_once_more_at_most() -> None:
    assert granted(tries(), UNKNOWN) == 1


def test_a_known_failure_after_an_unknown_one_leaves_three_tries_in_all() -> None:
    of = tries()
    assert of.may_retry(UNKNOWN, has_other=True)
    assert of.may_retry(NOT_SENT, has_other=True)
    assert not of.may_retry(NOT_SENT, has_other=True)


def test_a_rate_limit_is_no_failure() -> None:
    of = tries(share=0.0)
    assert granted(of, UpstreamLimitedError("slow down")) == 10


@pytest.mark.parametrize("error", [UpstreamQuotaError("no money"), UpstreamNotEntitledError("no right")])
def test_what_a_person_must_mend_is_tried_elsewhere_only(error: UpstreamError) -> None:
    assert tries(share=0.0).may_retry(error, has_other=True)
    assert not tries().may_retry(error, has_other=False)


def test_retries_are_a_tenth_of_all_calls_once_the_first_hundred_are_spent() -> None:
    budget = RetryBudget(share=0.1)
    for _ in range(1_000):
        Tries(budget)
    assert sum(budget.spend() for _ in range(1_000)) == pytest.approx(200, abs=1)
    retried = sum(Tries(budget).may_retry(NOT_SENT, has_other=True) for _ in range(1_000))
    assert retried == pytest.approx(100, abs=1)


def test_a_share_of_nothing_retries_nothing() -> None:
    assert granted(tries(share=0.0), NOT_SENT) == 0


def test_pauses_grow_with_each_try_at_the_same_upstream_and_are_none_at_another() -> None:
    class Longest(Random):
        def uniform(self, a: float, b: float) -> float:
            assert a == 0
            return b

    of = tries()
    assert of.pause_s(NOT_SENT, Longest(), has_other=True) == 0
    assert [of.pause_s(NOT_SENT, Longest(), has_other=False) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert of.pause_s(UpstreamLimitedError("slow down"), Longest(), has_other=False) == 0
