"""The pre-check of prompts, by namespace."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from cacheserver.app.background import keep_doing
from cacheserver.generation.moderation import ModerationEndpoint, OpenAIModeration
from cacheserver.interfaces import Clock
from cacheserver.precheck import DenyList, PromptPolicy
from cacheserver.settings import Settings

_RELOAD_S = 5.0


@dataclass(frozen=True, slots=True)
class Built:
    """Pre-checks by namespace, and the deny-lists that they use, by file."""

    policies: Mapping[str, PromptPolicy]
    lists: dict[Path, DenyList]


class Policies:
    """The pre-check of each namespace that has one, by its name, as the settings read last have it."""

    def __init__(self, *, clock: Clock, undo: AsyncExitStack) -> None:
        self.by_namespace: dict[str, PromptPolicy] = {}
        """One mapping for good: who has it sees what comes into force."""
        self._lists: dict[Path, DenyList] = {}
        self._moderation: OpenAIModeration | None = None
        self._clock = clock
        self._undo = undo
        keep_doing(self._reload_lists, _RELOAD_S, clock=clock, name="reload deny-lists", undo=undo)

    async def build(self, settings: Settings) -> Built:
        """The pre-checks that the settings want, not in force yet. Raises ConfigError for an unusable deny-list."""
        written = settings.namespace_settings
        files = {each.deny_file for each in written.values() if each.deny_file is not None}
        lists = {file: known for file, known in self._lists.items() if file in files}
        for file in files - lists.keys():
            lists[file] = await asyncio.to_thread(DenyList, file)
        if self._moderation is None and any(each.moderation for each in written.values()):
            self._moderation = OpenAIModeration(_moderation_endpoint(settings), clock=self._clock)
            self._undo.push_async_callback(self._moderation.aclose)
        policies = {
            name: PromptPolicy(
                name=name,
                deny=None if each.deny_file is None else lists[each.deny_file],
                pii=each.pii,
                moderation=self._moderation if each.moderation else None,
            )
            for name, each in written.items()
            if each.deny_file is not None or each.pii != "allow" or each.moderation
        }
        return Built(policies, lists)

    def replace(self, built: Built) -> None:
        """From now on these are the pre-checks."""
        self._lists = built.lists
        self.by_namespace.clear()
        self.by_namespace.update(built.policies)

    async def _reload_lists(self) -> None:
        """Bring deny-lists whose files have changed into force without a restart."""
        for each in [*self._lists.values()]:
            await asyncio.to_thread(each.reload)


def _moderation_endpoint(settings: Settings) -> ModerationEndpoint:
    written = settings.moderation
    return ModerationEndpoint(
        name="moderation",
        api_key=written.key,
        base_url=written.base_url,
        model=written.model,
        when_down=written.when_down,
        timeout_s=written.timeout_s,
    )
