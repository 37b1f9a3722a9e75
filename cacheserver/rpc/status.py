"""Errors as gRPC statuses, from one table.

gRPC retry policies see codes only, so the code tells what to do: UNAVAILABLE means try again, everything
else means do not. The reason says what happened, in a google.rpc.ErrorInfo of domain "promptcache.v1".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, PreconditionFailure, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from cacheserver.errors import (
    CacheServerError,
    CannotAffordError,
    InvalidRequestError,
    TierUnreachableError,
    UpstreamInvalidError,
)
from cacheserver.pb import promptcache_pb2 as pb

DOMAIN = "promptcache.v1"

CODES: dict[str, grpc.StatusCode] = {
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "MALFORMED_MESSAGE": grpc.StatusCode.INVALID_ARGUMENT,
    "NOT_IMPLEMENTED": grpc.StatusCode.UNIMPLEMENTED,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
    "PERMISSION_DENIED": grpc.StatusCode.PERMISSION_DENIED,
    "NOT_CACHED": grpc.StatusCode.NOT_FOUND,
    "KEY_GONE": grpc.StatusCode.NOT_FOUND,
    "REVIEW_GONE": grpc.StatusCode.NOT_FOUND,
    "UPSTREAM_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "CALL_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "OFFSET_OUT_OF_RANGE": grpc.StatusCode.OUT_OF_RANGE,
    "REQUEST_ID_RUNNING": grpc.StatusCode.ABORTED,
    "DEADLINE_TOO_SHORT": grpc.StatusCode.DEADLINE_EXCEEDED,
    # The request as it stands will not work: change it, or have someone change the service.
    "PROMPT_REFUSED": grpc.StatusCode.FAILED_PRECONDITION,
    "PROMPT_DENIED": grpc.StatusCode.FAILED_PRECONDITION,
    "PII_FOUND": grpc.StatusCode.FAILED_PRECONDITION,
    "IMAGE_TOO_LARGE": grpc.StatusCode.FAILED_PRECONDITION,
    "IMAGE_CHANGED": grpc.StatusCode.FAILED_PRECONDITION,
    "NO_SIGNED_URLS": grpc.StatusCode.FAILED_PRECONDITION,
    "REQUEST_ID_SPENT": grpc.StatusCode.FAILED_PRECONDITION,
    "UPSTREAM_NOT_ENTITLED": grpc.StatusCode.FAILED_PRECONDITION,
    # Something countable is used up: trying again uses up more.
    "BUDGET_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "UPSTREAM_QUOTA_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "VARIANTS_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Try again.
    "QUEUE_FULL": grpc.StatusCode.UNAVAILABLE,
    "UPSTREAM_LIMITED": grpc.StatusCode.UNAVAILABLE,
    "UPSTREAM_DOWN": grpc.StatusCode.UNAVAILABLE,
    "UPSTREAM_BAD_IMAGE": grpc.StatusCode.UNAVAILABLE,
    "CACHE_UNKNOWN": grpc.StatusCode.UNAVAILABLE,
    "ENTRY_NEWER": grpc.StatusCode.UNAVAILABLE,
    "LEDGER_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "ACCOUNTS_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "TIER_UNKNOWN": grpc.StatusCode.UNAVAILABLE,
    "TIER_UNREACHABLE": grpc.StatusCode.UNAVAILABLE,
    "JOURNAL_FULL": grpc.StatusCode.UNAVAILABLE,
    "OVERLOADED": grpc.StatusCode.UNAVAILABLE,
    "SHUTTING_DOWN": grpc.StatusCode.UNAVAILABLE,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}
"""Every published reason and its code. It grows by addition only."""

# grpc clients told to retry at once (a pushback of 0 ms) never retry, and hang until their deadline.
_SHORTEST_RETRY_S = 0.05
_DEFAULT_RETRY_S = 1.0

# A client refuses trailers above 8 KiB, and base64 adds a third: these keep the worst status well below.
_MAX_VIOLATIONS = 10
_MAX_FIELD_CHARACTERS = 100
_MAX_TEXT_CHARACTERS = 200
_MAX_MESSAGE_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """How a call failed, as gRPC sends it: code, message, and trailers with the google.rpc details.

    `violations`, `retry_after_s` (seconds; None where trying again does not help) and `metadata` are among the
    details, too.
    """

    code: grpc.StatusCode
    reason: str
    message: str
    violations: Mapping[str, str]
    retry_after_s: float | None
    metadata: Mapping[str, str]
    trailers: tuple[tuple[str, str | bytes], ...]

    def as_failure(self) -> pb.Failure:
        """The same as the failure of one item of a stream."""
        return pb.Failure(
            code=self.code.value[0],
            reason=self.reason,
            message=self.message,
            retry_delay=None if self.retry_after_s is None else _duration(self.retry_after_s),
            violations=self.violations,
            metadata=self.metadata,
        )


def status_of(error: Exception, *, request_id: str) -> RpcStatus:
    """The status that `error` becomes. What is no CacheServerError becomes INTERNAL and reveals nothing."""
    if not isinstance(error, CacheServerError) or error.reason not in CODES:
        error = CacheServerError(f"Internal error. The service's log has it under request id {request_id}.")
    code = CODES[error.reason]
    message = _shorten(str(error), _MAX_MESSAGE_CHARACTERS)
    violations = _violations(error)
    retry_after_s = _retry_after_s(error) if code is grpc.StatusCode.UNAVAILABLE else None
    packed = Status(code=code.value[0], message=message)
    metadata = {"request_id": request_id, **_facts(error)}
    info = ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    for detail in (info, *_details(error, code, message, violations, retry_after_s)):
        any_detail = Any()
        any_detail.Pack(detail)
        packed.details.append(any_detail)
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", packed.SerializeToString())]
    if retry_after_s is not None:
        trailers.append(("grpc-retry-pushback-ms", str(round(retry_after_s * 1000))))
    return RpcStatus(code, error.reason, message, violations, retry_after_s, metadata, tuple(trailers))


def _details(
    error: CacheServerError,
    code: grpc.StatusCode,
    message: str,
    violations: Mapping[str, str],
    retry_after_s: float | None,
) -> list[Message]:
    """The detail that fits the code, if there is one."""
    if violations:
        named = [BadRequest.FieldViolation(field=field, description=text) for field, text in violations.items()]
        return [BadRequest(field_violations=named)]
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        failure = PreconditionFailure.Violation(type=error.reason, description=message)
        return [PreconditionFailure(violations=[failure])]
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        subject = error.budget if isinstance(error, CannotAffordError) else error.reason
        quota = QuotaFailure.Violation(subject=subject, description=message)
        return [QuotaFailure(violations=[quota])]
    return [] if retry_after_s is None else [RetryInfo(retry_delay=_duration(retry_after_s))]


def _facts(error: CacheServerError) -> dict[str, str]:
    """What programs may want to know of an error beside its reason."""
    facts = {}
    if isinstance(error, TierUnreachableError):
        facts["tiers"] = ",".join(error.tiers)
    if isinstance(error, CannotAffordError):
        facts["budget"] = error.budget
        facts["reset_time"] = datetime.fromtimestamp(error.reset_time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if getattr(error, "cached", False):
        facts["cached"] = "true"
    return facts


def _violations(error: CacheServerError) -> dict[str, str]:
    """What is wrong with the request, by the path of the field: as much of it as trailers can carry."""
    violations: Mapping[str, str] = {}
    if isinstance(error, InvalidRequestError):
        violations = error.violations
    elif isinstance(error, UpstreamInvalidError):
        violations = {f"spec.{error.field}" if error.field else "spec": str(error)}
    return {
        _shorten(field, _MAX_FIELD_CHARACTERS): _shorten(text, _MAX_TEXT_CHARACTERS)
        for field, text in list(violations.items())[:_MAX_VIOLATIONS]
    }


def _retry_after_s(error: CacheServerError) -> float:
    return max(_SHORTEST_RETRY_S, _DEFAULT_RETRY_S if error.retry_after_s is None else error.retry_after_s)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
