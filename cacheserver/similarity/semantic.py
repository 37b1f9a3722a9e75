"""The semantic level: prompts that look alike, agree in every slot, and that a verifier says are one picture.

    nearest prompts ──▶ guards ──▶ verifier ──▶ its picture answers
    (candidates.py)   (guards.py)  (verifier.py)

No score decides: it only says in which order the few nearest are looked at. Without a verifier the level is a shadow:
it logs and counts what it would have asked about, and nothing is answered. Whatever goes wrong on the way is a no.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from cacheserver.interfaces import Books
from cacheserver.model import Alias, CacheKey, MatchLevel
from cacheserver.similarity.candidates import Candidate, Candidates
from cacheserver.similarity.guards import differences
from cacheserver.similarity.verifier import Verifier

_log = structlog.get_logger(__name__)

_ANSWERED = frozenset({"yes", "no", "unclear"})
"""Reasons of a verdict after which the next candidate is worth asking about."""


class Semantic:
    """Finds the stored picture of another prompt that a verifier takes for the same."""

    def __init__(
        self, *, candidates: Candidates, verifier: Verifier | None, books: Books, floor: float, timeout_s: float
    ) -> None:
        """`floor` is the least score of a candidate, 0 to 1; `timeout_s` the most that a search may take in all."""
        self._candidates = candidates
        self._verifier = verifier
        self._books = books
        self._floor = floor
        self._timeout_s = timeout_s

    async def learn(self, group: str, key: CacheKey, prompt: str, prompt_digest: bytes) -> None:
        """From now on the picture of `key`, made for this prompt, may answer others of the group."""
        try:
            await asyncio.to_thread(self._candidates.add, group, _key_of(key, prompt_digest), prompt)
        except Exception:  # noqa: BLE001 - an embedder of the operator's may raise anything, and nobody waits for this
            _log.exception("prompt_not_learned")

    async def forget(self, group: str, alias: Alias) -> None:
        """What the alias says is there no more."""
        await asyncio.to_thread(self._candidates.remove, group, _key_of(alias.key, alias.prompt_digest))

    async def find(
        self, group: str, prompt: str, *, namespace: str, may_answer: Callable[[CacheKey], bool]
    ) -> Alias | None:
        """What answers a prompt of the group, if the verifier says so in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._find(group, prompt, namespace, may_answer)
        except TimeoutError:
            self._books.verified(namespace, "timeout", 0)
        except Exception:  # noqa: BLE001 - an embedder or verifier of the operator's may raise anything: it is a no
            _log.exception("similar_not_found")
            self._books.verified(namespace, "error", 0)
        return None

    async def _find(
        self, group: str, prompt: str, namespace: str, may_answer: Callable[[CacheKey], bool]
    ) -> Alias | None:
        for candidate in await asyncio.to_thread(self._candidates.nearest, group, prompt, floor=self._floor):
            alias = _alias_of(candidate)
            if not may_answer(alias.key):
                continue
            slots = await asyncio.to_thread(differences, prompt, candidate.prompt)
            if slots or self._verifier is None:
                self._tell_shadow(namespace, alias, candidate.score, slots)
                continue
            verdict = await self._verifier.same_picture(prompt, candidate.prompt)
            self._books.verified(namespace, verdict.reason, verdict.cost_microusd)
            if verdict.same:
                return alias
            if verdict.reason not in _ANSWERED:
                break
        return None

    def _tell_shadow(self, namespace: str, alias: Alias, score: float, slots: tuple[str, ...]) -> None:
        if self._verifier is not None:
            return
        self._books.shadow_match(namespace, is_guarded=bool(slots))
        _log.info("similar_shadow", namespace=namespace, key=alias.key.name, score=round(score, 3), differs_in=slots)


def _key_of(key: CacheKey, prompt_digest: bytes) -> str:
    return f"{key.name}:{prompt_digest.hex()}"


def _alias_of(candidate: Candidate) -> Alias:
    name, _, prompt_digest = candidate.key.partition(":")
    return Alias(CacheKey.parse(name), MatchLevel.SEMANTIC, bytes.fromhex(prompt_digest))
