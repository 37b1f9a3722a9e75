"""Notices as JSON over HTTP, one after the other, to one receiver. Nothing ever waits for it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from typing import Any

import httpx
import structlog

from cacheserver.errors import ConfigError
from cacheserver.interfaces import Books, Clock
from cacheserver.tasks import OwnedTasks

_log = structlog.get_logger(__name__)

_PAUSES_S = (1.0, 5.0, 25.0)
"""Before the second try and each further one."""

_MAX_WAITING = 100
_HOUR_S = 3_600.0
_CLOSING_S = 2.0
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_MAY_PASS = frozenset({408, 425, 429})
"""Answers of a receiver that will take the same notice later, beside every 5xx."""


class Webhook:
    """Posts notices to a URL. What it cannot deliver is counted and logged, without the path that may be a secret."""

    def __init__(  # noqa: PLR0913 - settings, by keyword
        self,
        url: str,
        *,
        token: str = "",
        books: Books,
        clock: Clock,
        timeout_s: float = 5.0,
        max_per_hour: int = 60,
    ) -> None:
        """A client of `url`, without network traffic yet. `timeout_s` is for one try; `token` goes as a bearer token.

        Raises:
            ConfigError: it is no URL.
        """
        try:
            self._url = httpx.URL(url)
        except httpx.InvalidURL:
            raise ConfigError("alerting.webhook_url: is no URL; write http(s)://host[:port]/path") from None
        self._books = books
        self._clock = clock
        self._timeout_s = timeout_s
        self._max_per_hour = max_per_hour
        self._taken_s: deque[float] = deque()
        self._waiting: deque[dict[str, Any]] = deque()
        self._delivering: asyncio.Task[None] | None = None
        self._tasks = OwnedTasks()
        for library in ("httpx", "httpcore"):  # they log URLs
            logging.getLogger(library).setLevel(logging.WARNING)
        self._client = httpx.AsyncClient(
            # A proxy from the environment is for the internet; on loopback there is none to pass.
            trust_env=self._url.host not in _LOOPBACK,
            follow_redirects=False,
            timeout=None,  # noqa: S113 - each try has a deadline as a whole
            headers={"content-type": "application/json", "user-agent": "cacheserver"}
            | ({"authorization": f"Bearer {token}"} if token else {}),
        )

    def send(self, notice: dict[str, Any]) -> None:
        """Post it as soon as may be. Above the hour's most, or where too many wait, one is dropped and counted."""
        now_s = self._clock.monotonic_s()
        while self._taken_s and self._taken_s[0] <= now_s - _HOUR_S:
            self._taken_s.popleft()
        if len(self._taken_s) >= self._max_per_hour:
            self._dropped(notice, f"{self._max_per_hour} in the last hour are the most")
            return
        self._taken_s.append(now_s)
        if len(self._waiting) >= _MAX_WAITING:
            self._dropped(self._waiting[1], "newer ones wait")  # the first is under way
            del self._waiting[1]
        self._waiting.append(notice)
        if self._delivering is None or self._delivering.done():
            self._delivering = self._tasks.own(self._deliver(), "alarm notices")

    async def aclose(self) -> None:
        """Give what waits a moment to go out, and let go of connections."""
        await self._tasks.aclose(_CLOSING_S)
        while self._waiting:
            self._dropped(self._waiting.popleft(), "the service is shutting down")
        await self._client.aclose()

    async def _deliver(self) -> None:
        while self._waiting:
            # It stays in its place until it is out: cut off at shutdown, it is still known to be told of.
            notice = self._waiting[0]
            error = await self._try_to_deliver(notice)
            self._waiting.popleft()
            if error:
                self._books.alarm_notice("failed")
                _log.error("alarm_not_delivered", alarm=notice["alarm"], receiver=self._receiver, error=error)
            else:
                self._books.alarm_notice("delivered")

    async def _try_to_deliver(self, notice: dict[str, Any]) -> str:
        """Post it until it is taken or there is no more hope; empty, or why it was not."""
        for pause_s in _PAUSES_S:
            error, may_pass = await self._post(notice)
            if not (error and may_pass):
                return error
            await self._clock.sleep(pause_s)
        error, _ = await self._post(notice)
        return error

    async def _post(self, notice: dict[str, Any]) -> tuple[str, bool]:
        """Post it once: empty or what went wrong, and whether that may pass."""
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._client.stream("POST", self._url, content=json.dumps(notice).encode()) as response:
                    status = response.status_code
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s", True
        except httpx.HTTPError as error:
            return type(error).__name__, True  # its text may quote the URL
        if httpx.codes.is_success(status):
            return "", False
        return f"it answered {status}", status in _MAY_PASS or httpx.codes.is_server_error(status)

    def _dropped(self, notice: dict[str, Any], reason: str) -> None:
        self._books.alarm_notice("dropped")
        _log.error("alarm_not_delivered", alarm=notice["alarm"], receiver=self._receiver, error=f"dropped: {reason}")

    @property
    def _receiver(self) -> str:
        return f"{self._url.scheme}://{self._url.netloc.decode('ascii')}"
