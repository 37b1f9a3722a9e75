"""The HTTP server and what surrounds every call: bounds on connections, TLS, clients that go away, the end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from cacheserver.errors import ConfigError, UpstreamDownError
from cacheserver.http.answer import Answer
from cacheserver.http.application import Application
from cacheserver.http.server import Bounds, HttpServer
from cacheserver.model import Caller, Permission
from tests.house import House
from tests.http_front import ANYONE, connections, error_of, open_http_front, pictures_of
from tests.waiting import until

SOON = Bounds(head_s=0.05, stalled_s=0.05, idle_s=0.05, max_head_bytes=1_000)


async def answers(scope: object, receive: object, send: Callable[[object], object]) -> None:
    """An application that answers without reading anything."""
    await Answer(200, {}, b"ok", 2)(scope, receive, send)  # type: ignore[arg-type]  # as ASGI has it


async def echoes(scope: Any, receive: Callable[[], Any], send: Callable[[object], object]) -> None:
    """An application that answers with what it was asked."""
    told, is_whole = f"{scope['method']} {scope['path']} ".encode(), False
    while not is_whole:
        message = await receive()
        told += message.get("body", b"")
        is_whole = not message.get("more_body", False)
    await Answer(200, {}, told, len(told))(scope, receive, send)  # type: ignore[arg-type]  # as ASGI has it


async def begins(_: object, receive: Callable[[], Any], send: Callable[[object], Any]) -> None:
    """An application that begins to answer, and goes on only when its client has gone."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


async def tells_headers(scope: Any, receive: Callable[[], Any], send: Callable[[object], object]) -> None:
    """An application that answers with the names of the headers, once it has read the body."""
    while (await receive()).get("more_body", False):
        pass
    told = b" ".join(name for name, _ in scope["headers"])
    await Answer(200, {}, told, len(told))(scope, receive, send)  # type: ignore[arg-type]  # as ASGI has it


async def floods(scope: object, receive: object, send: Callable[[object], object]) -> None:
    """An application whose answer no buffer holds."""
    body = (bytes(1_000_000) for _ in range(64))
    await Answer(200, {}, body, 64_000_000)(scope, receive, send)  # type: ignore[arg-type]  # as ASGI has it


@asynccontextmanager
async def listening(application: object, bounds: Bounds = SOON) -> AsyncIterator[HttpServer]:
    server = HttpServer(application, host="127.0.0.1", port=0, bounds=bounds)  # type: ignore[arg-type]  # as above
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def exchange(port: int, sent: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nhost: a\r\nx-slow: ",
        b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\n",
    ],
    ids=["nothing", "half a head", "blank lines", "no body", "half a second head"],
)
async def test_a_client_that_says_little_is_not_waited_for(sent: bytes) -> None:
    async with listening(answers) as server:
        await exchange(server.port, sent)  # it comes to an end


async def test_a_client_that_reads_nothing_is_not_waited_for() -> None:
    async with listening(floods, Bounds(stalled_s=0.5)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            await until(lambda: any(each.flow.write_paused for each in connections(server)))
            await until(lambda: not connections(server))


async def test_too_long_a_head_is_refused() -> None:
    async with listening(answers, Bounds(max_head_bytes=1_000)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nx-long: ")
        await until(lambda: any(each.headers for each in connections(server)))
        writer.write(b"y" * 1_001)
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


async def test_what_is_no_http_is_answered_in_the_shape_of_every_error() -> None:
    async with listening(answers) as server:
        answer = await exchange(server.port, b"HELLO\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: " in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"].keys() == {"message", "type", "param", "code"}


async def test_a_connection_too_many_is_turned_away_in_the_shape_of_every_error() -> None:
    async with listening(answers, Bounds(max_connections=1)) as server:
        request = b"GET / HTTP/1.1\r\nhost: a\r\nx-request-id: call-7\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await until(lambda: len(connections(server)) == 1)
        refused = await exchange(server.port, request)
        writer.write(request)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")  # whoever was there before is served on
        writer.close()
    head, _, body = refused.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert {b"retry-after: 1", b"x-request-id: call-7", b"connection: close"} <= {*head.split(b"\r\n")}
    assert json.loads(body)["error"]["code"] == "server_is_overloaded"


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\nUpgrade: h2c\r\n"
JDK = b"POST /a HTTP/1.1\r\nhost: a\r\n" + OFFER
LAST = b"GET /b HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "body",
    [b"content-length: 3\r\n\r\nabc", b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    ids=["with a length", "chunked"],
)
async def test_offers_of_another_protocol_are_passed_over(body: bytes) -> None:
    """As clients of the JDK make them with every request to a plain address."""
    async with listening(echoes, Bounds()) as server:
        answers = [await exchange(server.port, (JDK + body) * count + LAST) for count in (1, 100)]
        torn = await exchange(server.port, JDK.replace(b"Upgrade,", b"close, upgrade ,") + body)
        websocket = LAST.replace(b"connection: close", b"connection: close, upgrade\r\nupgrade: websocket")
        asked = await exchange(server.port, websocket)
    assert [answer.count(b"POST /a abc") for answer in answers] == [1, 100]
    assert all(answer.endswith(b"GET /b ") for answer in (*answers, asked))
    assert torn.endswith(b"POST /a abc")
    assert b"connection: close" in torn


@pytest.mark.timeout(5, method="thread")  # to read it again and again would fill the memory
@pytest.mark.parametrize("target", [b"a:80", b"/a", b"*", b"http://a/b"])
async def test_a_tunnel_is_refused(target: bytes) -> None:
    async with listening(echoes, Bounds()) as server:
        answer = await exchange(server.port, b"CONNECT %s HTTP/1.1\r\nhost: a\r\n\r\n" % target)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


CHUNKED = b"POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.mark.parametrize(
    "bad",
    [b"HELLO\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\na", b"GET / HTTP/1.1\n\n"],
    ids=["no HTTP", "two lengths", "bare line feeds"],
)
async def test_what_is_malformed_is_not_answered_in_the_place_of_what_came_before(bad: bytes) -> None:
    async with listening(echoes, Bounds()) as server:
        answer = await exchange(server.port, CHUNKED + b"0\r\n\r\n" + LAST.replace(b"connection: close\r\n", b"") + bad)
    first, second = answer.split(b"HTTP/1.1 ")[1:]
    assert first.endswith(b"\r\n\r\nPOST /a abc")
    assert second.endswith(b"\r\n\r\nGET /b ")
    assert b"connection: close" in second


async def test_what_is_malformed_is_not_told_in_the_middle_of_an_answer() -> None:
    async with listening(begins, Bounds()) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(CHUNKED)
        assert await reader.readuntil(b"begun")
        writer.write(b"no chunk")
        async with asyncio.timeout(10):
            assert b"HTTP/1.1" not in await reader.read()
        writer.close()


async def test_what_follows_a_body_says_nothing_of_its_request() -> None:
    async with listening(tells_headers, Bounds()) as server:
        answer = await exchange(server.port, CHUNKED + b"0\r\nauthorization: Bearer sk-x\r\n\r\n" + LAST)
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b"authorization" not in answer


async def test_too_much_behind_a_body_is_refused() -> None:
    async with listening(echoes, Bounds(max_head_bytes=1_000)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(CHUNKED + b"0\r\nx-long: ")
        await until(lambda: any(each.cycle and each.cycle.body == b"" for each in connections(server)))
        writer.write(b"y" * 1_001)
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
        writer.close()


async def test_a_call_behind_another_on_its_connection_has_a_context_of_its_own() -> None:
    """Its log lines would bear the other's trace id."""
    seen = []

    async def binds(scope: Any, receive: object, send: Callable[[object], object]) -> None:
        seen.append(structlog.contextvars.get_contextvars())
        structlog.contextvars.bind_contextvars(path=scope["path"])
        await Answer(200, {}, b"ok", 2)(scope, receive, send)  # type: ignore[arg-type]  # as ASGI has it

    async with listening(binds, Bounds()) as server:
        await exchange(server.port, b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n" + LAST)
    assert seen == [{}, {}]


@pytest.mark.parametrize("has_begun", [False, True], ids=["nothing sent", "in the middle of its answer"])
async def test_a_server_that_stops_ends_what_takes_too_long_and_says_so_where_it_can(*, has_begun: bool) -> None:
    async def dawdles(_: object, receive: Callable[[], Any], send: Callable[[object], Any]) -> None:
        if has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        async with asyncio.timeout(10):
            while (await receive())["type"] != "http.disconnect":
                pass

    async with listening(dawdles, Bounds(grace_s=0.01)) as server:
        asking = asyncio.create_task(exchange(server.port, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"))
        await until(
            lambda: any(each.cycle and each.cycle.response_started == has_begun for each in connections(server))
        )
    head, _, body = (await asking).partition(b"\r\n\r\n")
    if has_begun:
        assert not body
        return
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in head
    assert json.loads(body)["error"]["code"] == "shutting_down"


def certificate(directory: Path) -> tuple[Path, Path]:
    cert, key = directory / "cert.pem", directory / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    argv += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(argv, check=True, capture_output=True)  # noqa: S603 - no input of others
    return cert, key


async def test_tls_is_spoken_where_there_is_a_certificate(tmp_path: Path) -> None:
    cert, key = await asyncio.to_thread(certificate, tmp_path)
    server = HttpServer(Application(), host="127.0.0.1", port=0, tls_cert_file=cert, tls_key_file=key)
    await server.start()
    try:
        context = ssl.create_default_context(cafile=str(cert))
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            response = await client.get(f"https://127.0.0.1:{server.port}/v1/nothing")
        assert (response.status_code, error_of(response)["code"]) == (404, "unknown_url")
    finally:
        await server.stop()


async def test_a_certificate_that_cannot_be_used_keeps_the_service_from_starting(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    server = HttpServer(Application(), host="127.0.0.1", port=0, tls_cert_file=bad, tls_key_file=bad)
    with pytest.raises(ConfigError, match="no PEM certificate chain"):
        await server.start()
    with pytest.raises(ConfigError, match="set both or none"):
        await HttpServer(Application(), host="127.0.0.1", port=0, tls_cert_file=bad).start()


async def test_paths_and_methods_that_are_not_there_are_answered_in_shape(house: House) -> None:
    async with open_http_front(house) as front:
        missing = await front.client.get("/v1/nothing")
        other = await front.client.get("/v1/images/generations")
        retired = await front.client.post("/v1/images/variations")
        slash = await front.client.post("/v1/images/generations/")
    told = [(each.status_code, error_of(each)["code"]) for each in (missing, other, retired, slash)]
    assert told == [
        (404, "unknown_url"),
        (405, "method_not_supported"),
        (410, "endpoint_retired"),
        (404, "unknown_url"),
    ]
    assert other.headers["allow"] == "POST"


async def test_models_are_those_that_are_served(house: House) -> None:
    async with open_http_front(house) as front:
        listed = (await front.client.get("/v1/models")).json()
        one = (await front.client.get("/v1/models/org/other")).json()
        missing = await front.client.get("/v1/models/gpt-99")
    assert [each["id"] for each in listed["data"]] == ["gpt-image-2", "org/other"]
    assert one == listed["data"][1]
    assert one.keys() == {"id", "object", "created", "owned_by"}
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


async def test_models_are_told_to_callers_only(house: House) -> None:
    caller = Caller("shop", frozenset({Permission.READ}))
    async with open_http_front(house, callers=[(hashlib.sha256(b"sk-x").digest(), caller)], anonymous=None) as front:
        assert (await front.client.get("/v1/models")).status_code == 401
        assert (await front.client.get("/v1/models", headers={"authorization": "Bearer sk-x"})).is_success


async def test_a_client_that_times_out_and_asks_again_joins_the_running_job(house: House) -> None:
    async with open_http_front(house) as front:
        house.upstream.hold()
        asking = asyncio.create_task(front.generate())
        await house.upstream.arrived(1)
        asking.cancel()
        await until(lambda: front.reception._in_progress == 0)
        again = asyncio.create_task(front.generate())
        await until(lambda: front.reception._in_progress == 1)
        house.upstream.release()
        assert pictures_of(await again)
        assert house.upstream.calls == 1


async def test_a_call_whose_client_has_gone_is_concluded_and_not_answered(house: House) -> None:
    async with open_http_front(house) as front:
        house.upstream.hold()
        asking = asyncio.create_task(front.generate(headers={"x-request-id": "call-7"}))
        await house.upstream.arrived(1)
        asking.cancel()
        await until(lambda: front.reception._in_progress == 0)
        assert front.recall.explain("call-7", ANYONE).reason == "CLIENT_GONE"


async def test_an_error_whose_causes_lead_in_a_circle_is_answered_as_any_other(house: House) -> None:
    error, cause = UpstreamDownError("It is away."), ValueError()
    error.__cause__, cause.__cause__ = cause, error
    async with open_http_front(house) as front:
        house.upstream.fail_next(error)
        assert (await front.generate()).status_code == 503


async def test_a_service_that_ends_answers_what_has_begun_and_nothing_more(house: House) -> None:
    async with open_http_front(house) as front:
        house.upstream.hold()
        asking = asyncio.create_task(front.generate())
        await house.upstream.arrived(1)
        ending = asyncio.create_task(front.reception.idle())
        await until(front.reception.going_down.is_set)
        refused = await front.generate("a blue fox")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
        assert refused.headers["connection"] == "close"
        house.upstream.release()
        assert pictures_of(await asking)
        await ending


async def test_too_many_calls_at_a_time_are_turned_away(house: House) -> None:
    async with open_http_front(house, max_concurrent_calls=1) as front:
        house.upstream.hold()
        asking = asyncio.create_task(front.generate())
        await house.upstream.arrived(1)
        refused = await front.generate("a blue fox")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "server_is_overloaded")
        assert refused.headers["retry-after"] == "1"
        house.upstream.release()
        assert pictures_of(await asking)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "host_not_allowed"),
        ({"origin": "https://evil.example"}, "origin_not_allowed"),
        ({"origin": "null"}, "origin_not_allowed"),
    ],
)
async def test_a_web_page_cannot_spend_money_where_there_are_no_callers(
    house: House, headers: dict[str, str], code: str
) -> None:
    async with open_http_front(house, hosts=["images.example"]) as front:
        refused = await front.generate(headers=headers)
        assert (refused.status_code, error_of(refused)["code"]) == (403, code)
        assert house.upstream.calls == 0
        assert pictures_of(await front.generate(headers={"host": "images.example", "origin": "http://localhost:3000"}))


async def test_the_same_body_is_answered_to_each_caller_by_its_own_rights(house: House) -> None:
    """What is remembered of one caller's request is nothing to another."""
    reader = Caller("reader", frozenset({Permission.READ}), frozenset({"elsewhere"}))
    shop = Caller("shop", frozenset(Permission))
    callers = [(hashlib.sha256(token).digest(), caller) for token, caller in ((b"sk-r", reader), (b"sk-s", shop))]
    async with open_http_front(house, callers=callers, anonymous=None) as front:
        for _ in range(3):
            assert pictures_of(await front.generate(headers={"authorization": "Bearer sk-s"}))
        named = {"authorization": "Bearer sk-r", "x-cacheserver-namespace": "default"}
        assert (await front.generate(headers=named)).status_code == 403
        assert (await front.generate(headers={"authorization": "Bearer sk-wrong"})).status_code == 401


async def test_a_picture_that_was_replaced_is_not_answered_from_what_was_told_before(house: House) -> None:
    async with open_http_front(house) as front:
        first = [pictures_of(await front.generate()) for _ in range(3)]
        assert first[0] == first[1] == first[2]
        await house.cache.purge(house.namespace, dry_run=False)
        second = [pictures_of(await front.generate()) for _ in range(3)]
        assert second[0] == second[1] == second[2] != first[0]
