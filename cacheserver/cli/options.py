"""Options that several commands share, in groups."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

import typer

from cacheserver.client import DEFAULT_ADDRESS, InputImage, InputRole, SpecOptions

_MAX_USD = 1_000_000_000

Namespace = Annotated[str | None, typer.Option(help="Policy, budget and reports to use.", show_default="default")]


@dataclass(frozen=True, kw_only=True)
class Link:
    """How to reach the service, and how to print what it says. The token comes from CACHESERVER_TOKEN or a file."""

    address: Annotated[
        str, typer.Option(envvar="CACHESERVER_ADDRESS", help="The service: HOST:PORT or unix:/path/to/socket.")
    ] = DEFAULT_ADDRESS
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds the token; goes before the variable CACHESERVER_TOKEN.")
    ] = None
    tls: Annotated[bool, typer.Option("--tls", help="Connect by TLS.")] = False
    ca_file: Annotated[
        Path | None,
        typer.Option(envvar="CACHESERVER_CA_FILE", help="PEM certificates to trust; connects by TLS."),
    ] = None
    cert_file: Annotated[
        Path | None,
        typer.Option(envvar="CACHESERVER_CERT_FILE", help="PEM certificate to show, with --key-file; connects by TLS."),
    ] = None
    key_file: Annotated[
        Path | None, typer.Option(envvar="CACHESERVER_KEY_FILE", help="PEM key of that certificate.")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What decides the picture beside the prompt."""

    model: Annotated[str | None, typer.Option(help="Model name.")] = None
    size: Annotated[str | None, typer.Option(help="auto or WIDTHxHEIGHT.")] = None
    quality: Annotated[str | None, typer.Option(help="auto, low, medium, high, …")] = None
    background: Annotated[str | None, typer.Option(help="auto, transparent or opaque.")] = None
    output_format: Annotated[str | None, typer.Option("--format", help="png, jpeg or webp.")] = None
    compression: Annotated[int | None, typer.Option(help="0 to 100, for jpeg and webp.")] = None
    moderation: Annotated[str | None, typer.Option(help="auto or low.")] = None
    seed: Annotated[int | None, typer.Option(help="For models that take one.")] = None
    extra: Annotated[str | None, typer.Option(help="Further parameters of the provider, a JSON object.")] = None

    def options(self, inputs: Sequence[InputImage] | None = None) -> SpecOptions:
        """The same for the client, with the images that an edit starts from.

        Raises:
            typer.BadParameter: `extra` is no JSON object.
        """
        return SpecOptions(
            model=self.model,
            size=self.size,
            quality=self.quality,
            background=self.background,
            output_format=self.output_format,
            output_compression=self.compression,
            moderation=self.moderation,
            seed=self.seed,
            extra=None if self.extra is None else _json_object(self.extra),
            inputs=inputs,
        )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What an edit starts from."""

    images: Annotated[
        list[Path] | None, typer.Option("--input", help="Image to edit: png, jpeg or webp; repeatable.")
    ] = None
    mask: Annotated[Path | None, typer.Option(help="Where to edit the first --input: png, as large as that.")] = None

    def whole(self) -> Sequence[InputImage] | None:
        """The images, for a call that may have something made of them; None if there are none. Raises OSError."""
        images = [InputImage(file.read_bytes()) for file in self.images or ()]
        masks = [] if self.mask is None else [InputImage(self.mask.read_bytes(), InputRole.MASK)]
        return images + masks or None

    def named(self) -> Sequence[InputImage] | None:
        """The same by their digests, for a call that only looks. Raises OSError."""
        return [InputImage(role=each.role, digest=_digest(each.data or b"")) for each in self.whole() or ()] or None


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def microusd(text: str, option: str) -> int:
    """Dollars as written, in micro-dollars: exact, so that nothing is lost on the way through a float.

    Raises:
        typer.BadParameter: it is no such amount.
    """
    try:
        usd = Decimal(text)
    except InvalidOperation:
        usd = Decimal("NaN")
    if not usd.is_finite() or not 0 <= usd <= _MAX_USD:
        raise typer.BadParameter(f"must be a number from 0 to {_MAX_USD}", param_hint=option)
    return round(usd * 1_000_000)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as exc:
        raise typer.BadParameter(f"not JSON: {exc.msg} at character {exc.pos}", param_hint="--extra") from None
    if not isinstance(value, dict):
        raise typer.BadParameter("not a JSON object", param_hint="--extra")
    return value
