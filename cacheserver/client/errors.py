"""What a call of the client may raise.

CacheError                        carries code, reason, violations, retry_after_s and metadata
├── InvalidRequestError           a field is wrong; `violations` names each
├── NotCachedError                a cache-only read found nothing
│   └── KeyGoneError              no tier has the picture of this key any more
├── UnknownNameError              no such upstream, budget or review; only of `admin`
├── UnknownCallError              the service remembers no such call; only of `explain_call`
├── PromptRefusedError            the prompt is refused; change it
├── ImageTooLargeError            too large for one answer; `download` and `stream_image` carry any size
├── ImageChangedError             the picture a download began with is not the one stored now
├── CorruptDownloadError          what arrived is not what was announced
├── UnauthenticatedError          no token, or one the service does not know
├── PermissionDeniedError         the token does not open this namespace or operation
├── QuotaExhaustedError           a budget or quota is used up; trying again does not help
├── DeadlineError                 the call's time ran out; a generation that had begun goes on and is kept
├── UnsupportedError              the service does not offer this call or field
└── TryAgainError                 busy, limited or going down; retry_after_s says when to come back
    └── UnreachableError          nobody answers at the address, or the connection broke

Messages never hold prompts, tokens or image bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from cacheserver.pb import promptcache_pb2 as pb

_DETAILS_KEY = "grpc-status-details-bin"


class CacheError(Exception):
    """A call that failed. `reason` is the service's published one, empty where the service gave none.

    Attributes:
        code: The gRPC status code.
        reason: For instance "PROMPT_REFUSED"; the list only grows.
        violations: Field paths and what is wrong with each.
        retry_after_s: In how many seconds trying again may help; None if unknown or no help.
        metadata: Further facts the service published with the reason.
    """

    def __init__(  # noqa: PLR0913 - one keyword per fact of the answer
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        violations: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.violations = dict(violations or {})
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidRequestError(CacheError):
    """One or more fields of the request are out of their range."""


class NotCachedError(CacheError):
    """A cache-only read found nothing."""


class KeyGoneError(NotCachedError):
    """No tier has the picture a key names."""


class UnknownNameError(CacheError):
    """The service has no upstream or budget of this name, or no picture of this key waits for review."""


class UnknownCallError(CacheError):
    """The replica that answers remembers no call of this id, or it was somebody else's."""


class PromptRefusedError(CacheError):
    """The prompt is refused by the upstream or the service; change it."""


class ImageTooLargeError(CacheError):
    """The picture does not fit one answer. It is kept: `download` or `stream_image` fetch it."""


class ImageChangedError(CacheError):
    """The picture a download began with is not the one stored now; begin anew."""


class CorruptDownloadError(CacheError):
    """The bytes that arrived are not those the service announced; begin anew."""


class UnauthenticatedError(CacheError):
    """No bearer token, or one the service does not know."""


class PermissionDeniedError(CacheError):
    """The caller may not use the namespace or the operation."""


class QuotaExhaustedError(CacheError):
    """A budget, quota or limit of variants is used up; trying again does not help."""


class DeadlineError(CacheError):
    """The call's time ran out. A generation that had begun goes on and is kept."""


class UnsupportedError(CacheError):
    """The service does not offer this call or field."""


class TryAgainError(CacheError):
    """The service cannot answer now. The client has tried several times already."""


class UnreachableError(TryAgainError):
    """Nobody answers at the address, or the connection broke."""


_BY_REASON: Mapping[str, type[CacheError]] = {
    "NOT_CACHED": NotCachedError,
    "KEY_GONE": KeyGoneError,
    "UPSTREAM_UNKNOWN": UnknownNameError,
    "REVIEW_GONE": UnknownNameError,
    "CALL_UNKNOWN": UnknownCallError,
    "PROMPT_REFUSED": PromptRefusedError,
    "PROMPT_DENIED": PromptRefusedError,
    "PII_FOUND": PromptRefusedError,
    "IMAGE_TOO_LARGE": ImageTooLargeError,
    "IMAGE_CHANGED": ImageChangedError,
}

_BY_CODE: Mapping[grpc.StatusCode, type[CacheError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotCachedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QuotaExhaustedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.UNAVAILABLE: TryAgainError,
}

_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

# A service that goes down ends calls it has not begun with CANCELLED, which nobody on this side asked for.
_BROKEN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


def error_of(failure: grpc.RpcError, address: str) -> CacheError:
    """The error that a failed call to `address` stands for."""
    code = failure.code()
    info, violations, retry_after_s = _details(failure)
    if not info.reason and code in _BROKEN:
        return unreachable(address)
    if not info.reason and code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return too_late(address)
    return _class_of(code, info.reason)(
        failure.details() or code.name,
        code=code,
        reason=info.reason,
        violations=violations,
        retry_after_s=retry_after_s,
        metadata=info.metadata,
    )


def unreachable(address: str) -> UnreachableError:
    """The error of a call that nobody at `address` answered."""
    return UnreachableError(f"no answer from the cache service at {address}", code=grpc.StatusCode.UNAVAILABLE)


def too_late(address: str) -> DeadlineError:
    """The error of a call that had no answer from `address` in time."""
    what = f"no answer from the cache service at {address} within the call's time"
    return DeadlineError(what, code=grpc.StatusCode.DEADLINE_EXCEEDED)


def as_broken(error: CacheError) -> CacheError:
    """The error of a stream that broke while we still sent, where gRPC says only that it failed within itself.

    The service gives every failure of its own a reason.
    """
    if error.code is grpc.StatusCode.INTERNAL and not error.reason:
        return UnreachableError("the connection broke off while the stream ran", code=grpc.StatusCode.UNAVAILABLE)
    return error


def error_of_item(failure: pb.Failure) -> CacheError:
    """The error that the failure of one item of a stream stands for."""
    code = _CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
    return _class_of(code, failure.reason)(
        failure.message or code.name,
        code=code,
        reason=failure.reason,
        violations=failure.violations,
        retry_after_s=failure.retry_delay.ToTimedelta().total_seconds() if failure.HasField("retry_delay") else None,
        metadata=failure.metadata,
    )


def _class_of(code: grpc.StatusCode, reason: str) -> type[CacheError]:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not reason:
        return CacheError  # gRPC's own word for a message above a size limit, and no quota of ours
    return _BY_REASON.get(reason) or _BY_CODE.get(code, CacheError)


def _details(failure: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo, dict[str, str], float | None]:
    """The google.rpc details of a failed call: ErrorInfo, field violations, seconds to wait."""
    info = error_details_pb2.ErrorInfo()
    request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for detail in _status(failure).details:
        if detail.Unpack(info) or detail.Unpack(request):
            continue
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return info, {each.field: each.description for each in request.field_violations}, retry_after_s


def _status(failure: grpc.RpcError) -> status_pb2.Status:
    # Named pairs from a sync call, plain ones from an asyncio call; their published types differ more.
    trailers = cast("Iterable[tuple[str, bytes]]", failure.trailing_metadata() or ())
    for name, value in trailers:
        if name == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break  # something between us and the service garbled them; the code still tells what to do
    return status_pb2.Status()
