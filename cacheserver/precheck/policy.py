"""What a namespace lets pass, prompt by prompt."""

from __future__ import annotations

import sys
from typing import Literal, NamedTuple, Protocol

from cachetools import LRUCache

from cacheserver.errors import PiiFoundError, PromptDeniedError
from cacheserver.precheck.deny import DenyList
from cacheserver.precheck.pii import get_ready, redact

PiiPolicy = Literal["allow", "refuse", "redact"]
"""What becomes of a prompt with personal data: nothing, an error, or a prompt with markers in its place."""

_MEMO_BYTES = 8 * 1024 * 1024
_MEMO_OVERHEAD_BYTES = 800
"""What a remembered prompt takes beside its text. It bounds their number as well: about 10,000."""


class Moderation(Protocol):
    """An endpoint that judges prompts, and what it said of late."""

    def passed(self, prompt: str) -> bool:
        """Whether the prompt may pass without a question; False if it has to be checked. Waits for nothing.

        Raises:
            PromptDeniedError: it is known to be refused.
        """
        ...

    async def check(self, prompt: str) -> None:
        """Return if the prompt passes.

        Raises:
            PromptDeniedError: it is refused.
            UpstreamDownError: the endpoint gave no answer, and nothing passes without one.
        """
        ...


class _Verdict(NamedTuple):
    """What came of one prompt. `text` is what is keyed; `kinds` are those of the personal data that is refused."""

    prompt: str
    text: str
    denied: bool
    kinds: tuple[str, ...]


class PromptPolicy:
    """A namespace's pre-check of prompts: before identity, for hits as for misses.

    Deny-list and personal data are judged here and now, the same prompt once; what is remembered is forgotten
    when the deny-list's rules change. Moderation sees the redacted prompt, and is asked for every prompt it has
    not judged of late, whether or not the picture is cached: a picture made under a laxer policy, or put by a
    caller, is refused like a new one. Used from the event loop only.
    """

    def __init__(
        self,
        *,
        name: str,
        deny: DenyList | None = None,
        pii: PiiPolicy = "allow",
        moderation: Moderation | None = None,
    ) -> None:
        """`name` is the namespace's, for messages. `moderation` is closed by whoever made it."""
        self._name = name
        self._deny = deny
        self._pii = pii
        if pii != "allow":
            get_ready()
        self._moderation = moderation
        self._rules = deny.rules if deny else None
        self._verdicts: LRUCache[str, _Verdict] = LRUCache(_MEMO_BYTES, getsizeof=_size_bytes)

    def screened(self, prompt: str) -> str | None:
        """The prompt to go on with; None if moderation has to be asked, so call `screen`. Waits for nothing.

        Raises:
            PromptDeniedError: the deny-list, or moderation's earlier answer, refuses it.
            PiiFoundError: it holds personal data, and this namespace refuses such prompts.
        """
        text = self._passed(prompt)
        return text if self._moderation is None or self._moderation.passed(text) else None

    async def screen(self, prompt: str) -> str:
        """The prompt to go on with, moderation asked if need be.

        Raises:
            PromptDeniedError: the deny-list or moderation refuses it.
            PiiFoundError: it holds personal data, and this namespace refuses such prompts.
            UpstreamDownError: moderation gave no answer, and nothing passes without one.
        """
        text = self._passed(prompt)
        if self._moderation is not None:
            await self._moderation.check(text)
        return text

    def redacted(self, prompt: str) -> str:
        """The prompt as it is keyed, for calls that look and never make: nothing is refused, and it never changes."""
        return redact(prompt).text if self._pii == "redact" else prompt

    def _passed(self, prompt: str) -> str:
        """The prompt to go on with as far as this process can tell."""
        verdict = self._verdict(prompt)
        if verdict.denied:
            raise PromptDeniedError(f"The deny-list of namespace {self._name} refuses this prompt. Change the prompt.")
        if verdict.kinds:
            found = ", ".join(verdict.kinds)
            raise PiiFoundError(f"Namespace {self._name} takes no personal data, and the prompt has some: {found}.")
        return verdict.text

    def _verdict(self, prompt: str) -> _Verdict:
        rules = self._deny.rules if self._deny else None
        if rules is not self._rules:
            self._verdicts.clear()
            self._rules = rules
        verdict = self._verdicts.get(prompt)
        if verdict is None:
            verdict = _Verdict(prompt, prompt, denied=bool(rules and rules.denies(prompt)), kinds=())
            if self._pii != "allow":
                text, kinds = redact(prompt)
                verdict = verdict._replace(kinds=kinds) if self._pii == "refuse" else verdict._replace(text=text)
            self._verdicts[prompt] = verdict
        return verdict


def _size_bytes(verdict: _Verdict) -> int:
    text_bytes = 0 if verdict.text is verdict.prompt else sys.getsizeof(verdict.text)
    return sys.getsizeof(verdict.prompt) + text_bytes + _MEMO_OVERHEAD_BYTES
