"""The body of a request: bounded while it is read, in bytes and in time, and JSON without surprises."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import NoReturn

from starlette.requests import ClientDisconnect, Request

from cacheserver.http.status import HttpError
from cacheserver.model import JsonValue

_TO_BEGIN_S = 30.0
_LEAST_BYTES_PER_S = 16 * 1024
"""A body may take 30 s, and a second more for so many of the bytes it may have."""


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body, as it came.

    Raises:
        HttpError: 413, it is longer than `max_bytes`; 408, it came too slowly.
        ClientDisconnect: the client went away before its end.
    """
    _check_stated_length(request, max_bytes)
    piece, is_whole = await _next_piece(request)  # the server waits for a first one only so long
    if is_whole and len(piece) <= max_bytes:
        return piece
    body = bytearray(piece)
    try:
        async with asyncio.timeout(_TO_BEGIN_S + max_bytes / _LEAST_BYTES_PER_S):
            while not is_whole and len(body) <= max_bytes:
                piece, is_whole = await _next_piece(request)
                body += piece
    except TimeoutError:
        raise _too_slow() from None
    if len(body) > max_bytes:
        raise _too_long(max_bytes)
    return bytes(body)


async def body_pieces(request: Request, *, max_bytes: int) -> AsyncIterator[bytes]:
    """The body as it comes. Raises as `read_body` does, before more than `max_bytes` were handed out."""
    _check_stated_length(request, max_bytes)
    until_s = asyncio.get_running_loop().time() + _TO_BEGIN_S + max_bytes / _LEAST_BYTES_PER_S
    left_bytes, is_whole = max_bytes, False
    while not is_whole:
        try:
            async with asyncio.timeout_at(until_s):
                piece, is_whole = await _next_piece(request)
        except TimeoutError:
            raise _too_slow() from None
        left_bytes -= len(piece)
        if left_bytes < 0:
            raise _too_long(max_bytes)
        if piece:
            yield piece


async def _next_piece(request: Request) -> tuple[bytes, bool]:
    """The next bytes of the body, and whether they are the last."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), not message.get("more_body", False)


def read_json(request: Request, body: bytes) -> dict[str, JsonValue]:
    """The JSON object that a body is.

    Raises:
        HttpError: 415, its content type is another; 400, it is no JSON, no object, or names something twice.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        text = "The request needs the header `content-type: application/json` and a body in JSON."
        raise HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, text, code="unsupported_content_type")
    try:
        parsed = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise _not_json("it nests too deeply") from None
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError:
        raise _not_json("a number has too many digits") from None
    if not isinstance(parsed, dict):
        raise _not_json("it should be an object, as {...}")
    return parsed


_MOST_DIGITS = 18
"""Of a stated length: more are no number of bytes."""


def _check_stated_length(request: Request, max_bytes: int) -> None:
    stated = next((value for name, value in request.scope["headers"] if name == b"content-length"), b"")
    if len(stated) > _MOST_DIGITS or (stated.isdigit() and int(stated) > max_bytes):
        raise _too_long(max_bytes)


def _too_slow() -> HttpError:
    text = "The body of the request came too slowly."
    return HttpError(HTTPStatus.REQUEST_TIMEOUT, text, code="request_timeout", headers={"connection": "close"})


def _too_long(max_bytes: int) -> HttpError:
    text = f"The body of the request is larger than {max_bytes:,} bytes."
    return HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, code="request_too_large")


def _not_json(problem: str) -> HttpError:
    text = f"The JSON body of the request could not be parsed: {problem}."
    return HttpError(HTTPStatus.BAD_REQUEST, text, code="invalid_json")


def _object(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    """The object; of two values under one name nobody can tell which one is meant."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _not_json("an object has a name twice")
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise _not_json(f"{name} is no JSON")
