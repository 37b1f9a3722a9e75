"""The secrets that URLs are signed with: given, in a file, or made once and kept."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from cacheserver.errors import ConfigError

MIN_CHARACTERS = 32

_FILE = "url-secret"
_MAX_BYTES = 64 * 1024


def read_secrets(file: Path) -> list[bytes]:
    """The secrets of `delivery.url_secret_file`, a line each: the first signs, the others are still accepted.

    Raises:
        ConfigError: it cannot be read, or has none that is long enough.
    """
    return _read(file, "delivery.url_secret_file")


def own_secrets(data_dir: Path) -> list[bytes]:
    """The secret in `data_dir`, made when first needed: readable by us alone, and there as a whole or not at all.

    Raises:
        ConfigError: it can neither be read nor made.
    """
    file = data_dir / _FILE
    if not file.exists():
        try:
            _make(file)
        except OSError as error:
            raise ConfigError(
                f"data_dir: the secret for URLs cannot be written to {file}: {error.strerror}; mend its permissions, "
                "or set delivery.url_secret_file"
            ) from error
    return _read(file, "data_dir")


def _make(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_urlsafe(MIN_CHARACTERS) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        with suppress(FileExistsError):  # another process was faster, and its secret is the one
            os.link(draft, file)
    finally:
        draft.unlink()


def _read(file: Path, setting: str) -> list[bytes]:
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{setting}: {file} cannot be read: {error.strerror}; mend the path or its permissions"
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or len(text) > _MAX_BYTES or any(len(line) < MIN_CHARACTERS for line in lines):
        raise ConfigError(
            f"{setting}: {file} should have one secret a line, each of {MIN_CHARACTERS} characters at least; "
            "write it anew"
        )
    return lines
