"""Errors as HTTP statuses, in the shape of OpenAI's API."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from cacheserver.errors import (
    CannotAffordError,
    InvalidRequestError,
    OverloadedError,
    ShuttingDownError,
    UpstreamInvalidError,
    UpstreamLimitedError,
    UpstreamQuotaError,
)
from cacheserver.http.status import KINDS, HttpError, status_of
from cacheserver.rpc.status import CODES


def test_every_published_reason_has_a_status() -> None:
    assert KINDS.keys() == CODES.keys()


@pytest.mark.parametrize(
    ("wait_s", "told", "is_retried"), [(0.0, 1, True), (1.2, 2, True), (60, 60, True), (61, 61, False)]
)
def test_a_wait_is_told_in_whole_seconds_and_a_long_one_is_not_left_to_clients(
    wait_s: float,
    told: int,
    is_retried: bool,  # noqa: FBT001 - a column of the table
) -> None:
    status = status_of(UpstreamLimitedError("Too fast.", retry_after_s=wait_s), request_id="x")
    assert (status.status, status.error["code"]) == (429, "rate_limit_exceeded")
    assert status.headers["retry-after"] == str(told)
    assert ("x-should-retry" not in status.headers) is is_retried


@pytest.mark.parametrize("error", [UpstreamQuotaError("No credit."), CannotAffordError("global/day", reset_time_s=0)])
def test_what_a_person_must_mend_is_not_tried_again(error: Exception) -> None:
    status = status_of(error, request_id="x")
    assert (status.status, status.error["type"], status.error["code"]) == (
        429,
        "insufficient_quota",
        "insufficient_quota",
    )
    assert status.headers["x-should-retry"] == "false"
    assert "retry-after" not in status.headers


def test_a_service_that_ends_closes_its_connections() -> None:
    assert status_of(ShuttingDownError("Ends."), request_id="x").headers["connection"] == "close"
    assert "connection" not in status_of(OverloadedError("Full."), request_id="x").headers


def test_a_field_is_named_as_http_has_it() -> None:
    status = status_of(InvalidRequestError({"spec.seed": "must fit 64 bits with sign"}), request_id="x")
    assert status.error["param"] == "seed"
    assert status.error["message"] == "Invalid 'seed': must fit 64 bits with sign."
    assert status_of(UpstreamInvalidError("Bad size.", field="size"), request_id="x").error["param"] == "size"


def test_a_model_nobody_serves_is_not_found() -> None:
    status = status_of(InvalidRequestError({"spec.model": "not served here; there are: a"}), request_id="x")
    assert (status.status, status.error["param"], status.error["code"]) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HttpError(HTTPStatus.UNAUTHORIZED, "Who?"), "UNAUTHENTICATED"),
        (HttpError(HTTPStatus.FORBIDDEN, "No."), "PERMISSION_DENIED"),
        (HttpError(HTTPStatus.BAD_REQUEST, "Bad.", param="n"), "INVALID_FIELD"),
        (HttpError(HTTPStatus.BAD_REQUEST, "Bad."), "MALFORMED_MESSAGE"),
    ],
)
def test_what_is_wrong_as_http_counts_as_a_published_reason(error: HttpError, reason: str) -> None:
    assert status_of(error, request_id="x").reason == reason
    assert reason in CODES


def test_a_bug_reveals_nothing_but_the_id_to_look_for() -> None:
    status = status_of(ZeroDivisionError("secret"), request_id="call-7")
    assert (status.status, status.error["type"]) == (500, "server_error")
    assert "call-7" in (status.error["message"] or "")
    assert "secret" not in (status.error["message"] or "")
