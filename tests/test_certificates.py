"""A client's certificate names its caller: real certificates, made here, against a whole service."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cacheserver.app import Service, start
from cacheserver.cli import app
from cacheserver.client import AsyncClient, ImageSpec, PermissionDeniedError
from cacheserver.errors import ConfigError
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from cacheserver.settings import load_settings
from tests.provider import OpenAIStandIn
from tests.running import ask, environment

SPIFFE = "spiffe://example.com/shop"
TOKEN = "a-token"


class Pair:
    """A certificate and its key."""

    def __init__(self, name: str, *sans: x509.GeneralName, signer: Pair | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name((signer or self).subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        )
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        self.pem = builder.sign((signer or self).key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.key_pem = self.key.private_bytes(*form)


AUTHORITY = Pair("authority")
URI, DNS = x509.UniformResourceIdentifier, x509.DNSName

CONFIG = f"""
[server]
tls_cert_file = "{{directory}}/server.crt"
tls_key_file = "{{directory}}/server.key"
tls_client_ca_file = "{{directory}}/authority.crt"

[namespaces.shop]
[namespaces.blog]

[[callers]]
name = "shop"
certificate = "{SPIFFE}"
namespaces = ["shop"]

[[callers]]
name = "blog"
certificate = "blog.internal"
namespaces = ["blog"]

[[callers]]
name = "ops"
token_file = "{{directory}}/token"
namespaces = ["*"]
"""


@pytest.fixture
async def service(tmp_path: Path, provider: OpenAIStandIn) -> AsyncIterator[Service]:
    server = Pair("server", x509.IPAddress(ipaddress.ip_address("127.0.0.1")), signer=AUTHORITY)
    for name, data in (("server.crt", server.pem), ("server.key", server.key_pem), ("authority.crt", AUTHORITY.pem)):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "token").write_text(TOKEN)
    file = tmp_path / "cacheserver.toml"
    file.write_text(CONFIG.format(directory=tmp_path))
    service = await start(load_settings(file, environment(tmp_path, provider=provider)))
    try:
        yield service
    finally:
        await service.stop()


async def called(
    service: Service, shown: Pair | None, *, namespace: str, metadata: Sequence[tuple[str, str]] = (), calls: int = 1
) -> pb.GetImageResponse | grpc.StatusCode:
    """The last answer to so many calls of whoever shows this certificate, or the code it fails with."""
    key, chain = (None, None) if shown is None else (shown.key_pem, shown.pem)
    credentials = grpc.ssl_channel_credentials(AUTHORITY.pem, key, chain)
    async with grpc.aio.secure_channel(service.grpc_address, credentials) as channel:
        stub: Any = pb_grpc.PromptCacheServiceStub(channel)  # type: ignore[no-untyped-call] # generated code
        try:
            answers = [await stub.GetImage(ask(namespace=namespace), metadata=metadata) for _ in range(calls)]
        except grpc.aio.AioRpcError as error:
            return error.code()
    answer: pb.GetImageResponse = answers[-1]
    return answer


SHOP = Pair("whoever", URI(SPIFFE), URI("https://blog.internal"), DNS("blog.internal"), signer=AUTHORITY)
BLOG_BY_DNS = Pair("whoever", DNS("other.internal"), DNS("blog.internal"), signer=AUTHORITY)
BLOG_BY_COMMON_NAME = Pair("blog.internal", signer=AUTHORITY)
STRANGER = Pair("blog.internal", DNS("stranger.internal"), signer=AUTHORITY)
FORGED = Pair("blog.internal", URI(SPIFFE), signer=Pair("authority"))


@pytest.mark.parametrize(("shown", "namespace"), [(SHOP, "shop"), (BLOG_BY_DNS, "blog"), (BLOG_BY_COMMON_NAME, "blog")])
async def test_a_certificate_has_the_rights_of_the_caller_it_names_and_no_others(
    service: Service, shown: Pair, namespace: str
) -> None:
    answer = await called(service, shown, namespace=namespace, calls=3)  # the last one known by its bytes
    assert isinstance(answer, pb.GetImageResponse)
    assert answer.status.tier == pb.TIER_MEMORY
    other = {"shop": "blog", "blog": "shop"}[namespace]
    assert await called(service, shown, namespace=other) is grpc.StatusCode.PERMISSION_DENIED


async def test_a_common_name_beside_other_names_is_nobodys(service: Service) -> None:
    assert await called(service, STRANGER, namespace="blog") is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("shown", [None, FORGED])
async def test_without_a_certificate_that_is_signed_there_is_no_connection(
    service: Service, shown: Pair | None
) -> None:
    assert await called(service, shown, namespace="shop") is grpc.StatusCode.UNAVAILABLE


async def test_a_token_goes_before_the_certificate(service: Service) -> None:
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    assert isinstance(await called(service, SHOP, namespace="blog", metadata=metadata), pb.GetImageResponse)
    metadata = (("authorization", "Bearer nobodys"),)
    assert await called(service, SHOP, namespace="shop", metadata=metadata) is grpc.StatusCode.UNAUTHENTICATED


async def test_nobody_can_say_whom_a_certificate_names(service: Service) -> None:
    metadata = (("certified-as", "blog.internal"),)
    assert await called(service, SHOP, namespace="blog", metadata=metadata) is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("server", "caller", "said"),
    [
        (
            "",
            'certificate = "shop"',
            r"callers\[0\].certificate: nobody is asked for one; set server.tls_client_ca_file",
        ),
        (
            '[server]\ntls_client_ca_file = "c.crt"',
            'certificate = "s"',
            "tls_client_ca_file is set and tls_cert_file is",
        ),
        ("", "", r"set one of token_sha256 and token_file, or certificate"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(tmp_path: Path, server: str, caller: str, said: str) -> None:
    file = tmp_path / "cacheserver.toml"
    file.write_text(f'{server}\n[[callers]]\nname = "shop"\n{caller}\n')
    with pytest.raises(ConfigError, match=said):
        load_settings(file, {"OPENAI_API_KEY": "sk-any"})


@pytest.mark.usefixtures("service")  # for its files
async def test_an_authority_that_is_none_is_a_start_up_error(tmp_path: Path, provider: OpenAIStandIn) -> None:
    (tmp_path / "authority.crt").write_text("no PEM at all")
    env = environment(tmp_path / "other", provider=provider)
    with pytest.raises(ConfigError, match=r"server\.tls_client_ca_file: .* holds no PEM certificates"):
        await start(load_settings(tmp_path / "cacheserver.toml", env))


class TestOurClients:
    """They show a certificate, too."""

    async def test_the_client_shows_its_certificate(self, service: Service) -> None:
        shown = (SHOP.pem, SHOP.key_pem)
        async with AsyncClient(service.grpc_address, root_certificates=AUTHORITY.pem, certificate=shown) as client:
            assert (await client.get_image(ImageSpec(prompt="a red fox"), namespace="shop")).images
            with pytest.raises(PermissionDeniedError):
                await client.get_image(ImageSpec(prompt="a red fox"), namespace="blog")

    async def test_the_command_shows_its_certificate(self, service: Service, tmp_path: Path) -> None:
        for name, data in (("shop.crt", SHOP.pem), ("shop.key", SHOP.key_pem)):
            (tmp_path / name).write_bytes(data)
        link = ["--address", service.grpc_address, "--ca-file", str(tmp_path / "authority.crt")]
        shown = ["--cert-file", str(tmp_path / "shop.crt"), "--key-file", str(tmp_path / "shop.key")]
        command = ["get", "a red fox", "--namespace", "shop", "--output", str(tmp_path / "fox.png"), *link]
        told = await asyncio.to_thread(typer.testing.CliRunner().invoke, app, [*command, *shown])
        assert told.exit_code == 0, told.output
        assert (tmp_path / "fox.png").stat().st_size > 0
        told = await asyncio.to_thread(typer.testing.CliRunner().invoke, app, [*command, *shown[:2]])
        assert "go together" in told.output
