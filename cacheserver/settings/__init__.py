"""Settings: a TOML file, overridden by the environment, checked as a whole before anything starts."""

from cacheserver.settings.loading import load_settings
from cacheserver.settings.names import environment_names, setting_names
from cacheserver.settings.rules import warnings
from cacheserver.settings.schema import (
    CallerSettings,
    DiskSettings,
    GenerationSettings,
    LogSettings,
    MemorySettings,
    NamespaceSettings,
    RedisSettings,
    S3Settings,
    ServerSettings,
    Settings,
    UpstreamSettings,
    is_loopback,
)

__all__ = [
    "CallerSettings",
    "DiskSettings",
    "GenerationSettings",
    "LogSettings",
    "MemorySettings",
    "NamespaceSettings",
    "RedisSettings",
    "S3Settings",
    "ServerSettings",
    "Settings",
    "UpstreamSettings",
    "environment_names",
    "is_loopback",
    "load_settings",
    "setting_names",
    "warnings",
]
