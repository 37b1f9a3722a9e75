"""Logging: structlog, one event a line; JSON where nobody looks, colours on a terminal."""

from __future__ import annotations

import logging
import sys

import structlog


def set_up_logging(*, level: str, form: str) -> None:
    """Send all log lines to standard error.

    `level` is a name logging knows ("info"); `form` is "json", "console", or "auto" for console on a terminal
    and JSON elsewhere. What the caller of an rpc bound (request id, trace id) is in every line of that call.
    """
    is_console = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = _console() if is_console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if is_console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _console() -> structlog.dev.ConsoleRenderer:
    # The default formatter prints local variables, and with them prompts.
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
