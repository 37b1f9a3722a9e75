"""Which settings differ between two readings of a file, of those that take a restart to come into force."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from cacheserver.model import MatchLevel
from cacheserver.settings.schema import NamespaceSettings, Settings, UpstreamSettings

_AT_ONCE = frozenset(
    {
        "callers",
        "budget.per_day_microusd",
        "budget.per_month_microusd",
        "generation.prices_file",
        "similarity.enabled",
    }
)
_UPSTREAM_AFTER_RESTART = ("kind", "models", "limit_group", "read_timeout_s")
_NAMESPACE_AFTER_RESTART = ("store_prompts",)


def needing_restart(running: Settings, read: Settings) -> list[str]:
    """The names of the settings in which `read` differs from what the process was started with, and which stay."""
    names = [*_plain(running, read), *_upstreams(running, read), *_namespaces(running, read)]
    if not running.budgets and read.budgets:
        names.append("budgets (the first one)")
    return names


def _plain(running: Settings, read: Settings) -> Iterator[str]:
    for name in Settings.model_fields:
        if name in {"upstreams", "namespace_settings"}:
            continue
        before, after = getattr(running, name), getattr(read, name)
        if isinstance(before, BaseModel):
            for field in type(before).model_fields:
                if getattr(before, field) != getattr(after, field) and f"{name}.{field}" not in _AT_ONCE:
                    yield f"{name}.{field}"
        elif before != after and name not in _AT_ONCE:
            yield name


def _upstreams(running: Settings, read: Settings) -> Iterator[str]:
    before, after = _by_name(running), _by_name(read)
    for name in sorted(before.keys() ^ after.keys()):
        yield f"upstreams ({'added' if name in after else 'removed'}: {name})"
    for name in before.keys() & after.keys():
        for field in _UPSTREAM_AFTER_RESTART:
            if getattr(before[name], field) != getattr(after[name], field):
                yield f"upstreams.{name}.{field}"


def _semantic(settings: Settings) -> list[str]:
    return [name for name, each in settings.namespaces.items() if each.similarity is MatchLevel.SEMANTIC]


def _by_name(settings: Settings) -> dict[str, UpstreamSettings]:
    return {each.name: each for each in settings.upstreams}


def _namespaces(running: Settings, read: Settings) -> Iterator[str]:
    if _semantic(read) and not _semantic(running):
        yield f"namespaces.{_semantic(read)[0]}.similarity (the first semantic one)"
    none = NamespaceSettings()
    for name in sorted(running.namespace_settings.keys() | read.namespace_settings.keys()):
        before, after = running.namespace_settings.get(name, none), read.namespace_settings.get(name, none)
        for field in _NAMESPACE_AFTER_RESTART:
            if getattr(before, field) != getattr(after, field):
                yield f"namespaces.{name}.{field}"
