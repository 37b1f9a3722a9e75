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
from cacheserver.settings.workers import S3Place, WorkerPlace, for_worker, left_over, note_drained

__all__ = [
    "CallerSettings",
    "DiskSettings",
    "GenerationSettings",
    "LogSettings",
    "MemorySettings",
    "NamespaceSettings",
    "RedisSettings",
    "S3Place",
    "S3Settings",
    "ServerSettings",
    "Settings",
    "UpstreamSettings",
    "WorkerPlace",
    "environment_names",
    "for_worker",
    "is_loopback",
    "left_over",
    "load_settings",
    "note_drained",
    "setting_names",
    "warnings",
]
