"""The server around the service: TLS, unix sockets, health, reflection, starting and stopping."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from cacheserver.errors import ConfigError
from cacheserver.model import Caller, TierName
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from cacheserver.rpc.server import Listen
from tests.house import House
from tests.rpc_front import Front, ask, failure, open_front

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def front(house: House) -> AsyncIterator[Front]:
    async with open_front(house) as front:
        yield front


def certificate(
    directory: Path, encryption: serialization.KeySerializationEncryption | None = None
) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cacheserver test")])
    now = datetime.now(UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption or serialization.NoEncryption()
        )
    )
    return cert_file, key_file


def health(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


class TestListening:
    async def test_tls_by_certificate_and_key_file(self, house: House, tmp_path: Path) -> None:
        cert_file, key_file = certificate(tmp_path)
        listen = Listen(port=0, tls_cert_file=cert_file, tls_key_file=key_file)
        async with open_front(house, listen=listen) as front:
            credentials = grpc.ssl_channel_credentials(cert_file.read_bytes())
            async with grpc.aio.secure_channel(f"127.0.0.1:{front.server.port}", credentials) as channel:
                response = await cast("Any", pb_grpc.PromptCacheServiceStub(channel)).GetImage(ask())
            assert len(response.images) == 1
            assert (await failure(front.stub.GetImage(ask()))).code == "UNAVAILABLE"  # without TLS

    @pytest.mark.parametrize("text", ["", "no PEM at all", None])
    async def test_a_certificate_that_cannot_be_used_is_a_start_up_error(
        self, house: House, tmp_path: Path, text: str | None
    ) -> None:
        _, key_file = certificate(tmp_path)
        cert_file = tmp_path / "other.pem"
        if text is not None:
            cert_file.write_text(text)
        listen = Listen(port=0, tls_cert_file=cert_file, tls_key_file=key_file)
        with pytest.raises(ConfigError, match=r"server\.tls_cert_file") as refused:
            async with open_front(house, listen=listen):
                pass
        assert "\n" not in str(refused.value)

    async def test_an_encrypted_key_is_a_start_up_error_and_asks_nobody_for_a_password(
        self, house: House, tmp_path: Path
    ) -> None:
        cert_file, key_file = certificate(tmp_path, serialization.BestAvailableEncryption(b"secret"))
        with pytest.raises(ConfigError, match=r"server\.tls_key_file"):
            async with open_front(house, listen=Listen(port=0, tls_cert_file=cert_file, tls_key_file=key_file)):
                pass

    async def test_a_certificate_without_its_key_is_a_start_up_error(self, house: House, tmp_path: Path) -> None:
        cert_file, _ = certificate(tmp_path)
        with pytest.raises(ConfigError, match="both or none"):
            async with open_front(house, listen=Listen(port=0, tls_cert_file=cert_file)):
                pass

    async def test_a_unix_socket_alone(self, house: House, tmp_path: Path) -> None:
        path = tmp_path / "grpc.sock"
        async with (
            open_front(house, listen=Listen(port=None, unix_socket=path)) as front,
            grpc.aio.insecure_channel(f"unix:{path}") as channel,
        ):
            assert front.server.port == 0
            assert len((await cast("Any", pb_grpc.PromptCacheServiceStub(channel)).GetImage(ask())).images) == 1

    async def test_a_unix_socket_is_open_to_this_user_alone(self, house: House, tmp_path: Path) -> None:
        path = tmp_path / "grpc.sock"
        before = os.umask(0o000)
        try:
            async with open_front(house, listen=Listen(port=0, unix_socket=path)):
                assert stat.S_IMODE(path.stat().st_mode) == 0o700
                assert os.umask(0o000) == 0o000
        finally:
            os.umask(before)
        assert not path.exists()

    async def test_a_unix_socket_that_a_dead_process_left_is_replaced(self, house: House, tmp_path: Path) -> None:
        path = tmp_path / "grpc.sock"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        async with (
            open_front(house, listen=Listen(port=0, unix_socket=path)),
            grpc.aio.insecure_channel(f"unix:{path}") as channel,
        ):
            assert len((await cast("Any", pb_grpc.PromptCacheServiceStub(channel)).GetImage(ask())).images) == 1

    async def test_a_unix_socket_that_is_listened_on_is_left_to_its_owner(self, house: House, tmp_path: Path) -> None:
        path = tmp_path / "grpc.sock"
        with socket.socket(socket.AF_UNIX) as living:
            living.bind(str(path))
            living.listen(0)
            for _ in range(2):  # the first look leaves its queue full
                with pytest.raises(ConfigError, match=r"server\.grpc_unix_socket: another process listens on"):
                    async with open_front(house, listen=Listen(port=0, unix_socket=path)):
                        pass
            assert path.exists()

    @pytest.mark.parametrize("name", ["gone/grpc.sock", "a-file", "x" * 108])
    async def test_a_path_that_cannot_be_a_unix_socket_is_a_start_up_error(
        self, house: House, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "a-file").write_text("precious")
        with pytest.raises(ConfigError, match=r"server\.grpc_unix_socket: cannot listen on .* at most 107") as refused:
            async with open_front(house, listen=Listen(port=0, unix_socket=tmp_path / name)):
                pass
        assert "\n" not in str(refused.value)
        assert (tmp_path / "a-file").read_text() == "precious"

    async def test_ipv6_loopback(self, house: House) -> None:
        async with (
            open_front(house, listen=Listen(host="::1", port=0)) as front,
            grpc.aio.insecure_channel(f"[::1]:{front.server.port}") as channel,
        ):
            assert len((await cast("Any", pb_grpc.PromptCacheServiceStub(channel)).GetImage(ask())).images) == 1

    async def test_a_port_in_use_names_the_setting_in_one_line(self, house: House, front: Front) -> None:
        in_use = r"server\.grpc_port: cannot listen on 127\.0\.0\.1:\d+: Address already in use; end what has it"
        with pytest.raises(ConfigError, match=in_use) as refused:
            async with open_front(house, listen=Listen(port=front.server.port)):
                pass
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
    async def test_a_host_that_is_not_ours_names_the_setting(self, house: House, host: str) -> None:
        with pytest.raises(
            ConfigError, match=r"server\.grpc_host: cannot listen on .*; name an address of this machine"
        ):
            async with open_front(house, listen=Listen(host=host, port=0)):
                pass


class TestHealth:
    @pytest.mark.parametrize("name", ["", "promptcache.v1.PromptCacheService", "tier.redis", "tier.s3"])
    async def test_the_service_and_every_tier_have_a_name(self, front: Front, name: str) -> None:
        response = await health(front.channel).Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == SERVING

    async def test_a_tier_that_is_down_is_told_under_its_own_name_only(self, front: Front) -> None:
        await front.server.set_tier_health(TierName.S3, is_well=False)
        statuses = {
            name: (await health(front.channel).Check(health_pb2.HealthCheckRequest(service=name))).status
            for name in ("", "tier.s3", "tier.redis")
        }
        assert statuses == {"": SERVING, "tier.s3": NOT_SERVING, "tier.redis": SERVING}

    async def test_an_unknown_name_is_not_found(self, front: Front) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health(front.channel).Check(health_pb2.HealthCheckRequest(service="tier.tape"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND

    async def test_no_token_is_needed(self, house: House) -> None:
        async with open_front(house, callers=[(bytes(32), Caller("x", frozenset()))], anonymous=None) as front:
            assert (await failure(front.stub.GetImage(ask()))).code == "UNAUTHENTICATED"
            assert (await health(front.channel).Check(health_pb2.HealthCheckRequest())).status == SERVING
            assert len(await reflect(front, "v1", list_services="")) > 0


async def reflect(front: Front, version: str, **question: str) -> Any:
    """The answer of a reflection client of this version; grpcurl asks v1 first."""
    method = front.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method(iter([reflection_pb2.ServerReflectionRequest(**question)]))
    answer = cast("reflection_pb2.ServerReflectionResponse", await call.read())
    if "list_services" in question:
        return [service.name for service in answer.list_services_response.service]
    return [FileDescriptorProto.FromString(f) for f in answer.file_descriptor_response.file_descriptor_proto]


class TestReflection:
    @pytest.mark.parametrize("version", ["v1", "v1alpha"])
    async def test_a_client_lists_the_services(self, front: Front, version: str) -> None:
        assert await reflect(front, version, list_services="") == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            "promptcache.v1.PromptCacheService",
        ]

    async def test_a_client_learns_every_method_and_message(self, front: Front) -> None:
        files = await reflect(front, "v1", file_containing_symbol="promptcache.v1.PromptCacheService")
        [ours] = [file for file in files if file.package == "promptcache.v1"]
        assert [method.name for method in ours.service[0].method] == [
            method.name for method in pb.DESCRIPTOR.services_by_name["PromptCacheService"].methods
        ]
        assert "google/protobuf/struct.proto" in {file.name for file in files}

    async def test_every_method_of_the_api_is_served(self, front: Front) -> None:
        for method in pb.DESCRIPTOR.services_by_name["PromptCacheService"].methods:
            refused = await failure(front.raw(method.name, b"\xff"))
            assert refused.reason in {"MALFORMED_MESSAGE", "NOT_IMPLEMENTED"}


class TestConnectionAge:
    async def test_an_aged_connection_takes_no_new_calls_and_those_that_run_are_answered(self, house: House) -> None:
        async with open_front(house, max_connection_age_s=0.2) as front:
            house.upstream.hold()
            running = asyncio.ensure_future(front.stub.GetImage(ask()))
            await house.upstream.arrived(1)
            assert front.channel.get_state() is grpc.ChannelConnectivity.READY
            await front.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)  # told to connect anew
            await front.stub.GetStats(pb.GetStatsRequest())
            house.upstream.release()
            assert len((await running).images) == 1


class TestDrain:
    async def test_what_runs_is_answered_and_nothing_new_is_taken(self, front: Front) -> None:
        front.house.upstream.hold()
        running = asyncio.ensure_future(front.stub.GetImage(ask()))
        await front.house.upstream.arrived(1)
        watch = health(front.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        draining = asyncio.ensure_future(front.server.drain(30))
        assert (await watch.read()).status == NOT_SERVING
        refused = await failure_of_new_call(front)
        assert refused in {"UNAVAILABLE", "CANCELLED"}
        assert not draining.done()
        front.house.upstream.release()
        assert len((await running).images) == 1
        # The open watch does not hold us up for the 30 s.
        await asyncio.wait_for(draining, timeout=10)

    async def test_what_does_not_end_in_time_is_ended(self, front: Front) -> None:
        front.house.upstream.hold()
        running = asyncio.ensure_future(front.stub.GetImage(ask()))
        await front.house.upstream.arrived(1)
        await front.server.drain(0.01)
        with pytest.raises(grpc.aio.AioRpcError):
            await running

    async def test_draining_twice_is_draining_once(self, front: Front) -> None:
        await front.server.drain(1)
        await front.server.drain(1)


async def failure_of_new_call(front: Front) -> str:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.server.port}", options=options) as channel:
        stub = cast("Any", pb_grpc.PromptCacheServiceStub(channel))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetStats(pb.GetStatsRequest())
    return raised.value.code().name
