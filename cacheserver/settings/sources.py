"""Where settings come from: the config file, the environment, and the OpenAI pair for those who set nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, InitSettingsSource, TomlConfigSettingsSource

from cacheserver.errors import ConfigError
from cacheserver.settings.names import NOT_SETTINGS, environment_name, environment_names, nearest
from cacheserver.settings.schema import ENV_PREFIX, Settings


class ConfigFile(TomlConfigSettingsSource):
    """A TOML file. Raises ConfigError if it cannot be read, or holds something else where a table should be."""

    def __init__(self, file: Path) -> None:
        try:
            is_file = file.is_file()
            super().__init__(Settings, toml_file=file)
        except OSError as exc:
            raise ConfigError(f"{file}: cannot be read: {exc.strerror}; mend its permissions") from exc
        except ValueError as exc:
            raise ConfigError(f"{file}: is not TOML: {exc}") from exc
        if not is_file:  # the library takes it for an empty one
            raise ConfigError(f"{file}: there is no such file; give --config or CACHESERVER_CONFIG the path of one")
        for name, field in Settings.model_fields.items():
            # Checked here because a variable of the section would silently take the place of what is no table.
            if isinstance(field.default, BaseModel) and not isinstance(self.toml_data.get(name, {}), dict):
                raise ConfigError(f"{name}: should be a table; write [{name}] in the config file")


class Environment(EnvSettingsSource):
    """Environment variables, the short names among them. Raises ConfigError for one that sets nothing we know.

    The library ignores variables it does not know, takes them whatever their case, and reads only its own
    process' environment: so what it is given to read is checked and spelt out before.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        super().__init__(Settings, case_sensitive=False)
        known = environment_names()
        variables: dict[str, str] = {}
        self.origins: dict[str, str] = {}
        """Which variable set a setting, by the setting's name."""
        for variable, text in env.items():
            if not variable.startswith(ENV_PREFIX) or variable in NOT_SETTINGS:
                continue
            if variable not in known:
                meant = nearest(variable, [*known, *NOT_SETTINGS])
                raise ConfigError(f"{variable}: there is no such environment variable; did you mean {meant}?")
            if not text:  # set to nothing is how a shell or a compose file says unset
                continue
            setting = known[variable]
            if setting in self.origins:
                raise ConfigError(f"{variable}: {self.origins[setting]} sets the same; remove one of them")
            self.origins[setting] = variable
            variables[environment_name(setting).lower()] = text
        self.env_vars = variables

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """The JSON that a variable holds."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            variable = environment_name(field.alias or field_name)
            # The parser's own words would quote the text, which may hold a key.
            raise ConfigError(f"{variable}: is not JSON; write the table as JSON, or in the config file") from None


class OpenAIPair(InitSettingsSource):
    """OPENAI_API_KEY and OPENAI_BASE_URL: an upstream where the sources before this one name none."""

    def __init__(self, env: Mapping[str, str]) -> None:
        super().__init__(Settings, init_kwargs={})
        self._key = env.get("OPENAI_API_KEY")
        self._base_url = env.get("OPENAI_BASE_URL")
        self.origins: dict[str, str] = {}
        """Which variable set a setting, by the setting's name."""

    def __call__(self) -> dict[str, Any]:
        """The upstream, if there is one."""
        if self.current_state.get("upstreams") or not (self._key or self._base_url):
            return {}
        if not self._key:
            raise ConfigError("OPENAI_BASE_URL: is set without OPENAI_API_KEY; set both (any key, if none is needed)")
        upstream = {"name": "openai", "api_key": self._key}
        if self._base_url:
            upstream["base_url"] = self._base_url
            self.origins = {"upstreams[0].base_url": "OPENAI_BASE_URL"}
        return {"upstreams": [upstream]}
