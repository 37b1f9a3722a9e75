"""Work that outlives the call that began it: whatever happens, it has an owner, and a bug in it is said."""

from __future__ import annotations

import asyncio

import structlog

from cacheserver.tasks import OwnedTasks, every, in_turns
from tests.fakes import FakeClock
from tests.waiting import until


class Rounds:
    """Work of rounds; those named in `broken` die of a bug."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken
        self.begun = 0

    async def work(self) -> None:
        self.begun += 1
        if self.begun in self.broken:
            raise ZeroDivisionError("a bug")

    async def begin(self, begun: int) -> None:
        await until(lambda: self.begun == begun)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


class TestClosing:
    async def test_what_a_task_owns_at_its_end_is_awaited_too_though_none_was_late(self) -> None:
        tasks, ended, gate = OwnedTasks(), [], asyncio.Event()

        async def write_down() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            ended.append("written down")

        async def call() -> None:
            await gate.wait()
            tasks.own(write_down(), "close attempt")

        tasks.own(call(), "call")
        closing = asyncio.create_task(tasks.aclose(300))
        await asyncio.sleep(0)
        gate.set()
        await closing
        assert ended == ["written down"]

    async def test_what_a_cancelled_task_owns_at_its_end_has_a_moment(self) -> None:
        tasks, ended = OwnedTasks(), []

        async def write_down() -> None:
            ended.append("written down")

        async def call() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                tasks.own(write_down(), "close attempt")

        tasks.own(call(), "call")
        await asyncio.sleep(0)
        await tasks.aclose(0)
        assert ended == ["written down"]

    async def test_closing_that_is_cancelled_leaves_no_task_running(self) -> None:
        tasks = OwnedTasks()
        task = tasks.own(asyncio.Event().wait(), "call")
        closing = asyncio.create_task(tasks.aclose(300))
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing})
        assert closing.cancelled()
        assert task.cancelled()


class TestEvery:
    async def test_a_bug_in_one_round_is_said_and_the_next_round_comes_after_its_pause(self, clock: FakeClock) -> None:
        rounds = Rounds(1)
        with structlog.testing.capture_logs() as events:
            task = asyncio.create_task(every(5.0, rounds.work, clock=clock, name="look", at_once=True))
            await rounds.begin(1)
            await until(lambda: clock.sleepers == 1)
            clock.advance(5.0)
            await rounds.begin(2)
        assert [(event["event"], event["task"]) for event in events] == [("round_failed", "look")]
        assert isinstance(events[0]["exc_info"], ZeroDivisionError)
        await end(task)

    async def test_the_first_round_comes_after_a_pause_unless_it_is_wanted_at_once(self, clock: FakeClock) -> None:
        rounds = Rounds()
        task = asyncio.create_task(every(5.0, rounds.work, clock=clock, name="look"))
        await until(lambda: clock.sleepers == 1)
        assert rounds.begun == 0
        clock.advance(5.0)
        await rounds.begin(1)
        await end(task)


async def test_what_is_done_in_turns_is_done_in_order_and_others_run_in_between() -> None:
    seen: list[object] = []
    async for some in in_turns("abcde", 2):
        seen.append(some)
        asyncio.get_running_loop().call_soon(seen.append, 0)
    assert seen == ["ab", 0, "cd", 0, "e"]
