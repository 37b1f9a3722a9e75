"""One command's time with the service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from cacheserver.cli.options import Link
from cacheserver.cli.output import FAILED, Output
from cacheserver.client import CacheError, Client


@contextmanager
def session(link: Link, *, stdout_is_taken: bool = False) -> Iterator[tuple[Client, Output]]:
    """A client and where to print; what fails meanwhile is printed and ends the command with its exit code."""
    output = Output(as_json=link.as_json, stdout_is_taken=stdout_is_taken)
    try:
        with _client(link) as client:
            yield client, output
    except CacheError as error:
        raise typer.Exit(output.failure(error)) from error
    except OSError as error:
        output.problem(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        raise typer.Exit(FAILED) from error


def token_of(link: Link) -> str | None:
    """The token to call with, if any. Raises OSError where its file cannot be read."""
    given = link.token_file.read_text().strip() if link.token_file else os.environ.get("CACHESERVER_TOKEN")
    return given or None


def trusted_by(link: Link) -> bytes | None:
    """The certificates to trust; None is the usual authorities. Raises OSError where the file cannot be read."""
    return link.ca_file.read_bytes() if link.ca_file else None


def shown_by(link: Link) -> tuple[bytes, bytes] | None:
    """The certificate to show and its key, if any. Raises OSError where a file cannot be read.

    Raises:
        typer.BadParameter: only one of the two is given.
    """
    if (link.cert_file is None) != (link.key_file is None):
        raise typer.BadParameter("--cert-file and --key-file go together.")
    if link.cert_file is None or link.key_file is None:
        return None
    return link.cert_file.read_bytes(), link.key_file.read_bytes()


def _client(link: Link) -> Client:
    return Client(
        link.address,
        token=token_of(link),
        tls=link.tls,
        root_certificates=trusted_by(link),
        certificate=shown_by(link),
    )
