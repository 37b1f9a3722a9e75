"""The pre-check of prompts, by namespace."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from contextlib import AsyncExitStack

from cacheserver.app.background import keep_doing
from cacheserver.generation.moderation import ModerationEndpoint, OpenAIModeration
from cacheserver.interfaces import Clock
from cacheserver.precheck import DenyList, PromptPolicy
from cacheserver.settings import Settings

_RELOAD_S = 5.0


async def build_policies(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> dict[str, PromptPolicy]:
    """The pre-check of each namespace that has one. Raises ConfigError for a deny-list that cannot be used."""
    written = settings.namespace_settings
    files = {each.deny_file for each in written.values() if each.deny_file is not None}
    lists = {file: await asyncio.to_thread(DenyList, file) for file in files}
    if lists:
        reload = functools.partial(_reload, lists.values())
        keep_doing(reload, _RELOAD_S, clock=clock, name="reload deny-lists", undo=undo)
    moderation = None
    if any(each.moderation for each in written.values()):
        moderation = OpenAIModeration(_moderation_endpoint(settings), clock=clock)
        undo.push_async_callback(moderation.aclose)
    return {
        name: PromptPolicy(
            name=name,
            deny=None if each.deny_file is None else lists[each.deny_file],
            pii=each.pii,
            moderation=moderation if each.moderation else None,
        )
        for name, each in written.items()
        if each.deny_file is not None or each.pii != "allow" or each.moderation
    }


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


async def _reload(lists: Iterable[DenyList]) -> None:
    """Bring deny-lists whose files have changed into force without a restart."""
    for each in lists:
        await asyncio.to_thread(each.reload)
