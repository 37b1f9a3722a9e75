"""cacheserver token: a new caller's token and its lines in the config file."""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import Annotated

import typer

from cacheserver.cli.output import Output
from cacheserver.model import PARTITION_PATTERN, Permission

_TOKEN_BYTES = 32


def token(
    name: Annotated[str, typer.Argument(help="The caller's name in logs and reports.")],
    *,
    namespace: Annotated[
        list[str] | None, typer.Option(help="What it may use; repeatable.", show_default="default")
    ] = None,
    allow: Annotated[
        list[Permission] | None, typer.Option(help="What it may do; repeatable.", show_default="read, generate")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Make a random token for a caller.

    The lines for the config file go to standard output (append them to cacheserver.toml), the token itself to
    standard error: it is shown once, and the service keeps only its SHA-256.
    """
    if not PARTITION_PATTERN.fullmatch(name):
        raise typer.BadParameter("1 to 63 characters of a-z, 0-9, _ and -, the first a letter or digit")
    secret = secrets.token_urlsafe(_TOKEN_BYTES)
    caller = {
        "name": name,
        "token_sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "namespaces": namespace or ["default"],
        "allow": [*(allow or [Permission.READ, Permission.GENERATE])],
    }
    # A JSON string, or list of strings, is a TOML one.
    config = "\n".join(["[[callers]]", *(f"{field} = {json.dumps(value)}" for field, value in caller.items())])
    output = Output(as_json=as_json)
    output.result({"token": secret, "caller": caller}, lambda console: console.print(config))
    if not as_json:
        output.err.print(f"CACHESERVER_TOKEN={secret}")
