"""What an OpenAI-shaped provider's failed answer means, in our errors.

A provider's message may quote the prompt, so it never enters ours: they carry the status, the provider's
code, type and parameter where these look like names, and its request id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from cacheserver.errors import (
    PromptRefusedError,
    UpstreamDownError,
    UpstreamError,
    UpstreamInvalidError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
from cacheserver.generation.providers.rate_limits import retry_after_s

_REFUSED = frozenset(
    {
        "moderation_blocked",
        "content_policy_violation",
        "contentFilter",
        "content_filter",
        "ResponsibleAIPolicyViolation",
    }
)
_NO_MONEY = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
    }
)
_LIMITED = frozenset({"rate_limit_exceeded", "slow_down"})
_NOT_ENTITLED = frozenset({"invalid_api_key", "model_not_found"})

_CALLERS_FAULT = frozenset({"invalid_request_error", "image_generation_user_error"})
"""Types of errors that come as a 4xx where they come before the stream."""

_GAVE_UP = frozenset({408, 499})
"""The 4xx of a front that waits no longer for what lies behind it: the call may have been made, and billed."""

_FAILED = frozenset({500, 503})
"""Statuses by which the API says that it made no picture. Fronts send them too, but not with its error object."""

_NAME = re.compile(r"[A-Za-z0-9_.\-\[\]]{1,64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")


def request_id(headers: Mapping[str, str]) -> str:
    """The provider's own id of a call; empty if there is none that looks like an id."""
    text = headers.get("x-request-id", "")
    return text if _REQUEST_ID.fullmatch(text) else ""


def error_of(upstream: str, status: int, headers: Mapping[str, str], body: bytes, *, now_s: float) -> UpstreamError:
    """The error that an answer other than 200 stands for, with what the failed call cost. `now_s` is the wall clock."""
    event = f"{upstream} answered {status}"
    error = _error_of(event, status, headers, _json_object(body), now_s=now_s)
    error.upstream_request_id = request_id(headers)
    return error


def error_in_stream(
    upstream: str, headers: Mapping[str, str], document: Mapping[str, object], *, now_s: float
) -> UpstreamError:
    """The error that an event of a stream stands for, which began with a 200: by its code, else by its type."""
    nested = document.get("error")
    kind = _name(nested if isinstance(nested, dict) else document, "type")
    status = 400 if kind in _CALLERS_FAULT else 500
    error = _error_of(f"{upstream} sent an error", status, headers, document, now_s=now_s)
    error.upstream_request_id = request_id(headers)
    return error


def _error_of(
    event: str, status: int, headers: Mapping[str, str], document: Mapping[str, object] | None, *, now_s: float
) -> UpstreamError:
    nested = document.get("error") if document else None
    error = nested if isinstance(nested, dict) else document
    code, kind, param = (_name(error, field) for field in ("code", "type", "param"))
    what = _describe(event, code or kind, request_id(headers))
    message = error.get("message") if error else None
    wait_s = retry_after_s(headers, message if isinstance(message, str) else "", now_s=now_s)

    # The code before the status: a 429 may be a matter of money, a 400 one of moderation.
    if code in _REFUSED:
        after_seeing = _is_after_seeing(error)
        return PromptRefusedError(
            f"{what}: its moderation refuses the {'picture' if after_seeing else 'prompt'}. Change the prompt.",
            after_seeing=after_seeing,
            cost_microusd=None if after_seeing else 0,  # a picture was made, and nobody says whether it is billed
        )
    if status == 402 or code in _NO_MONEY or kind in _NO_MONEY:  # noqa: PLR2004 - HTTP statuses are their own names
        return UpstreamQuotaError(f"{what}: the account's credit or spend limit is used up. Raise it at the provider.")
    if status == 429 or code in _LIMITED:  # noqa: PLR2004
        return UpstreamLimitedError(f"{what}: its rate limit.", retry_after_s=wait_s)
    if status in {401, 410} or code in _NOT_ENTITLED or (status in {403, 404} and error is not None):
        return UpstreamNotEntitledError(f"{what}: check the key, its rights, the model's name and base_url.")
    if 400 <= status < 500 and status not in _GAVE_UP and error is not None:  # noqa: PLR2004
        return UpstreamInvalidError(f"{what}: it does not take the request as it is{_named(param)}.", field=param)
    return UpstreamDownError(
        f"{what}{'' if error else ', with no error object: check base_url'}.",
        retry_after_s=wait_s,
        cost_microusd=0 if _is_free(status, document) else None,
    )


def _is_free(status: int, document: Mapping[str, object] | None) -> bool:
    """Whether a call is certain not to be billed: it was declined, or the API itself says that it failed.

    All else may be a front's word, in JSON too, on a call that goes on behind it, or an answer to one that is done.
    """
    if status in _FAILED and document is not None:
        # Nested as OpenAI has it, or flat as vLLM and SGLang do.
        return isinstance(document.get("error"), dict) or document.get("object") == "error"
    return 300 <= status < 500 and status not in _GAVE_UP  # noqa: PLR2004 - HTTP statuses are their own names


def _json_object(body: bytes) -> Mapping[str, object] | None:
    """The JSON of an answer; None if that is no object."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _name(error: Mapping[str, object] | None, field: str) -> str:
    value = error.get(field) if error else None
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


def _is_after_seeing(error: Mapping[str, object] | None) -> bool:
    """Whether moderation refused what came of the prompt, and not the prompt itself."""
    details = error.get("moderation_details") if error else None
    return isinstance(details, dict) and details.get("moderation_stage") == "output"


def _describe(event: str, code: str, call_id: str) -> str:
    call = f" to call {call_id}" if call_id else ""
    return f"{event}{call}{f' ({code})' if code else ''}"


def _named(param: str) -> str:
    return f" (parameter {param})" if param else ""
