"""Logging: structlog, one event a line; JSON where nobody looks, colours on a terminal."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

import orjson
import structlog


def set_up_logging(*, level: str, form: str) -> None:
    """Send all log lines to standard error.

    `level` is a name logging knows ("info"); `form` is "json", "console", or "auto" for console on a terminal
    and JSON elsewhere. What the caller of an rpc bound (request id, trace id) is in every line of that call.
    """
    is_console = form == "console" or (form == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=_for_people() if is_console else [_json_line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=(
            structlog.PrintLoggerFactory(sys.stderr) if is_console else structlog.BytesLoggerFactory(sys.stderr.buffer)
        ),
        cache_logger_on_first_use=False,
    )


def _json_line(_: object, level: str, event: structlog.typing.EventDict) -> bytes:
    """The whole chain in one: there is a line for every call, and it is a good part of what a hit costs."""
    fields = {**structlog.contextvars.get_contextvars(), **event}
    fields["level"] = level
    fields["timestamp"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    if fields.get("exc_info"):
        fields = dict(structlog.processors.format_exc_info(None, level, fields))
    else:
        fields.pop("exc_info", None)
    try:
        return orjson.dumps(fields, default=repr, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # of a huge number or half a surrogate pair, which json takes
        return json.dumps(fields, default=repr).encode()


def _for_people() -> list[structlog.typing.Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # The default formatter prints local variables, and with them prompts.
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback),
    ]
