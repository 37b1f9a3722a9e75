"""How settings are called: in the file, in the environment and in complaints."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cacheserver.settings.schema import (
    ENV_PREFIX,
    AlarmSettings,
    CallerSettings,
    LimitGroupSettings,
    NamespaceSettings,
    Settings,
    UpstreamSettings,
)

WHOLE_TABLES = ("upstreams", "limit_groups", "callers", "namespaces", "alarms")
"""Tables that repeat. In the environment they are set as a whole, as JSON."""

NOT_SETTINGS = frozenset({"CACHESERVER_CONFIG", "CACHESERVER_ADDRESS", "CACHESERVER_TOKEN", "CACHESERVER_CA_FILE"})
"""Variables that choose the config file, and those of the client and the command."""

_LISTED, _NAMED = "[].", ".NAME."

_REPEATED: dict[str, tuple[str, type[BaseModel]]] = {
    "upstreams": (_LISTED, UpstreamSettings),
    "callers": (_LISTED, CallerSettings),
    "alarms": (_LISTED, AlarmSettings),
    "limit_groups": (_NAMED, LimitGroupSettings),
    "namespaces": (_NAMED, NamespaceSettings),
}

_SHORT_NAMES = {
    "CACHESERVER_GRPC_PORT": "server.grpc_port",
    "CACHESERVER_HTTP_PORT": "server.http_port",
    "CACHESERVER_MEMORY_MAX_BYTES": "memory.max_bytes",
    "CACHESERVER_REDIS_URL": "redis.url",
    "CACHESERVER_S3_BUCKET": "s3.bucket",
    "CACHESERVER_S3_ENDPOINT": "s3.endpoint",
    "CACHESERVER_S3_PREFIX": "s3.prefix",
}


def setting_names() -> dict[str, FieldInfo]:
    """Every setting by its full name: `redis.url`, `upstreams[].name`, `namespaces.NAME.ttl_s`."""
    return dict(_settings_of(Settings, ""))


def environment_names() -> dict[str, str]:
    """Every environment variable that sets something, and the full name of what it sets."""
    single = [name for name in setting_names() if _LISTED not in name and _NAMED not in name]
    return {environment_name(name): name for name in [*single, *WHOLE_TABLES]} | _SHORT_NAMES


def environment_name(setting: str) -> str:
    """The long name of the variable for a setting: CACHESERVER_REDIS__URL for `redis.url`."""
    return ENV_PREFIX + setting.replace(".", "__").upper()


def general_name(path: str) -> str:
    """The name that `setting_names` has for the setting at `path`: `upstreams[].name` for `upstreams[0].name`."""
    return re.sub(r"\A(namespaces|limit_groups)\.[^.]+", r"\1.NAME", re.sub(r"\[\d+\]", "[]", path))


def nearest_setting(path: str) -> str:
    """The setting that someone who wrote `path` may have meant, in the same table if there is one."""
    name = general_name(path)
    names = list(setting_names())
    table = name.rpartition(".")[0]
    siblings = [each for each in names if table and each.rpartition(".")[0] == table]
    tables = [re.split(r"[.\[]", each)[0] for each in names]
    return nearest(name, siblings or [*names, *tables])


def nearest(name: str, known: Sequence[str]) -> str:
    """The one of `known` that is spelt most like `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _settings_of(table: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for attribute, field in table.model_fields.items():
        name = f"{prefix}{field.alias or attribute}"
        if name in _REPEATED:
            joint, repeated = _REPEATED[name]
            yield from _settings_of(repeated, f"{name}{joint}")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings_of(field.annotation, f"{name}.")
        else:
            yield name, field
