"""From a TOML file and the environment to settings, or to one line that says what is wrong."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import InitSettingsSource

from cacheserver.errors import ConfigError
from cacheserver.settings.names import general_name, nearest_setting, setting_names
from cacheserver.settings.rules import check_rules
from cacheserver.settings.schema import PAINTER, AlertingSettings, CallerSettings, Settings, UpstreamSettings
from cacheserver.settings.sources import ConfigFile, Environment, OpenAIPair

DEFAULT_CONFIG_FILE = Path("cacheserver.toml")


def load_settings(
    config_file: Path | None = None, env: Mapping[str, str] = os.environ, *, local_s3: bool = False
) -> Settings:
    """The settings of `config_file`, overridden by `env`.

    Without `config_file` it is the one that CACHESERVER_CONFIG names, or cacheserver.toml in the working
    directory if there is one. `local_s3` is the command line's --local-s3.

    Raises:
        ConfigError: one line that names the setting, what is wrong and how to mend it; no secret is in it.
    """
    flags = InitSettingsSource(Settings, init_kwargs={"s3": {"local": True}} if local_s3 else {})
    file = _config_file(config_file, env)
    config_files = [ConfigFile(file)] if file else []
    environment = Environment(env)
    openai_pair = OpenAIPair(env)
    try:
        settings = Settings(_build_sources=((flags, environment, *config_files, openai_pair), {}))
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        # Not chained: what pydantic says of the rest may quote a secret.
        raise ConfigError(_one_line(first, environment.origins | openai_pair.origins)) from None
    settings = _with_secrets(settings, env)
    if not settings.upstreams and settings.is_a_trial:
        settings = settings.model_copy(update={"upstreams": (_painter(),)})
    check_rules(settings)
    return settings


def _config_file(given: Path | None, env: Mapping[str, str]) -> Path | None:
    if given is not None:
        return given
    if named := env.get("CACHESERVER_CONFIG"):
        return Path(named)
    return DEFAULT_CONFIG_FILE if DEFAULT_CONFIG_FILE.exists() else None


def _one_line(error: ErrorDetails, origins: Mapping[str, str]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    origin = next((f" (set by {origins[name]})" for name in origins if _is_in(path, name)), "")
    if error["type"] == "extra_forbidden":
        return f"{path}{origin}: there is no such setting; did you mean {nearest_setting(path)}?"
    wrong = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    wrong = wrong.replace("a valid tuple", "a list").replace("a valid dictionary", "a table")
    field = setting_names().get(general_name(path))
    meaning = f". It is: {field.description}" if field is not None else ""
    return f"{path}{origin}: {wrong}{meaning}"


def _is_in(path: str, setting: str) -> bool:
    """Whether `path` is that of a setting or of a part of its value."""
    return path == setting or path.startswith((f"{setting}.", f"{setting}["))


def _with_secrets(settings: Settings, env: Mapping[str, str]) -> Settings:
    """The settings with the keys and tokens that they only point to."""
    upstreams = [_with_key(f"upstreams[{index}]", each, env) for index, each in enumerate(settings.upstreams)]
    callers = [_with_token(f"callers[{index}]", each) for index, each in enumerate(settings.callers)]
    alerting = _with_webhook_token(settings.alerting, env)
    return settings.model_copy(update={"upstreams": tuple(upstreams), "callers": tuple(callers), "alerting": alerting})


def _with_key(path: str, upstream: UpstreamSettings, env: Mapping[str, str]) -> UpstreamSettings:
    if upstream.api_key_env:
        key = env.get(upstream.api_key_env)
        if not key:
            raise ConfigError(f"{path}.api_key_env: {upstream.api_key_env} is not set in the environment; export it")
    elif upstream.api_key_file:
        key = _read_secret(f"{path}.api_key_file", upstream.api_key_file)
    else:
        return upstream
    return upstream.model_copy(update={"api_key": SecretStr(key)})


def _with_token(path: str, caller: CallerSettings) -> CallerSettings:
    if caller.token_file is None:
        return caller
    token = _read_secret(f"{path}.token_file", caller.token_file)
    return caller.model_copy(update={"token_sha256": hashlib.sha256(token.encode()).hexdigest()})


def _with_webhook_token(alerting: AlertingSettings, env: Mapping[str, str]) -> AlertingSettings:
    if alerting.webhook_token_env is None:
        return alerting
    token = env.get(alerting.webhook_token_env)
    if not token:
        raise ConfigError(
            f"alerting.webhook_token_env: {alerting.webhook_token_env} is not set in the environment; export it"
        )
    return alerting.model_copy(update={"webhook_token": SecretStr(token)})


def _read_secret(setting: str, file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise ConfigError(f"{setting}: {file} cannot be read: {reason}; mend the path or the file") from None
    if not text:
        raise ConfigError(f"{setting}: {file} is empty; put the secret there")
    return text


def _painter() -> UpstreamSettings:
    return UpstreamSettings.model_validate({"name": PAINTER, "kind": PAINTER, "models": [PAINTER]})
