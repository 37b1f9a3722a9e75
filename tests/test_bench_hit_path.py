"""The bench of hits: what it says of a server is what the server did, and what it cannot tell it does not say."""

from __future__ import annotations

import io
import math
import struct
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from PIL import Image

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench import grpc_load, h2load, hit_floors, hit_load, hit_path, hit_sides, hit_stage, hit_tuning, profile
from scripts.bench.framing import framed, messages_of
from scripts.bench.hit_load import Answered, Load, Sample, Taken, TooSoonError
from scripts.bench.hit_rounds import AGAIN, BARE, OURS, TUNED, Goal, Round, Rounds, measure, shortfalls
from scripts.bench.hit_sides import Row
from scripts.bench.hit_stage import exact_png

METHOD = "/promptcache.v1.PromptCacheService/GetImage"
SAID = """\
finished in 1.16s, 2754.88 req/s, 10.94MB/s
requests: 3200 total, 3200 started, 3200 done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: 3200 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 12.70MB (13319294) total, 11.72KB (12000) headers (space savings 95.37%), 12.52MB (13123200) data
"""


def cost(cpu_us: float, *, p50_us: float = 100.0) -> Round:
    return Round(per_second=1e6 / cpu_us, cpu_us=cpu_us, p50_us=p50_us, p99_us=2 * p50_us)


def measured(**cpu_us: Sequence[float]) -> Rounds:
    names = {"bare": BARE, "again": AGAIN, "tuned": TUNED, "ours": OURS}
    return Rounds({names[name]: [cost(each) for each in figures] for name, figures in cpu_us.items()})


def test_a_message_has_a_prefix_of_five_bytes_on_the_wire() -> None:
    assert framed(b"abc") == b"\0\0\0\0\3abc"
    assert list(messages_of(framed(b"abc") + framed(b"") + framed(bytes(70_000)))) == [b"abc", b"", bytes(70_000)]
    assert list(messages_of(b"")) == []


def test_a_picture_has_exactly_the_bytes_it_should_and_is_one() -> None:
    for number, size_bytes in ((1, 4_000), (2, 100_000)):
        picture = exact_png(number, size_bytes)
        assert len(picture) == size_bytes
        Image.open(io.BytesIO(picture), formats=("PNG",)).load()
    assert exact_png(1, 4_000) != exact_png(2, 4_000)


def test_h2load_says_what_it_received_and_a_call_that_was_lost_is_an_error() -> None:
    assert h2load.bytes_received(SAID.format(succeeded=3200, failed=0), 3200) == 13_123_200
    with pytest.raises(RuntimeError, match="of 3200 calls 3199 were answered"):
        h2load.bytes_received(SAID.format(succeeded=3199, failed=1), 3200)
    with pytest.raises(RuntimeError, match="nothing that could be read: usage"):
        h2load.bytes_received("usage", 3200)


def test_the_log_is_read_in_the_order_of_answers() -> None:
    assert hit_load.read_log("2000000\t200\t500000\n1000000\t200\t3000000\n") == [
        Answered(2.5, 500_000),
        Answered(4.0, 3_000_000),
    ]


def test_neither_the_first_nor_the_last_calls_of_a_turn_count() -> None:
    answered = [Answered(at_s=n / 100, us=n) for n in range(100)]
    samples = [Sample(at_s=tenth / 10, cpu_s=tenth / 20) for tenth in range(11)]
    taken = hit_load.within(answered, samples)
    assert taken == Taken(50, pytest.approx(0.5), pytest.approx(0.25), list(range(31, 81)))
    with pytest.raises(TooSoonError, match="100 calls are over too soon"):
        hit_load.within(answered, samples[:4])


def test_calls_share_a_connection_only_when_they_are_many() -> None:
    assert [Load.of(n) for n in (1, 32, 256)] == [Load(1), Load(32), Load(32, 8)]


def test_a_round_is_all_turns_together() -> None:
    turns = [Taken(calls=100, seconds=1.0, cpu_s=0.01, us=[10.0] * 100), Taken(300, 1.0, 0.07, [30.0] * 300)]
    figures = Round.of(turns)
    assert (figures.per_second, figures.cpu_us, figures.p50_us) == (200, pytest.approx(200), 30)
    assert figures.us_each == 5_000


def test_the_median_of_the_ratios_counts_not_the_ratio_of_the_medians() -> None:
    rounds = measured(bare=[100, 200, 400], ours=[150, 200, 800])
    assert rounds.ratio(OURS, BARE) == 1.5
    assert math.isnan(rounds.ratio(OURS, TUNED))


@pytest.mark.parametrize(("again", "can_tell"), [(1.009, True), (0.991, True), (1.011, False), (0.988, False)])
def test_a_run_counts_only_when_the_bare_server_is_as_dear_as_itself(again: float, can_tell: bool) -> None:  # noqa: FBT001 - a parameter of the table
    rounds = measured(bare=[100], again=[100 * again], ours=[90])
    assert rounds.can_tell() is can_tell
    assert (shortfalls("row", [Goal(BARE, 1.0)], rounds) == []) is can_tell


def test_a_run_counts_only_when_what_is_a_goal_is_alike_too() -> None:
    rounds = Rounds({BARE: [cost(100)], AGAIN: [cost(100, p50_us=102)], TUNED: [cost(100)], OURS: [cost(100)]})
    assert shortfalls("row", [Goal(TUNED, 1.0)], rounds) == []
    assert shortfalls("row", [Goal(TUNED, 1.0, "p50_us")], rounds) == [
        "row: A/A is 1.0000 in cpu_us, 1.0200 in p50_us after 1 rounds: the machine is too restless to tell"
    ]


def test_of_a_few_calls_there_is_no_99th_percentile() -> None:
    few, many = (Taken(calls=n, seconds=1.0, cpu_s=1.0, us=[1.0] * n) for n in (99, 100))
    assert (math.isnan(Round.of([few]).p99_us), Round.of([many]).p99_us) == (True, 1.0)


def test_each_goal_that_is_missed_is_named() -> None:
    rounds = measured(bare=[100.0], again=[100.0], tuned=[80.0], ours=[101.0])
    goals = [Goal(BARE, 1.01), Goal(BARE, 1.00), Goal(TUNED, 1.15), Goal(TUNED, 1.15, "p50_us"), Goal(None, 100.5)]
    assert shortfalls("l1", goals, rounds) == [
        "l1: cpu_us is 1.010 x bare, not 1",
        "l1: cpu_us is 1.262 x tuned, not 1.15",
        "l1: cpu_us is 101.000, not 100.5",
    ]


def test_what_was_not_measured_falls_short() -> None:
    assert shortfalls("l2", [Goal(TUNED, 1.3)], measured(ours=[1.0])) == ["l2: cpu_us is nan x tuned, not 1.3"]


async def run_rounds(again_s: Sequence[float], *, most_rounds: int, most_s: float = math.inf) -> Rounds:
    """Rounds in which the second bare server takes so many seconds a turn, and the first one second."""
    again = iter(again_s)

    async def one() -> Taken:
        return Taken(calls=1, seconds=1.0, cpu_s=1.0, us=[1.0])

    async def other() -> Taken:
        return Taken(calls=1, seconds=1.0, cpu_s=next(again), us=[1.0])

    return await measure({BARE: one, AGAIN: other}, rounds=1, most_rounds=most_rounds, turns=1, most_s=most_s)


async def test_rounds_are_added_until_the_bare_server_is_as_dear_as_itself() -> None:
    rounds = await run_rounds([1.5, 0.9, 1.0, 7.0], most_rounds=31)
    assert (len(rounds), rounds.can_tell()) == (3, True)


async def test_rounds_end_at_the_most_there_may_be() -> None:
    rounds = await run_rounds([1.5, 1.5, 1.5], most_rounds=2)
    assert (len(rounds), rounds.can_tell()) == (2, False)


async def test_a_row_that_has_had_its_time_is_given_no_further_rounds() -> None:
    rounds = await run_rounds([1.5, 1.5], most_rounds=31, most_s=0)
    assert (len(rounds), rounds.can_tell()) == (1, False)


def test_the_figures_of_a_row_are_those_that_were_measured() -> None:
    rounds = measured(bare=[100.0, 100.0], again=[100.0, 100.0], tuned=[80.0, 80.0], ours=[90.0, 92.0])
    row = Row("l1/x/32", sides=lambda *_: pytest.fail("not measured again"), goals=(Goal(BARE, 0.9),), bytes_each=5_000)
    figures = hit_path.figures_of(row, rounds)
    assert (figures["rounds"], figures["alike"]) == (2, {"cpu_us": 1.0, "p50_us": 1.0})
    assert figures["sides"][OURS]["cpu_us"] == 91
    assert figures["sides"][OURS]["cpu_to"] == {BARE: 0.91, AGAIN: 0.91, TUNED: 1.1375}
    assert figures["sides"][BARE]["mb_per_second"] == 50
    assert figures["goals"] == [{"floor": BARE, "most": 0.9, "figure": "cpu_us", "is": 0.91}]
    assert figures["shortfalls"] == ["l1/x/32: cpu_us is 0.910 x bare, not 0.9"]


def test_rows_are_chosen_by_their_names() -> None:
    assert [row.name for row in hit_path.selected(["l1/4kB/*", "find/*"])] == [
        "l1/4kB/32",
        "l1/4kB/1",
        "l1/4kB/256",
        "find/1000/4",
    ]
    assert len(hit_path.selected(["*"])) == len({row.name for row in hit_path.ROWS}) == len(hit_path.ROWS)
    with pytest.raises(typer.BadParameter, match="no row is called l9"):
        hit_path.selected(["l1/*", "l9"])


def test_a_try_is_channel_arguments_and_variables_of_the_environment() -> None:
    assert hit_tuning.parted("grpc.a=1 MALLOC_ARENA_MAX=2 grpc.b=x") == (
        ["grpc.a=1", "grpc.b=x"],
        {"MALLOC_ARENA_MAX": "2"},
    )
    assert [hit_floors.option(text) for text in ("grpc.a=-1", "grpc.b=x")] == [("grpc.a", -1), ("grpc.b", "x")]


def test_without_a_program_to_record_with_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile.shutil, "which", lambda _: None)
    monkeypatch.setattr(profile.sys, "executable", "/nowhere/python")
    with pytest.raises(ValueError, match=r"pip install 'cacheserver\[bench\]'"):
        profile.recorder(Path("hit.svg"), 1)


@asynccontextmanager
async def bare(*messages: bytes, seen: list[bytes] | None = None) -> AsyncIterator[str]:
    """A server that answers as the floor does, and notes what it was asked for."""
    handler = hit_floors._handler(messages)

    async def noting(raw: bytes, context: Any) -> bytes:
        if seen is not None:
            seen.append(raw)
        answer: bytes = await handler.unary_unary(raw, context)
        return answer

    server = grpc.aio.server()
    _, service, name = METHOD.split("/")
    method = grpc.unary_unary_rpc_method_handler(noting) if handler.unary_unary else handler
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def bodies(count: int) -> list[bytes]:
    requests = (pb.GetImageRequest(spec=pb.ImageSpec(prompt=f"picture {n}")) for n in range(count))
    return [framed(each.SerializeToString()) for each in requests]


async def load(address: str, requests: Sequence[bytes], **options: Any) -> tuple[int, list[tuple[int, int]]]:
    options = {"calls": 40, "at_a_time": 4, "skew": 0.0, **options}
    return await grpc_load.load(address, requests, method=METHOD, token="t", **options)


async def test_calls_by_hand_are_what_a_grpc_server_takes_and_each_connection_has_a_body_of_its_own() -> None:
    seen: list[bytes] = []
    async with bare(bytes(100_000), seen=seen) as address:
        received, log = await load(address, bodies(4))
    assert received == 40 * 100_005
    assert len(log) == 40
    assert Counter(pb.GetImageRequest.FromString(raw).spec.prompt for raw in seen) == {
        f"picture {n}": 10 for n in range(4)
    }


async def test_drawn_calls_prefer_the_first_prompts_and_have_request_ids_of_their_own() -> None:
    seen: list[bytes] = []
    async with bare(b"x", seen=seen) as address:
        await load(address, bodies(3), calls=300, skew=4.0)
    requests = [pb.GetImageRequest.FromString(raw) for raw in seen]
    assert len({request.request_id for request in requests}) == 300
    [(prompt, times), *_] = Counter(request.spec.prompt for request in requests).most_common()
    assert prompt == "picture 0"
    assert times > 200


async def test_a_call_that_fails_brings_no_bytes() -> None:
    async with bare() as address:
        received, log = await load(address, bodies(1))
    assert (received, len(log)) == (0, 40)


async def test_all_messages_of_a_stream_count() -> None:
    async with bare(b"header", b"chunk", b"chunk") as address:
        received, _ = await load(address, bodies(1))
    assert received == 40 * sum(len(framed(each)) for each in (b"header", b"chunk", b"chunk"))


def test_frames_are_those_of_http_2() -> None:
    assert grpc_load.frame(6, 1, 7, b"12345678") == b"\0\0\x08\x06\x01" + struct.pack(">I", 7) + b"12345678"


async def test_a_turn_that_is_over_too_soon_is_made_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    async def answer(*_: object, calls: int, load: Load) -> Taken:
        assert load == Load(2)
        asked.append(calls)
        if calls < 20:
            raise TooSoonError
        return Taken(calls=calls, seconds=0.1, cpu_s=0.01, us=[1.0] * calls)

    monkeypatch.setattr(hit_sides, "ask", answer)
    call = hit_load.Call(METHOD, Path("bodies"), 1, "t")
    sides = await hit_sides.by_turns({BARE: hit_stage.Server("127.0.0.1:1", 1)}, call, Load(2), 0.5)
    assert (await sides[BARE]()).calls == 160
    assert asked == [8, 16, 32, 160]
