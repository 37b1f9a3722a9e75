"""Places are given out by priority, first come first served within one, and none is ever lost."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cacheserver.errors import QueueFullError
from cacheserver.generation.queue import PlaceQueue
from cacheserver.model import Priority

PLACES, QUEUE_MAX = 2, 4


class Visitor:
    """One who wants a place, holds it until told to leave, and may give up."""

    def __init__(self, queue: PlaceQueue, priority: Priority, order: list[Visitor]) -> None:
        self.priority = priority
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._visit(queue, order))

    async def _visit(self, queue: PlaceQueue, order: list[Visitor]) -> None:
        async with queue.place(self.priority):
            order.append(self)
            await self.leave.wait()


class PlaceQueueMachine(RuleBasedStateMachine):
    """Compares the queue with a list that is sorted anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.queue = PlaceQueue(places=PLACES, queue_max=QUEUE_MAX)
        self.served: list[Visitor] = []
        self.inside: list[Visitor] = []
        self.waiting: list[Visitor] = []

    def _run(self) -> None:
        async def settle() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        self.loop.run_until_complete(settle())

    def _admit(self) -> None:
        while self.waiting and len(self.inside) < PLACES:
            first = max(self.waiting, key=lambda visitor: visitor.priority)  # max takes the earliest of equals
            self.waiting.remove(first)
            self.inside.append(first)

    @rule(priority=st.sampled_from(Priority))
    def someone_comes(self, priority: Priority) -> None:
        async def come() -> Visitor:
            return Visitor(self.queue, priority, self.served)

        visitor = self.loop.run_until_complete(come())
        self._run()
        if len(self.inside) == PLACES and len(self.waiting) == QUEUE_MAX:
            assert isinstance(visitor.task.exception(), QueueFullError)
            return
        self.waiting.append(visitor)
        self._admit()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def someone_leaves(self, data: st.DataObject) -> None:
        visitor = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        visitor.leave.set()
        self._admit()
        self._run()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def someone_gives_up(self, data: st.DataObject) -> None:
        visitor = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        visitor.task.cancel()
        self._run()

    @precondition(lambda self: self.inside and self.waiting)
    @rule(data=st.data())
    def someone_gives_up_as_the_place_comes_free(self, data: st.DataObject) -> None:
        leaving = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        quitter = max(self.waiting, key=lambda visitor: visitor.priority)
        self.waiting.remove(quitter)

        async def at_once() -> None:
            leaving.leave.set()
            # Two turns: the one who leaves runs and hands the place on; the quitter has not run yet.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            quitter.task.cancel()

        self.loop.run_until_complete(at_once())
        self._run()
        if not quitter.task.done():  # pragma: no cover - a visitor always goes when cancelled
            raise AssertionError
        if quitter in self.served:
            self.served.remove(quitter)
        self._admit()

    @invariant()
    def those_inside_are_those_who_should_be(self) -> None:
        served = [visitor for visitor in self.served if not visitor.task.done()]
        assert set(served) == set(self.inside)
        assert sum(self.queue.depth.values()) == len(self.waiting)

    def teardown(self) -> None:
        for visitor in [*self.inside, *self.waiting]:
            visitor.task.cancel()
        self._run()
        assert self.queue._free == PLACES
        assert not self.queue.depth
        self.loop.close()


PlaceQueueMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPlaceQueue = PlaceQueueMachine.TestCase


async def test_higher_priority_goes_first_and_equals_in_the_order_they_came() -> None:
    queue = PlaceQueue(places=1, queue_max=10)
    served: list[Visitor] = []
    first = Visitor(queue, Priority.WARM_UP, served)
    await asyncio.sleep(0)
    wanted = [Priority.BATCH, Priority.INTERACTIVE, Priority.WARM_UP, Priority.INTERACTIVE, Priority.STANDARD]
    others = [Visitor(queue, priority, served) for priority in wanted]
    await asyncio.sleep(0)
    for visitor in others:
        visitor.leave.set()
    first.leave.set()
    await asyncio.gather(first.task, *(visitor.task for visitor in others))
    assert served == [first, others[1], others[3], others[4], others[0], others[2]]


async def test_one_more_than_may_wait_is_turned_away_at_once() -> None:
    queue = PlaceQueue(places=1, queue_max=1)
    visitors = [Visitor(queue, Priority.STANDARD, []) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="1 generations wait already"):
        async with queue.place(Priority.INTERACTIVE):
            pytest.fail("let in")
    for visitor in visitors:
        visitor.task.cancel()
        with suppress(asyncio.CancelledError):
            await visitor.task


async def test_a_place_handed_to_someone_just_cancelled_goes_to_the_next() -> None:
    queue = PlaceQueue(places=1, queue_max=10)
    served: list[Visitor] = []
    holder, quitter, heir = (Visitor(queue, Priority.STANDARD, served) for _ in range(3))
    await asyncio.sleep(0)
    queue._give_back()  # the place is handed over, and the one it went to has not run yet
    quitter.task.cancel()
    await asyncio.wait([quitter.task])
    await asyncio.sleep(0)
    assert quitter.task.cancelled()
    assert served == [holder, heir]
    for visitor in (holder, heir):
        visitor.task.cancel()
    await asyncio.wait([holder.task, heir.task])


async def test_someone_cancelled_and_not_run_yet_is_passed_over() -> None:
    queue = PlaceQueue(places=1, queue_max=10)
    served: list[Visitor] = []
    holder, quitter, heir = (Visitor(queue, Priority.STANDARD, served) for _ in range(3))
    await asyncio.sleep(0)
    quitter.task.cancel()
    queue._give_back()  # the quitter is still in the queue
    await asyncio.wait([quitter.task])
    await asyncio.sleep(0)
    assert served == [holder, heir]
    for visitor in (holder, heir):
        visitor.task.cancel()
    await asyncio.wait([holder.task, heir.task])
