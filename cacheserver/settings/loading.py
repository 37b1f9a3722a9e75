"""From a TOML file and the environment to settings, or to one line that says what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from cacheserver.errors import ConfigError
from cacheserver.settings.names import (
    NOT_SETTINGS,
    WHOLE_TABLES,
    environment_names,
    general_name,
    nearest,
    nearest_setting,
    setting_names,
)
from cacheserver.settings.rules import check_rules
from cacheserver.settings.schema import PAINTER, CallerSettings, Settings, UpstreamSettings

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
    file = _config_file(config_file, env)
    written = _read_toml(file) if file else {}
    origins = _apply_environment(written, env)
    if local_s3:
        _put(written, ("s3", "local"), value=True)
    if not written.get("upstreams"):
        origins |= _apply_openai_pair(written, env)
    settings = _with_secrets(_validated(written, origins), env)
    if not settings.upstreams and settings.is_a_trial:
        settings = settings.model_copy(update={"upstreams": (_painter(),)})
    check_rules(settings)
    return settings


def _config_file(given: Path | None, env: Mapping[str, str]) -> Path | None:
    named = env.get("CACHESERVER_CONFIG")
    file = given or (Path(named) if named else None)
    if file is None:
        return DEFAULT_CONFIG_FILE if DEFAULT_CONFIG_FILE.exists() else None
    if not file.exists():
        origin = "--config" if given else "CACHESERVER_CONFIG"
        raise ConfigError(f"{origin}: there is no file {file}; give the path of a TOML file")
    return file


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{file}: cannot be read: {exc.strerror}; mend its permissions") from exc
    except ValueError as exc:
        raise ConfigError(f"{file}: is not TOML: {exc}") from exc


def _apply_environment(written: dict[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    """Put what `env` sets into `written`; which variable set which setting."""
    known = environment_names()
    origins: dict[str, str] = {}
    for variable, text in env.items():
        if not variable.startswith("CACHESERVER_") or variable in NOT_SETTINGS:
            continue
        if variable not in known:
            meant = nearest(variable, [*known, *NOT_SETTINGS])
            raise ConfigError(f"{variable}: there is no such environment variable; did you mean {meant}?")
        if not text:  # set to nothing is how a shell or a compose file says unset
            continue
        setting = ".".join(known[variable])
        if setting in origins:
            raise ConfigError(f"{variable}: {origins[setting]} sets the same; remove one of them")
        origins[setting] = variable
        _put(written, known[variable], value=_value(variable, setting, text))
    return origins


def _value(variable: str, setting: str, text: str) -> Any:
    if setting == "tiers":
        return [word.strip() for word in text.split(",")]
    if setting not in WHOLE_TABLES:
        return text
    try:
        return json.loads(text)
    except ValueError:
        # The parser's own words would quote the text, which may hold a key.
        raise ConfigError(f"{variable}: is not JSON; write the table as JSON, or in the config file") from None


def _put(written: dict[str, Any], path: Sequence[str], *, value: Any) -> None:
    *tables, name = path
    for table in tables:
        written = written.setdefault(table, {})
        if not isinstance(written, dict):
            raise ConfigError(f"{table}: should be a table; write [{table}] in the config file")
    written[name] = value


def _apply_openai_pair(written: dict[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    key, base_url = env.get("OPENAI_API_KEY"), env.get("OPENAI_BASE_URL")
    if not key:
        if base_url:
            raise ConfigError("OPENAI_BASE_URL: is set without OPENAI_API_KEY; set both (any key, if none is needed)")
        return {}
    upstream = {"name": "openai", "api_key": key}
    written["upstreams"] = [upstream | ({"base_url": base_url} if base_url else {})]
    return {"upstreams[0].base_url": "OPENAI_BASE_URL"}


def _validated(written: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(written)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
    raise ConfigError(_one_line(first, origins))


def _one_line(error: ErrorDetails, origins: Mapping[str, str]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "extra_forbidden":
        return f"{path}: there is no such setting; did you mean {nearest_setting(path)}?"
    wrong = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    origin = f" (set by {origins[path]})" if path in origins else ""
    field = setting_names().get(general_name(path))
    meaning = f". It is: {field.description}" if field is not None else ""
    return f"{path}{origin}: {wrong}{meaning}"


def _with_secrets(settings: Settings, env: Mapping[str, str]) -> Settings:
    """The settings with the keys and tokens that they only point to."""
    upstreams = [_with_key(f"upstreams[{index}]", each, env) for index, each in enumerate(settings.upstreams)]
    callers = [_with_token(f"callers[{index}]", each) for index, each in enumerate(settings.callers)]
    return settings.model_copy(update={"upstreams": tuple(upstreams), "callers": tuple(callers)})


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
