"""Every published reason has its code, and every error of ours a reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, PreconditionFailure, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from cacheserver import errors
from cacheserver.errors import CacheServerError
from cacheserver.model import TierName
from cacheserver.rpc.status import CODES, RpcStatus, status_of

M = TypeVar("M", bound=Message)

PUBLISHED = {
    "INVALID_FIELD": "INVALID_ARGUMENT",
    "MALFORMED_MESSAGE": "INVALID_ARGUMENT",
    "NOT_IMPLEMENTED": "UNIMPLEMENTED",
    "UNAUTHENTICATED": "UNAUTHENTICATED",
    "PERMISSION_DENIED": "PERMISSION_DENIED",
    "NOT_CACHED": "NOT_FOUND",
    "KEY_GONE": "NOT_FOUND",
    "REVIEW_GONE": "NOT_FOUND",
    "UPSTREAM_UNKNOWN": "NOT_FOUND",
    "CALL_UNKNOWN": "NOT_FOUND",
    "OFFSET_OUT_OF_RANGE": "OUT_OF_RANGE",
    "REQUEST_ID_RUNNING": "ABORTED",
    "DEADLINE_TOO_SHORT": "DEADLINE_EXCEEDED",
    "PROMPT_REFUSED": "FAILED_PRECONDITION",
    "PROMPT_DENIED": "FAILED_PRECONDITION",
    "PII_FOUND": "FAILED_PRECONDITION",
    "IMAGE_TOO_LARGE": "FAILED_PRECONDITION",
    "IMAGE_CHANGED": "FAILED_PRECONDITION",
    "NO_SIGNED_URLS": "FAILED_PRECONDITION",
    "REQUEST_ID_SPENT": "FAILED_PRECONDITION",
    "UPSTREAM_NOT_ENTITLED": "FAILED_PRECONDITION",
    "BUDGET_EXHAUSTED": "RESOURCE_EXHAUSTED",
    "UPSTREAM_QUOTA_EXHAUSTED": "RESOURCE_EXHAUSTED",
    "VARIANTS_EXHAUSTED": "RESOURCE_EXHAUSTED",
    "QUEUE_FULL": "UNAVAILABLE",
    "UPSTREAM_LIMITED": "UNAVAILABLE",
    "UPSTREAM_DOWN": "UNAVAILABLE",
    "UPSTREAM_BAD_IMAGE": "UNAVAILABLE",
    "CACHE_UNKNOWN": "UNAVAILABLE",
    "ENTRY_NEWER": "UNAVAILABLE",
    "LEDGER_UNAVAILABLE": "UNAVAILABLE",
    "ACCOUNTS_UNAVAILABLE": "UNAVAILABLE",
    "TIER_UNKNOWN": "UNAVAILABLE",
    "TIER_UNREACHABLE": "UNAVAILABLE",
    "JOURNAL_FULL": "UNAVAILABLE",
    "OVERLOADED": "UNAVAILABLE",
    "SHUTTING_DOWN": "UNAVAILABLE",
    "INTERNAL": "INTERNAL",
}

NEVER_REACH_A_CALLER = {errors.TooSlowError, errors.InReviewError}
"""What is caught on the way and has no status of its own."""


def all_errors(base: type[CacheServerError] = CacheServerError) -> list[type[CacheServerError]]:
    return [base, *(error for sub in base.__subclasses__() for error in all_errors(sub))]


def made(error_type: type[CacheServerError]) -> CacheServerError:
    if error_type is errors.InvalidRequestError:
        return errors.InvalidRequestError({"n": "must be 1 to 10"})
    if error_type is errors.CannotAffordError:
        return errors.CannotAffordError("global/day", reset_time_s=1_800_000_000.0)
    if error_type is errors.JobBudgetError:
        return errors.JobBudgetError("spring", 5_000_000)
    if error_type is errors.TierUnreachableError:
        return errors.TierUnreachableError([TierName.S3])
    return error_type("what happened")


def details_of(status: RpcStatus) -> Status:
    [packed] = [value for name, value in status.trailers if name == "grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    return Status.FromString(packed)


def detail(status: RpcStatus, message_type: type[M]) -> M | None:
    for packed in details_of(status).details:
        message = message_type()
        if packed.Unpack(message):
            return message
    return None


def test_every_published_reason_has_its_code() -> None:
    assert {reason: code.name for reason, code in CODES.items()} == PUBLISHED


@pytest.mark.parametrize("error_type", all_errors(), ids=lambda error_type: error_type.__name__)
def test_every_error_of_ours_has_a_published_reason(error_type: type[CacheServerError]) -> None:
    error = made(error_type)
    status = status_of(error, request_id="r1")
    assert status.reason == ("INTERNAL" if error_type in NEVER_REACH_A_CALLER else error.reason)
    assert status.code is CODES[status.reason]
    assert details_of(status).code == status.code.value[0]
    info = detail(status, ErrorInfo)
    assert info is not None
    assert (info.reason, info.domain, info.metadata["request_id"]) == (status.reason, "promptcache.v1", "r1")


@pytest.mark.parametrize(("api", "at_least"), [("v1/promptcache", 20), ("admin/v1alpha1/admin", 7)])
def test_every_reason_an_api_file_names_is_published(api: str, at_least: int) -> None:
    proto = Path(f"protos/promptcache/{api}.proto").read_text()
    stated = re.findall(r"^ *// +([A-Z_]+) \(([A-Z_, ]+)\):", proto, flags=re.MULTILINE)
    rows = {(reason, code) for code, reasons in stated for reason in reasons.split(", ")}
    assert len(rows) >= at_least
    assert dict(rows) == {reason: PUBLISHED[reason] for reason, _ in rows}


def test_invalid_fields_are_named_in_a_bad_request() -> None:
    error = errors.InvalidRequestError({"spec.size": "is no size", "n": "must be 1 to 10"})
    bad = detail(status_of(error, request_id="r"), BadRequest)
    assert bad is not None
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("spec.size", "is no size"),
        ("n", "must be 1 to 10"),
    ]


@pytest.mark.parametrize(("field", "path"), [("size", "spec.size"), ("", "spec")])
def test_what_the_upstream_calls_invalid_is_named_too(field: str, path: str) -> None:
    bad = detail(status_of(errors.UpstreamInvalidError("no such size", field=field), request_id="r"), BadRequest)
    assert bad is not None
    assert [v.field for v in bad.field_violations] == [path]


def test_unavailable_says_when_to_try_again_to_people_and_to_grpc() -> None:
    status = status_of(errors.UpstreamLimitedError("slow down", retry_after_s=7.5), request_id="r")
    retry = detail(status, RetryInfo)
    assert retry is not None
    assert retry.retry_delay.ToMilliseconds() == 7_500
    assert ("grpc-retry-pushback-ms", "7500") in status.trailers


def test_unavailable_without_a_known_time_still_says_one() -> None:
    status = status_of(errors.TierTimeoutError("redis get timed out"), request_id="r")
    assert ("grpc-retry-pushback-ms", "1000") in status.trailers


def test_a_client_is_never_told_to_retry_at_once_which_would_hang_it() -> None:
    status = status_of(errors.UpstreamLimitedError("slow down", retry_after_s=0.0), request_id="r")
    assert ("grpc-retry-pushback-ms", "50") in status.trailers


@pytest.mark.parametrize("error", [errors.PromptRefusedError("no"), errors.NotCachedError("no")])
def test_what_a_retry_cannot_help_asks_for_none(error: CacheServerError) -> None:
    status = status_of(error, request_id="r")
    assert [name for name, _ in status.trailers] == ["grpc-status-details-bin"]
    assert detail(status, RetryInfo) is None


def test_a_refusal_is_a_precondition_and_an_empty_purse_a_quota() -> None:
    refused = detail(status_of(errors.PromptRefusedError("change it"), request_id="r"), PreconditionFailure)
    broke = detail(status_of(errors.UpstreamQuotaError("top it up"), request_id="r"), QuotaFailure)
    assert refused is not None
    assert broke is not None
    assert [(v.type, v.description) for v in refused.violations] == [("PROMPT_REFUSED", "change it")]
    assert [(v.subject, v.description) for v in broke.violations] == [("UPSTREAM_QUOTA_EXHAUSTED", "top it up")]


def test_a_budget_that_is_used_up_is_named_with_the_moment_it_starts_anew() -> None:
    error = errors.CannotAffordError("namespace:shop/month", reset_time_s=1_800_000_000.0)
    status = status_of(error, request_id="r")
    quota, info = detail(status, QuotaFailure), detail(status, ErrorInfo)
    assert quota is not None
    assert info is not None
    [violation] = quota.violations
    assert violation.subject == "namespace:shop/month"
    assert "2027-01-15 08:00 UTC" in violation.description
    assert info.metadata["budget"] == "namespace:shop/month"
    assert info.metadata["reset_time"] == "2027-01-15T08:00:00Z"


@pytest.mark.parametrize(("cached", "stated"), [(True, {"cached": "true"}), (False, {})])
def test_a_refusal_remembered_from_an_earlier_call_says_so(cached: bool, stated: dict[str, str]) -> None:  # noqa: FBT001 - the parameter of the test
    status = status_of(errors.PromptRefusedError("change it", cached=cached), request_id="r")
    info = detail(status, ErrorInfo)
    assert info is not None
    assert dict(info.metadata) == {"request_id": "r"} | stated


def test_a_purge_that_missed_tiers_names_them() -> None:
    status = status_of(errors.TierUnreachableError([TierName.REDIS, TierName.S3]), request_id="r")
    info = detail(status, ErrorInfo)
    assert info is not None
    assert info.metadata["tiers"] == "redis,s3"


def test_an_unexpected_error_reveals_nothing_but_where_to_look() -> None:
    status = status_of(KeyError("a prompt with a secret"), request_id="r-42")
    assert status.code is grpc.StatusCode.INTERNAL
    assert "r-42" in status.message
    assert "secret" not in repr(status)


def test_an_error_without_a_published_reason_is_internal() -> None:
    class NewError(CacheServerError):
        reason = "NOT_PUBLISHED"

    assert status_of(NewError("secret"), request_id="r").reason == "INTERNAL"


def test_a_thousand_violations_fit_the_trailers() -> None:
    error = errors.InvalidRequestError({f"exclude_keys[{i}]" + "x" * 500: "is not a key " * 50 for i in range(1000)})
    status = status_of(error, request_id="r" * 128)
    assert sum(len(name) + len(value) * 4 / 3 for name, value in status.trailers) + len(status.message) < 7_000
    bad = detail(status, BadRequest)
    assert bad is not None
    assert len(bad.field_violations) == 10


@pytest.mark.parametrize("error_type", all_errors())
def test_the_failure_of_an_item_says_what_a_whole_call_would(error_type: type[CacheServerError]) -> None:
    status = status_of(made(error_type), request_id="r1")
    failure = status.as_failure()
    whole = details_of(status)
    assert (failure.code, failure.message) == (whole.code, whole.message)
    info, retry, bad = detail(status, ErrorInfo), detail(status, RetryInfo), detail(status, BadRequest)
    assert info is not None
    assert failure.reason == info.reason
    assert failure.HasField("retry_delay") == (retry is not None)
    assert retry is None or failure.retry_delay == retry.retry_delay
    assert failure.violations == {each.field: each.description for each in (bad.field_violations if bad else ())}
