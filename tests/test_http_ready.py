"""Answers that lie ready: who gets them, and that nobody can tell them from those of the application."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from uvicorn.config import Config
from uvicorn.server import ServerState

from cacheserver.calls.downloads import DownloadMemory
from cacheserver.http.answer import Answer
from cacheserver.http.connection import Bounds, Connection, protocol
from cacheserver.http.delivery.asked import UrlAsked
from cacheserver.http.delivery.fetched import _MOST_KNOWN as _MOST_KNOWN_FETCHED
from cacheserver.http.delivery.fetched import _MOST_NAME_BYTES, Fetched, FetchedPictures
from cacheserver.http.delivery.urls import version_of
from cacheserver.http.openai.generations import Generations
from cacheserver.http.ready import (
    _MOST_BYTES,
    _MOST_KNOWN,
    KnownQuestions,
    Question,
    Questions,
    ReadyAnswer,
    ReadyRequest,
    head_lines,
)
from cacheserver.http.server import HttpServer
from cacheserver.http.transport import HeadWithBody
from cacheserver.model import Caller, Outcome, Permission, TierName
from tests.delivery_front import EXPIRES_S, PRIVATE, PUBLIC, DeliveryFront, open_delivery, path_of, signed_path
from tests.house import House
from tests.http_front import ANYONE, connections, open_http_front, pictures_of
from tests.provider import small_image
from tests.waiting import until

PATH = b"/pictures"


class Shop:
    """An application that answers `made:` and the body of the request, and `ready:` and that where it is ready."""

    def __init__(self, *ready: bytes, copies: int = 1) -> None:
        """`ready` are the bodies whose answers are; `copies` of each make an answer."""
        self.ready = {*ready}
        self.copies = copies
        self.asked = 0

    async def __call__(self, scope: object, receive: Callable[[], Any], send: Callable[[object], Any]) -> None:
        body, is_whole = b"", False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
        told = b"made:" + body
        await Answer(200, {}, told, len(told))(scope, receive, send)  # type: ignore[arg-type]  # as ASGI has it

    def find(self, method: bytes, target: bytes) -> Questions | None:
        return self.question if (method, target) == (b"POST", PATH) else None

    def question(self, headers: Sequence[tuple[bytes, bytes]], request: ReadyRequest) -> Question:
        assert (b"host", b"a") in headers
        body = request.body

        def answer() -> ReadyAnswer | None:
            self.asked += 1
            return ReadyAnswer(b"x-ready: yes\r\n", b"ready:" + body * self.copies) if body in self.ready else None

        return answer


def post(body: bytes, *lines: str, path: bytes = PATH) -> bytes:
    head = ["host: a", f"content-length: {len(body)}", *lines]
    return b"POST %s HTTP/1.1\r\n%s\r\n\r\n%s" % (path, "\r\n".join(head).encode(), body)


@asynccontextmanager
async def open_shop(shop: Shop, bounds: Bounds | None = None) -> AsyncIterator[HttpServer]:
    server = HttpServer(shop, host="127.0.0.1", port=0, bounds=bounds, find_questions=shop.find)  # type: ignore[arg-type]  # as ASGI has it
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def writelines(self, list_of_data: Any) -> None:
        self.sent += b"".join(list_of_data)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ARG002 - asyncio's signature
        return default


def connect(shop: Shop) -> tuple[Connection, Wire]:
    """A connection to the shop; call it in the event loop."""
    kind = protocol(Bounds(), shop.find, DownloadMemory(1_000_000))
    config = Config(shop, http=kind, lifespan="off", ws="none", log_config=None)  # type: ignore[arg-type]  # as ASGI has it
    connection, wire = kind(config, ServerState(), {}), Wire()
    connection.connection_made(wire)
    return connection, wire


def bodies_in(sent: bytes) -> list[bytes]:
    """The bodies of the whole answers."""
    bodies = []
    while b"\r\n\r\n" in sent:
        head, _, rest = sent.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        length = int(next(line for line in head.split(b"\r\n") if line.startswith(b"content-length: "))[16:])
        if len(rest) < length:
            break
        bodies.append(rest[:length])
        sent = rest[length:]
    return bodies


async def answers_to(shop: Shop, pieces: Sequence[bytes], count: int) -> list[bytes]:
    """What comes back to so many requests that come in these pieces."""
    connection, wire = connect(shop)
    for piece in pieces:
        connection.data_received(piece)
    await until(lambda: len(bodies_in(wire.sent)) == count)
    connection.connection_lost(None)
    return bodies_in(wire.sent)


CHUNKED = b"POST /pictures HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [post(b"a")],
        [post(b"a")[:-1], b"a"],
        [post(b"a")[:9], post(b"a")[9:30], post(b"a")[30:]],
        [b"\r\n", post(b"a")],
        [CHUNKED],
    ],
    ids=["whole", "head and body", "torn", "after a blank line", "chunked"],
)
async def test_a_request_whose_answer_is_ready_gets_it_however_it_comes(pieces: list[bytes]) -> None:
    shop = Shop(b"a")
    assert await answers_to(shop, pieces * 3, 3) == [b"ready:a"] * 3
    assert shop.asked == 3


LONG = b"x" * 5_000


@pytest.mark.parametrize(
    ("request_", "body"),
    [
        (post(b"b"), b"b"),
        (post(LONG), LONG),
        (post(b"a", path=b"/others"), b"a"),
        (post(b"a", path=PATH + b"?x=1"), b"a"),
        (post(b"a").replace(b"POST", b"PUT"), b"a"),
    ],
    ids=["not ready", "long", "another path", "a query", "another method"],
)
async def test_whatever_else_is_asked_the_application_answers(request_: bytes, body: bytes) -> None:
    shop = Shop(b"a", LONG)
    assert await answers_to(shop, [request_], 1) == [b"made:" + body]
    assert await answers_to(shop, [request_[:-1], request_[-1:]], 1) == [b"made:" + body]


@pytest.mark.parametrize(
    "request_",
    [
        post(b"a", "connection: close"),
        post(b"a", "expect: 100-continue", "connection: close"),
        post(b"a").replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["close", "expect", "1.0"],
)
async def test_who_wants_more_than_the_answer_gets_the_application_s(request_: bytes) -> None:
    async with open_shop(Shop(b"a")) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request_)
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
    assert answer.endswith(b"\r\n\r\nmade:a")
    assert b"connection: close" in answer


@given(st.lists(st.sampled_from([b"", b"a", b"b", b"c" * 50]), min_size=1, max_size=8), st.data())
def test_however_requests_are_cut_each_is_answered_once_and_in_its_turn(
    bodies: list[bytes], data: st.DataObject
) -> None:
    sent = b"".join(map(post, bodies))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sent) - 1), max_size=12)))
    pieces = [sent[start:end] for start, end in itertools.pairwise([0, *cuts, len(sent)])]
    answers = asyncio.run(answers_to(Shop(b"a", b""), pieces, len(bodies)))
    assert [answer.partition(b":")[2] for answer in answers] == bodies


async def test_an_answer_is_ready_only_as_long_as_it_is() -> None:
    shop = Shop(b"a")
    connection, wire = connect(shop)
    for _ in range(3):
        connection.data_received(post(b"a"))
    shop.ready.clear()
    connection.data_received(post(b"a"))
    await until(lambda: len(bodies_in(wire.sent)) == 4)
    assert bodies_in(wire.sent) == [b"ready:a"] * 3 + [b"made:a"]


async def test_a_connection_whose_first_request_is_known_is_not_ended_for_having_said_nothing() -> None:
    shop = Shop(b"a")
    one, _ = connect(shop)
    one.data_received(post(b"a"))
    assert one.known_questions.find(post(b"a")) is not None
    one.connection_lost(None)
    other = type(one)(one.config, one.server_state, {})
    wire = Wire()
    other.connection_made(wire)
    assert other._waiting is not None
    other.data_received(post(b"a"))
    assert bodies_in(wire.sent) == [b"ready:a"]
    assert other._waiting is None
    assert other.timeout_keep_alive_task is not None
    other.connection_lost(None)


async def test_an_idle_connection_is_closed_some_time_after_its_last_answer() -> None:
    async with open_shop(Shop(b"a"), Bounds(idle_s=1.0)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        async with asyncio.timeout(10):
            for _ in range(3):
                writer.write(post(b"a"))
                await reader.readuntil(b"ready:a")
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_is_not_idle_while_it_is_asked_for_more() -> None:
    shop = Shop(b"a")
    connection, wire = connect(shop)
    connection.data_received(post(b"a") + post(b"b"))
    assert bodies_in(wire.sent) == [b"ready:a"]
    assert connection.timeout_keep_alive_task is None
    await until(lambda: bodies_in(wire.sent) == [b"ready:a", b"made:b"])
    assert connection.timeout_keep_alive_task is not None
    connection.connection_lost(None)


async def test_nothing_waits_for_a_connection_that_was_reset() -> None:
    connection, _ = connect(Shop(b"a"))
    connection.data_received(post(b"a"))
    connection.connection_lost(ConnectionResetError())
    assert connection.timeout_keep_alive_task is None
    assert connection._waiting is None


async def test_what_follows_a_body_says_nothing_of_its_request() -> None:
    asked = []

    class Noting(Shop):
        def question(self, headers: Sequence[tuple[bytes, bytes]], request: ReadyRequest) -> Question:
            asked.append([*headers])
            return super().question(headers, request)

    sent = CHUNKED.replace(b"0\r\n", b"0\r\nauthorization: Bearer sk-x\r\n")
    assert await answers_to(Noting(b"a"), [sent], 1) == [b"ready:a"]
    assert asked == [[(b"host", b"a"), (b"transfer-encoding", b"chunked")]]


async def test_a_body_in_many_pieces_costs_no_more_where_its_answer_may_be_ready() -> None:
    def cost_s(path: bytes) -> float:
        connection, _ = connect(Shop())
        pieces = b"1\r\nx\r\n" * 4_000
        request = CHUNKED.replace(PATH, path).replace(b"1\r\na\r\n", pieces)
        before_s = time.process_time()
        connection.data_received(request)
        spent_s = time.process_time() - before_s
        connection.connection_lost(None)
        return spent_s

    assert min(cost_s(PATH) for _ in range(3)) < 10 * min(cost_s(b"/others") for _ in range(3))


async def test_a_request_that_has_begun_to_come_when_the_server_stops_is_answered() -> None:
    async with open_shop(Shop(b"a")) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(b"aa")[:-1])
        await until(lambda: any(each._held for each in connections(server)))
        stopping = asyncio.create_task(server.stop())
        await until(lambda: any(each.cycle for each in connections(server)))
        writer.write(b"a")
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        await stopping
    assert answer.endswith(b"\r\n\r\nmade:aa")
    assert b"connection: close" in answer


async def test_a_body_that_does_not_end_is_not_waited_for() -> None:
    async with open_shop(Shop(b"a"), Bounds(head_s=0.05)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(b"aaa")[:-1])
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


async def test_a_client_that_reads_nothing_is_answered_no_more_than_a_little() -> None:
    shop = Shop(b"a", copies=1_000_000)
    async with open_shop(shop) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(post(b"a") * 64)
            await until(lambda: any(each.flow.write_paused for each in connections(server)))
            [connection] = connections(server)
            assert connection.transport.get_write_buffer_size() < 3_000_000
            assert shop.asked < 64


async def test_to_a_client_that_has_gone_nothing_is_written() -> None:
    class Going(Wire):
        has_gone = False

        def is_closing(self) -> bool:
            return self.has_gone

    wire = Going()
    transport = HeadWithBody(wire, asyncio.get_running_loop())
    transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
    wire.has_gone = True
    transport.write(b"body")
    transport.close()
    assert wire.sent == b""


def test_known_questions_are_bounded() -> None:
    known = KnownQuestions()
    for number in range(_MOST_KNOWN + 1):
        known.keep(b"%d" % number, lambda: None)
    known.keep(b"x" * (_MOST_BYTES + 1), lambda: None)
    assert known.find(b"0") is None
    assert known.find(b"1") is not None
    assert known.find(b"%d" % _MOST_KNOWN) is not None
    assert known.find(b"x" * (_MOST_BYTES + 1)) is None


@pytest.mark.parametrize("line", ["traceparent: 00-1-2-00", "X-Request-Id: call-7"])
def test_what_does_not_come_again_takes_nobody_s_place(line: str) -> None:
    known = KnownQuestions()
    known.keep(post(b"a", line), lambda: None)
    assert known.find(post(b"a", line)) is None


# ---- of the OpenAI front

PASSING = {"date", "age", "x-request-id", "openai-processing-ms"}


async def test_a_ready_answer_is_booked_and_told_as_any_other(house: House) -> None:
    async with open_http_front(house) as front:
        answers = [await front.generate(headers={"x-request-id": f"call-{number}"}) for number in range(3)]
        house.clock.advance(5)
        answers += [await front.generate(headers={"x-request-id": f"call-{number}"}) for number in range(3, 6)]
        assert any(each._answered is not None for each in connections(front.server))
        ordinary, ready = answers[1], answers[-1]
        assert ready.content == ordinary.content
        assert len(ready.headers.raw) == len({*ready.headers})  # none comes twice
        assert {*ready.headers} == {*ordinary.headers}
        differ = {name for name in ready.headers if ready.headers[name] != ordinary.headers[name]}
        assert differ <= PASSING | {"cache-status"}
        assert ready.headers["x-request-id"] == "call-5"
        assert ready.headers["age"] == "5"
        assert ready.headers["cache-status"].endswith("; age=5")
        assert front.recall.explain("call-5", ANYONE).images[0].tier is TierName.MEMORY
        hits = next(row for row in house.books.snapshot(None).rows if row.outcome is Outcome.HIT)
        assert hits.requests == 5
        labels = {"namespace": "default", "outcome": "hit", "tier": "memory"}
        assert house.registry.get_sample_value("cacheserver_requests_total", labels) == 5
        assert house.registry.get_sample_value("cacheserver_saved_microusd_total") == hits.saved_microusd > 0
        count = {"outcome": "hit", "tier": "memory", "le": "+Inf"}
        assert house.registry.get_sample_value("cacheserver_request_seconds_bucket", count) == 5


async def test_what_fails_where_answers_are_ready_is_logged_and_answered_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> NoReturn:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Generations, "ready", fails)
    async with open_http_front(house) as front:
        with capture_logs() as logs:
            assert pictures_of(await front.generate(headers={"x-request-id": "call-7"}))
    [failed] = [each for each in logs if each["event"] == "ready_answer_failed"]
    assert (failed["log_level"], failed["request_id"]) == ("error", "call-7")


async def test_what_has_expired_or_is_gone_is_not_told_again(house: House) -> None:
    async with open_http_front(house) as front:
        first = [pictures_of(await front.generate(headers={"x-cacheserver-ttl": "10"})) for _ in range(3)]
        house.clock.advance(11)
        second = [pictures_of(await front.generate(headers={"x-cacheserver-ttl": "10"})) for _ in range(3)]
        await house.cache.purge(house.namespace, dry_run=False)
        third = [pictures_of(await front.generate(headers={"x-cacheserver-ttl": "10"})) for _ in range(3)]
        assert house.upstream.calls == 3
        assert first[0] == first[2] != second[0] == second[2] != third[0] == third[2]


@pytest.mark.parametrize(
    "header",
    [
        {"cache-control": "no-cache"},
        {"cache-control": "no-store"},
        {"x-cacheserver-variant-policy": "any"},
        {"x-cacheserver-ttl": "never"},
        {"x-cacheserver-namespace": "elsewhere"},
        {"content-type": "text/plain"},
        {"host": "evil.example"},
        {"origin": "https://evil.example"},
    ],
    ids=lambda header: "".join(header.values()),
)
async def test_another_header_is_another_question(house: House, header: dict[str, str]) -> None:
    """Each of these is refused, or has another picture made, as it is where nobody has asked before."""
    async with open_http_front(house) as front:
        *_, first = [pictures_of(await front.generate()) for _ in range(4)]
        answer = await front.generate(headers=header)
        assert answer.status_code != 200 or pictures_of(answer) != first


async def test_a_ready_answer_needs_the_token_and_the_service_s_being_open(house: House) -> None:
    shop = Caller("shop", frozenset(Permission))
    callers = [(hashlib.sha256(b"sk-s").digest(), shop)]
    async with open_http_front(house, callers=callers, anonymous=None) as front:
        for _ in range(4):
            assert pictures_of(await front.generate(headers={"authorization": "Bearer sk-s"}))
        assert (await front.generate(headers={"authorization": "Bearer sk-t"})).status_code == 401
        front.reception.going_down.set()
        assert (await front.generate(headers={"authorization": "Bearer sk-s"})).status_code == 503


# ---- of image delivery


class NeverError(Exception):
    """Raised where nobody should ask."""


async def never(*_: object, **__: object) -> None:
    raise NeverError


@pytest.fixture
async def public(house: House) -> AsyncIterator[DeliveryFront]:
    async with open_delivery(house, PUBLIC) as front:
        yield front


@pytest.mark.parametrize("query", ["", "?download=a.png", "?format=auto", "?w=16&v={version}"])
async def test_a_picture_that_was_fetched_is_sent_again_as_it_was(
    public: DeliveryFront, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = await public.stored(small_image(1))
    path = path_of(entry) + query.format(version=version_of(entry))
    fetched = [await public.get(path) for _ in range(3)]
    public.house.clock.advance(5)
    monkeypatch.setattr(public.house.cache, "get_by_key", never)
    monkeypatch.setattr(public.renditions, "get", never)
    again = await public.get(path)
    assert again.content == fetched[2].content
    assert {*again.headers} == {*fetched[2].headers}
    differ = {name for name in again.headers if again.headers[name] != fetched[2].headers[name]}
    assert differ <= {"date", "x-request-id", "cache-status", "cache-control"}
    assert again.headers["cache-status"].startswith("cacheserver; hit; detail=memory; ")
    assert again.headers["cache-status"].endswith("age=5")
    kind = "rendition" if "w=" in query else "image"
    labels = {"namespace": "default", "kind": kind, "status": "200"}
    assert public.house.registry.get_sample_value("cacheserver_delivered_total", labels) == 4
    size = {"namespace": "default", "kind": kind}
    sent_bytes = sum(len(each.content) for each in (*fetched, again))
    assert public.house.registry.get_sample_value("cacheserver_delivered_bytes_total", size) == sent_bytes


async def test_conditions_ranges_and_heads_of_a_picture_that_was_fetched_are_answered_as_ever(
    public: DeliveryFront,
) -> None:
    data = small_image(1)
    path = path_of(await public.stored(data))
    etag = [await public.get(path) for _ in range(3)][-1].headers["etag"]
    assert (await public.get(path, headers={"if-none-match": etag})).status_code == 304
    assert (await public.get(path, headers={"if-match": '"x"'})).status_code == 412
    part = await public.get(path, headers={"range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, data[1:4])
    head = await public.client.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(data)))


async def test_a_format_by_accept_is_that_of_each_request(public: DeliveryFront) -> None:
    path = path_of(await public.stored(small_image(1))) + "?format=auto"
    for accept, content_type in [("image/png", "image/png"), ("image/webp", "image/webp")] * 3:
        answer = await public.get(path, headers={"accept": accept})
        assert answer.headers["content-type"] == content_type


async def test_a_picture_that_was_purged_or_replaced_is_not_sent_again(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    small = f"{path_of(entry)}?w=16"
    for _ in range(3):
        assert (await public.get(path_of(entry))).content == small_image(1)
        first = (await public.get(small)).content
    other = await public.stored(small_image(2))
    assert other.key == entry.key
    assert (await public.get(path_of(entry))).content == small_image(2)
    assert (await public.get(small)).content != first
    await public.house.cache.purge(public.house.namespace, dry_run=False)
    assert (await public.get(path_of(entry))).status_code == 404


async def test_a_right_that_has_ended_ends_what_was_fetched_by_it(house: House) -> None:
    reader = Caller("reader", frozenset({Permission.READ}), frozenset({"default"}))
    stranger = Caller("stranger", frozenset(Permission), frozenset({"elsewhere"}))
    callers = [(hashlib.sha256(caller.name.encode()).digest(), caller) for caller in (reader, stranger)]
    async with open_delivery(house, PRIVATE, callers=callers) as front:
        entry = await front.stored(small_image(1))
        for _ in range(3):
            assert (await front.get(signed_path(front, entry))).is_success
            assert (await front.get(path_of(entry), headers={"authorization": "Bearer reader"})).is_success
        assert (await front.get(path_of(entry), headers={"authorization": "Bearer stranger"})).status_code == 403
        assert (await front.get(path_of(entry))).status_code == 401
        signed = signed_path(front, entry)
        assert (await front.get(signed.replace("signature=", "signature=x"))).status_code == 403
        house.clock.advance(2 * EXPIRES_S)
        assert (await front.get(signed)).status_code == 403


def test_no_header_ends_a_line_and_begins_another() -> None:
    assert head_lines({"a": "b", "c": "é"}) == b"a: b\r\nc: \xe9\r\n"
    with pytest.raises(ValueError, match="line end"):
        head_lines({"a": "b\r\nset-cookie: x"})


async def test_what_was_fetched_is_bounded_and_keeps_no_picture(public: DeliveryFront) -> None:
    known = FetchedPictures()
    entry = await public.stored(small_image(1))
    for number in range(_MOST_KNOWN_FETCHED + 1):
        known.keep((b"%d" % number, ""), Fetched(entry.key, UrlAsked(), entry, is_version=False))
    assert known.find((b"0", "")) is None
    fetched = known.find((b"1", ""))
    assert fetched is not None
    assert fetched.entry == entry
    for path in (long := b"x" * (_MOST_NAME_BYTES - 3), too_long := long + b"x"):
        known.keep((path, "*/*"), fetched)
    assert known.find((long, "*/*")) is fetched
    assert known.find((too_long, "*/*")) is None
    public.house.memory.delete(entry.key)
    del entry
    gc.collect()
    await until(lambda: fetched.entry is None)  # a thread that has just written it lets go of it a moment later
