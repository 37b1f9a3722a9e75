"""Errors as HTTP statuses, from one table, in the shape of OpenAI's API.

Clients that speak OpenAI's API retry 408, 409, 429 and all from 500 on by themselves, whatever the code says: where
that cannot help, `x-should-retry: false` stops them. The shape has four keys, always: message, type, param and code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from cacheserver.errors import (
    CacheServerError,
    CannotAffordError,
    InvalidRequestError,
    ShuttingDownError,
    UpstreamInvalidError,
)
from cacheserver.http.answer import Answer, json_answer

_INVALID = "invalid_request_error"
_LIMITED = "rate_limit_error"
_QUOTA = "insufficient_quota"
_SERVER = "server_error"
_BUSY = "service_unavailable_error"
_USER = "image_generation_user_error"


@dataclass(frozen=True, slots=True)
class Kind:
    """How errors of one reason are told: status, OpenAI's type and code, and whether trying again may help."""

    status: HTTPStatus
    type: str
    code: str | None
    retry: bool = False


KINDS: Mapping[str, Kind] = {
    "INVALID_FIELD": Kind(HTTPStatus.BAD_REQUEST, _INVALID, "invalid_value"),
    "MALFORMED_MESSAGE": Kind(HTTPStatus.BAD_REQUEST, _INVALID, None),
    "NOT_IMPLEMENTED": Kind(HTTPStatus.BAD_REQUEST, _INVALID, "unsupported_value"),
    "UNAUTHENTICATED": Kind(HTTPStatus.UNAUTHORIZED, _INVALID, "invalid_api_key"),
    "PERMISSION_DENIED": Kind(HTTPStatus.FORBIDDEN, _INVALID, "permission_denied"),
    # RFC 9111 5.2.1.7: what only-if-cached asks for and no cache has.
    "NOT_CACHED": Kind(HTTPStatus.GATEWAY_TIMEOUT, _INVALID, "not_cached"),
    "KEY_GONE": Kind(HTTPStatus.NOT_FOUND, _INVALID, "key_gone"),
    "REVIEW_GONE": Kind(HTTPStatus.NOT_FOUND, _INVALID, "review_gone"),
    "UPSTREAM_UNKNOWN": Kind(HTTPStatus.NOT_FOUND, _INVALID, "upstream_unknown"),
    "CALL_UNKNOWN": Kind(HTTPStatus.NOT_FOUND, _INVALID, "call_unknown"),
    "OFFSET_OUT_OF_RANGE": Kind(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, _INVALID, None),
    "REQUEST_ID_RUNNING": Kind(HTTPStatus.CONFLICT, _INVALID, "request_id_running", retry=True),
    "REQUEST_ID_SPENT": Kind(HTTPStatus.CONFLICT, _INVALID, "request_id_spent"),
    "DEADLINE_TOO_SHORT": Kind(HTTPStatus.REQUEST_TIMEOUT, _INVALID, "deadline_too_short"),
    "PROMPT_REFUSED": Kind(HTTPStatus.BAD_REQUEST, _USER, "moderation_blocked"),
    "PROMPT_DENIED": Kind(HTTPStatus.BAD_REQUEST, _USER, "moderation_blocked"),
    "PII_FOUND": Kind(HTTPStatus.BAD_REQUEST, _USER, "pii_found"),
    "IMAGE_TOO_LARGE": Kind(HTTPStatus.BAD_REQUEST, _INVALID, "image_too_large"),
    "IMAGE_CHANGED": Kind(HTTPStatus.PRECONDITION_FAILED, _INVALID, "image_changed"),
    "NO_SIGNED_URLS": Kind(HTTPStatus.BAD_REQUEST, _INVALID, "no_signed_urls"),
    # Nobody can use the model until a person has acted; 403 is what OpenAI answers there.
    "UPSTREAM_NOT_ENTITLED": Kind(HTTPStatus.FORBIDDEN, _INVALID, "upstream_not_entitled"),
    "BUDGET_EXHAUSTED": Kind(HTTPStatus.TOO_MANY_REQUESTS, _QUOTA, _QUOTA),
    "UPSTREAM_QUOTA_EXHAUSTED": Kind(HTTPStatus.TOO_MANY_REQUESTS, _QUOTA, _QUOTA),
    "VARIANTS_EXHAUSTED": Kind(HTTPStatus.CONFLICT, _INVALID, "variants_exhausted"),
    # Callers ask for more than the upstreams' limits allow, which OpenAI tells by 429; this service itself is well.
    "QUEUE_FULL": Kind(HTTPStatus.TOO_MANY_REQUESTS, _LIMITED, "rate_limit_exceeded", retry=True),
    "UPSTREAM_LIMITED": Kind(HTTPStatus.TOO_MANY_REQUESTS, _LIMITED, "rate_limit_exceeded", retry=True),
    "UPSTREAM_DOWN": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "upstream_down", retry=True),
    "UPSTREAM_BAD_IMAGE": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "upstream_bad_image", retry=True),
    "CACHE_UNKNOWN": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "cache_unknown", retry=True),
    "ENTRY_NEWER": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "entry_newer", retry=True),
    "LEDGER_UNAVAILABLE": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "ledger_unavailable", retry=True),
    "ACCOUNTS_UNAVAILABLE": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "accounts_unavailable", retry=True),
    "TIER_UNKNOWN": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "tier_unknown", retry=True),
    "TIER_UNREACHABLE": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "tier_unreachable", retry=True),
    "JOURNAL_FULL": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "journal_full", retry=True),
    "OVERLOADED": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "server_is_overloaded", retry=True),
    "SHUTTING_DOWN": Kind(HTTPStatus.SERVICE_UNAVAILABLE, _BUSY, "shutting_down", retry=True),
    "INTERNAL": Kind(HTTPStatus.INTERNAL_SERVER_ERROR, _SERVER, None, retry=True),
}
"""Every published reason. It grows by addition only."""

_MODEL_NOT_FOUND = Kind(HTTPStatus.NOT_FOUND, _INVALID, "model_not_found")
"""A model that nobody serves, which the miss path alone can tell; a name that is none is told as an HttpError."""

_REASONS = {
    HTTPStatus.UNAUTHORIZED: "UNAUTHENTICATED",
    HTTPStatus.FORBIDDEN: "PERMISSION_DENIED",
}
_SPEC = "spec."
"""Begins the paths of parameters where gRPC has them."""

_DEFAULT_RETRY_S = 1.0
_LONGEST_WAIT_S = 60
"""openai 1.x takes no longer Retry-After for one: it would ask again after half a second."""
_LONGEST_MESSAGE = 1_000


class HttpError(Exception):
    """What is wrong with a request as HTTP, or with one of its parameters: it has a status of its own."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`headers` go out with the answer."""
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def reason(self) -> str:
        """The published reason it counts as."""
        named = "MALFORMED_MESSAGE" if self.param is None else "INVALID_FIELD"
        return _REASONS.get(self.status, named)


@dataclass(frozen=True, slots=True)
class HttpStatus:
    """How a call failed. `reason` is the published one; `retry_after_s` None where trying again does not help."""

    status: HTTPStatus
    reason: str
    error: dict[str, str | None]
    headers: dict[str, str]

    def answer(self) -> Answer:
        """The whole answer. What is wrong now may be right in a moment: no cache on the way is to keep it."""
        return json_answer({"error": self.error}, self.status, {"cache-control": "no-store", **self.headers})


def status_of(error: Exception, *, request_id: str) -> HttpStatus:
    """The status that `error` becomes. What is neither ours nor HttpError becomes 500 and reveals nothing."""
    if isinstance(error, HttpError):
        told = {"message": str(error), "type": _INVALID, "param": error.param, "code": error.code}
        return HttpStatus(error.status, error.reason, told, {**error.headers, "x-should-retry": "false"})
    if not isinstance(error, CacheServerError) or error.reason not in KINDS:
        error = CacheServerError(f"Internal error. The service's log has it under request id {request_id}.")
    param, message = _told(error)
    is_unserved = isinstance(error, InvalidRequestError) and param == "model"
    kind = _MODEL_NOT_FOUND if is_unserved else KINDS[error.reason]
    if len(message) > _LONGEST_MESSAGE:
        message = message[: _LONGEST_MESSAGE - 1] + "…"
    told = {"message": message, "type": kind.type, "param": param, "code": kind.code}
    return HttpStatus(kind.status, error.reason, told, _headers(error, kind))


def _told(error: CacheServerError) -> tuple[str | None, str]:
    """Which parameter is to blame, if one is, and the message."""
    if isinstance(error, InvalidRequestError):
        path, text = next(iter(error.violations.items()))
        param = path.removeprefix(_SPEC)
        return param, f"Invalid '{param}': {text}."
    return (error.field or None if isinstance(error, UpstreamInvalidError) else None), str(error)


def _headers(error: CacheServerError, kind: Kind) -> dict[str, str]:
    if not kind.retry:
        headers = {"x-should-retry": "false"}
        if isinstance(error, CannotAffordError):
            headers["x-cacheserver-budget"] = error.budget
        return headers
    seconds = max(1, math.ceil(_DEFAULT_RETRY_S if error.retry_after_s is None else error.retry_after_s))
    headers = {"retry-after": str(seconds)}
    if seconds > _LONGEST_WAIT_S:
        headers["x-should-retry"] = "false"
    if isinstance(error, ShuttingDownError):
        headers["connection"] = "close"
    return headers
