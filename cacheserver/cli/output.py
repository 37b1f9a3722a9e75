"""What a command prints: lines for people, or one JSON object for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from cacheserver.client import CacheError, InvalidRequestError, NotCachedError, UnknownCallError, UnreachableError

FAILED = 1
WRONG_USE = 2
NOT_THERE = 3
"""Exit codes: a failure, a wrong argument, and an image or call that is not there: not cached, gone, not made yet."""

_OFF_TERMINAL_WIDTH = 160


class Output:
    """Standard output and standard error. Colours only on a terminal, and not with NO_COLOR."""

    def __init__(self, *, as_json: bool, stdout_is_taken: bool = False) -> None:
        """With `stdout_is_taken`, what people read goes to standard error."""
        self.as_json = as_json
        self.err = _console(stderr=True)
        self.out = self.err if stdout_is_taken else _console(stderr=False)

    def result(self, facts: Mapping[str, Any], draw: Callable[[Console], None]) -> None:
        """Print `facts` as JSON, or have `draw` print them for people."""
        if self.as_json:
            self.json(facts)
        else:
            draw(self.out)

    @staticmethod
    def json(facts: Mapping[str, Any]) -> None:
        """Print one JSON object on standard output."""
        print(json.dumps(facts, ensure_ascii=False))

    def failure(self, error: CacheError) -> int:
        """Print what failed; returns the exit code that fits."""
        facts = {
            "reason": error.reason,
            "code": error.code.name,
            "message": str(error),
            "violations": error.violations,
            "retry_after_s": error.retry_after_s,
        }
        self._problem(facts, _lines(error))
        if isinstance(error, InvalidRequestError):
            return WRONG_USE
        return NOT_THERE if isinstance(error, NotCachedError | UnknownCallError) else FAILED

    def problem(self, message: str) -> None:
        """Print what is wrong on this side."""
        self._problem({"message": message}, [message])

    def _problem(self, facts: Mapping[str, Any], lines: list[str]) -> None:
        if self.as_json:
            self.json({"error": facts})
        else:
            for line in lines:
                self.err.print(line, style="red")


def dollars(microusd: int) -> str:
    """Money for people."""
    return f"${microusd / 1_000_000:,.4f}"


def size(size_bytes: int) -> str:
    """A number of bytes for people."""
    for unit, worth in (("MB", 1_000_000), ("kB", 1_000)):
        if size_bytes >= worth:
            return f"{size_bytes / worth:,.1f} {unit}"
    return f"{size_bytes} B"


def _lines(error: CacheError) -> list[str]:
    if isinstance(error, UnreachableError):
        return [f"{error}: start it with scripts/serve, or name another with --address"]
    if error.violations:
        return [f"{field}: {what}" for field, what in error.violations.items()]
    reason = f" ({error.reason})" if error.reason else ""
    wait = f"; try again in {error.retry_after_s:.0f} s" if error.retry_after_s else ""
    return [f"{error}{reason}{wait}"]


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _OFF_TERMINAL_WIDTH  # nothing is cut short in a pipe or a log
    return Console(stderr=stderr, width=width, markup=False, highlight=False, soft_wrap=True)
