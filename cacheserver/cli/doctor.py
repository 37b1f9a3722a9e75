"""cacheserver doctor: what is wrong, and how to mend it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from cacheserver.cli.options import Link
from cacheserver.cli.output import FAILED, Output
from cacheserver.cli.serve import Config
from cacheserver.cli.session import shown_by, token_of, trusted_by
from cacheserver.client import DEFAULT_ADDRESS, AsyncClient
from cacheserver.errors import ConfigError

if TYPE_CHECKING:
    from cacheserver.cli.checks import Finding
    from cacheserver.settings import Settings

_STYLES = {"well": "green", "note": "yellow", "broken": "bold red"}


def doctor(*, config: Config = None, link: Link) -> None:
    """Check the config, Redis, S3, the upstreams and the running service; say what is wrong and how to mend it.

    Writes a small test entry to Redis and S3 and removes it. Exit code 1: something is broken.
    """
    from cacheserver.settings import load_settings  # noqa: PLC0415 - no other command needs the service's code

    output = Output(as_json=link.as_json)
    try:
        settings = load_settings(config)
        findings = asyncio.run(_examine(settings, link, lambda finding: _draw(finding, output)))
    except ConfigError as error:
        output.problem(str(error))
        raise typer.Exit(FAILED) from error
    broken = [finding for finding in findings if finding.verdict == "broken"]
    if link.as_json:
        output.json({"ok": not broken, "findings": [asdict(finding) for finding in findings]})
    if broken:
        raise typer.Exit(FAILED)


async def _examine(settings: Settings, link: Link, show: Callable[[Finding], None]) -> list[Finding]:
    from cacheserver.cli.checks import examine, reachable  # noqa: PLC0415 - as above

    server = settings.server
    is_elsewhere = link.address != DEFAULT_ADDRESS
    address = link.address if is_elsewhere else f"{reachable(server.grpc_host)}:{server.grpc_port}"
    tls = link.tls or (server.tls_cert_file is not None and not is_elsewhere)
    findings = []
    client = AsyncClient(
        address,
        token=token_of(link),
        tls=tls,
        root_certificates=trusted_by(link),
        certificate=shown_by(link),
    )
    async with client as service:
        async for finding in examine(settings, service):
            findings.append(finding)
            show(finding)
    return findings


def _draw(finding: Finding, output: Output) -> None:
    if output.as_json:
        return
    console = output.out
    console.print(f"{finding.verdict:<7}", style=_STYLES[finding.verdict], end="")
    console.print(f"{finding.what}: {finding.text}")
    if finding.remedy:
        console.print(f"       {finding.remedy}", style="dim")
