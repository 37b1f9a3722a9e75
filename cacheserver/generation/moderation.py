"""An endpoint shaped like OpenAI's `POST /v1/moderations`, asked about prompts before they are looked up.

`{"model", "input"}` goes out, `{"results": [{"flagged", "categories": {name: bool}}]}` comes back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import httpx
import structlog
from cachetools import TTLCache

from cacheserver.errors import ConfigError, PromptDeniedError, ShuttingDownError, UpstreamDownError
from cacheserver.generation.providers.download import read_at_most
from cacheserver.interfaces import Clock
from cacheserver.tasks import OwnedTasks

WhenDown = Literal["allow", "refuse"]
"""What becomes of prompts that cannot be judged."""

_log = structlog.get_logger(__name__)

_MAX_REPLY_BYTES = 64 * 1024
_MAX_CONNECTIONS = 64
_CONNECT_TIMEOUT_S = 2.0
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_REMEMBERED = 50_000
_PAUSE_S = 5.0
"""How long an endpoint that failed is not asked: nobody should wait for its deadline in vain, call after call."""

_OF_THE_PROMPT = frozenset({400, 413, 422})
"""Answers that say something of this prompt and nothing of the endpoint: they must not pause it for others."""

_CATEGORY = re.compile(r"[a-z][a-z0-9_/-]{0,39}")
_MAX_CATEGORIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModerationEndpoint:
    """Where prompts are judged, and what is made of the answers."""

    name: str
    """Its name in messages and logs."""

    api_key: Callable[[], str] = field(repr=False)
    """Gives the key; asked before each call. An empty one sends no key."""

    base_url: str = "https://api.openai.com/v1"
    """With the version, as an upstream's."""

    model: str = "omni-moderation-latest"
    when_down: WhenDown = "refuse"

    timeout_s: float = 3.0
    """For a whole call."""

    remember_s: float = 600.0
    """How long an answer stands."""


@dataclass(frozen=True, slots=True)
class _Judgement:
    """What the endpoint said of a prompt; `categories` are the names it gave for a refusal."""

    flagged: bool
    categories: tuple[str, ...] = ()


class _NoAnswerError(Exception):
    """The endpoint did not judge the prompt. `pauses` says that it would judge no other now either."""

    def __init__(self, text: str, *, pauses: bool = True) -> None:
        super().__init__(text)
        self.pauses = pauses


class OpenAIModeration:
    """A Moderation over HTTP. Callers who ask of the same prompt at once share a call, and it ends for none early."""

    def __init__(self, endpoint: ModerationEndpoint, *, clock: Clock) -> None:
        """A client of `endpoint`, without network traffic yet.

        Raises:
            ConfigError: the endpoint's base_url is not one.
        """
        self._endpoint = endpoint
        self._url = _url(endpoint)
        self._clock = clock
        self._judgements: TTLCache[bytes, _Judgement] = TTLCache(
            _REMEMBERED, ttl=endpoint.remember_s, timer=clock.monotonic_s
        )
        self._running: dict[bytes, asyncio.Task[_Judgement | _NoAnswerError]] = {}
        self._tasks = OwnedTasks()
        self._paused_until_s = clock.monotonic_s()
        # They log what they read, which may be the prompt.
        for library in ("httpx", "httpcore"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self._client = httpx.AsyncClient(
            # A proxy from the environment is for the internet; on loopback there is none to pass.
            trust_env=self._url.host not in _LOOPBACK,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=_MAX_CONNECTIONS),
            # An answer that is not compressed cannot grow while it is read.
            headers={"accept": "application/json", "accept-encoding": "identity"},
        )

    def passed(self, prompt: str) -> bool:
        """Whether the prompt may pass without a question; False if it has to be checked.

        Raises:
            PromptDeniedError: it was refused of late.
        """
        judgement = self._judgements.get(_digest(prompt))
        if judgement is None:
            return self._endpoint.when_down == "allow" and self._is_paused
        self._raise_if_flagged(judgement)
        return True

    async def check(self, prompt: str) -> None:
        """Return if the prompt passes, or cannot be judged and may pass then.

        Raises:
            PromptDeniedError: the endpoint flags it.
            UpstreamDownError: it cannot be judged, and nothing passes unjudged.
            ShuttingDownError: the service is going down.
        """
        if self.passed(prompt):
            return
        outcome = _NoAnswerError("it failed a moment ago") if self._is_paused else await self._judged(prompt)
        if isinstance(outcome, _Judgement):
            self._raise_if_flagged(outcome)
        elif self._endpoint.when_down == "refuse":
            raise UpstreamDownError(
                f"The moderation {self._endpoint.name} did not judge the prompt ({outcome}), and nothing passes "
                "unjudged. Try again.",
                retry_after_s=_PAUSE_S,
            )

    async def aclose(self) -> None:
        """End what runs and let go of connections."""
        await self._tasks.aclose(grace_s=0)
        await self._client.aclose()

    @property
    def _is_paused(self) -> bool:
        return self._clock.monotonic_s() < self._paused_until_s

    def _raise_if_flagged(self, judgement: _Judgement) -> None:
        if judgement.flagged:
            named = f" ({', '.join(judgement.categories)})" if judgement.categories else ""
            raise PromptDeniedError(
                f"The moderation {self._endpoint.name} refuses this prompt{named}. Change the prompt."
            )

    async def _judged(self, prompt: str) -> _Judgement | _NoAnswerError:
        """What the endpoint says of the prompt, in one call however many wait for it."""
        digest = _digest(prompt)
        task = self._running.get(digest)
        if task is None:
            task = self._tasks.own(self._ask(digest, prompt), name="moderation")
            self._running[digest] = task
            task.add_done_callback(lambda _: self._running.pop(digest))
        # Not awaited itself: a caller who hangs up must not take the call from the others.
        await asyncio.wait({task})
        if task.cancelled():
            raise ShuttingDownError("The service is shutting down; try another replica.")
        return task.result()

    async def _ask(self, digest: bytes, prompt: str) -> _Judgement | _NoAnswerError:
        try:
            judgement = await self._call(prompt)
        except _NoAnswerError as error:
            if error.pauses:
                self._paused_until_s = self._clock.monotonic_s() + _PAUSE_S
            _log.warning("moderation_failed", moderation=self._endpoint.name, error=str(error))
            return error
        self._judgements[digest] = judgement
        return judgement

    async def _call(self, prompt: str) -> _Judgement:
        body = json.dumps({"model": self._endpoint.model, "input": prompt}).encode("ascii")
        request = self._client.build_request("POST", self._url, content=body, headers=self._headers())
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                response = await self._client.send(request, stream=True)
                try:
                    reply = await read_at_most(response, _MAX_REPLY_BYTES)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise _NoAnswerError(f"no answer within {self._endpoint.timeout_s:g} s") from None
        except httpx.RequestError as error:
            # Not chained: a protocol error quotes what it read, which may be the prompt.
            raise _NoAnswerError(type(error).__name__) from None
        if response.status_code != httpx.codes.OK:
            pauses = response.status_code not in _OF_THE_PROMPT
            raise _NoAnswerError(f"it answered {response.status_code}", pauses=pauses)
        if reply is None:
            raise _NoAnswerError(f"its answer has more than {_MAX_REPLY_BYTES} bytes or is compressed")
        return _read(reply)

    def _headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        key = self._endpoint.api_key().strip()
        if not (key.isascii() and key.isprintable()):
            raise _NoAnswerError("the API key has characters that no header may carry")
        return headers | {"authorization": f"Bearer {key}"} if key else headers


def _read(reply: bytes) -> _Judgement:
    """The judgement of a 200. What is no judgement is no pass either."""
    try:
        document = json.loads(reply)
    except (ValueError, RecursionError):
        raise _NoAnswerError("its answer is not JSON") from None
    results = document.get("results") if isinstance(document, dict) else None
    judged = [result for result in results if isinstance(result, dict)] if isinstance(results, list) else []
    flags = [result.get("flagged") for result in judged]
    if not flags or not all(isinstance(flag, bool) for flag in flags):
        raise _NoAnswerError("its answer judges nothing: check base_url")
    named = {name for result in judged for name in _categories(result.get("categories"))}
    return _Judgement(any(flags), tuple(sorted(named)[:_MAX_CATEGORIES]))


def _categories(categories: object) -> list[str]:
    """The names of those that apply, as far as they are names."""
    if not isinstance(categories, Mapping):
        return []
    return [name for name, applies in categories.items() if applies is True and _CATEGORY.fullmatch(name)]


def _digest(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode(), digest_size=16).digest()


def _url(endpoint: ModerationEndpoint) -> httpx.URL:
    try:
        url = httpx.URL(endpoint.base_url)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host or url.userinfo or url.query or url.fragment:
        raise ConfigError(f"moderation {endpoint.name}: base_url has to be http(s)://host[:port][/path], nothing else")
    return httpx.URL(f"{str(url).rstrip('/')}/moderations")
