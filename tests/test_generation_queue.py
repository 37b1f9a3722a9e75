"""Who is next, and who leaves when there is no room: by priority, fair between callers, by deadline within one."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cacheserver.generation.queue import Job, JobQueue, QueueOverflowError
from cacheserver.model import Amounts, ImageRequest, Priority

MAX_JOBS, MAX_BYTES, MOST_IMAGES = 6, 1_000, 4
CALLERS = ("ann", "bob", "cid")


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def job(  # noqa: PLR0917 - a job's facts
    loop: asyncio.AbstractEventLoop,
    caller: str = "ann",
    priority: Priority = Priority.STANDARD,
    deadline_s: float = 10.0,
    images: int = 1,
    size_bytes: int = 10,
    model: str = "gpt-image-2",
) -> Job:
    return Job(
        ImageRequest("a fox", model),
        Amounts(images=images),
        caller,
        priority,
        deadline_s,
        size_bytes=size_bytes,
        turn=loop.create_future(),
    )


def take(queue: JobQueue, accepts: Callable[[Job], bool] = lambda _: True) -> Job:
    """Serve the most urgent job that `accepts`."""
    taken = next(filter(accepts, queue))
    queue.take(taken)
    return taken


class JobQueueMachine(RuleBasedStateMachine):
    """Whatever comes and goes, the rules hold. `waiting` is what should be in the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.queue = JobQueue(max_jobs=MAX_JOBS, max_bytes=MAX_BYTES)
        self.waiting: list[Job] = []
        self.served: list[Job] = []
        self.together: dict[tuple[Priority, str, str], Counter[str]] = {}

    def teardown(self) -> None:
        self.loop.close()

    @rule(
        caller=st.sampled_from(CALLERS),
        priority=st.sampled_from(Priority),
        deadline_s=st.integers(0, 5),
        images=st.integers(1, MOST_IMAGES),
        size_bytes=st.integers(1, 400),
    )
    def one_comes(self, caller: str, priority: Priority, deadline_s: int, images: int, size_bytes: int) -> None:
        new = job(self.loop, caller, priority, deadline_s, images, size_bytes)
        try:
            left = self.queue.add(new)
        except QueueOverflowError:
            self._finds_no_room_among_the_more_urgent(new)
            assert new not in self.queue
            return
        everybody = [*self.waiting, new]
        assert new not in left
        for other in left:
            self._was_least_urgent(other, everybody)
            everybody.remove(other)
        self.waiting = everybody

    def _finds_no_room_among_the_more_urgent(self, new: Job) -> None:
        stay = [
            other
            for other in self.waiting
            if other.priority >= new.priority
            and not ((other.caller, other.priority) == (new.caller, new.priority) and other.deadline_s > new.deadline_s)
        ]
        assert len(stay) + 1 > MAX_JOBS or sum(other.size_bytes for other in [*stay, new]) > MAX_BYTES

    @staticmethod
    def _was_least_urgent(who: Job, among: list[Job]) -> None:
        assert who.priority == min(other.priority for other in among)
        rivals = [other for other in among if (other.caller, other.priority) == (who.caller, who.priority)]
        assert who is max(rivals, key=lambda other: (other.deadline_s, other.arrival))

    @precondition(lambda self: self.waiting)
    @rule()
    def the_next_is_served(self) -> None:
        taken = take(self.queue)
        self._was_most_urgent(taken, self.waiting)
        self._count(taken)
        self.waiting.remove(taken)
        self.served.append(taken)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def the_next_of_some_is_served(self, data: st.DataObject) -> None:
        model = self._one_that_waits(data).model
        taken = take(self.queue, lambda other: other.model == model)
        self._count(taken)
        self.waiting.remove(taken)

    @staticmethod
    def _was_most_urgent(who: Job, among: list[Job]) -> None:
        assert who.priority == max(other.priority for other in among)
        rivals = [other for other in among if (other.caller, other.priority) == (who.caller, who.priority)]
        assert who is min(rivals, key=lambda other: (other.deadline_s, other.arrival))

    @precondition(lambda self: self.served)
    @rule()
    def one_comes_back(self) -> None:
        again = self.served.pop()
        self.queue.add_again(again)
        self.waiting.append(again)
        # It was let in beyond the bounds: so may be who comes back while there is no room.
        while len(self.waiting) > MAX_JOBS or sum(other.size_bytes for other in self.waiting) > MAX_BYTES:
            self.the_next_is_served()
            self.served.clear()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def one_gives_up(self, data: st.DataObject) -> None:
        gone = self._one_that_waits(data)
        self.queue.remove(gone)
        self.waiting.remove(gone)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), priority=st.sampled_from(Priority), deadline_s=st.integers(0, 5))
    def one_is_in_more_of_a_hurry(self, data: st.DataObject, priority: Priority, deadline_s: int) -> None:
        hurried = self._one_that_waits(data)
        before = hurried.priority, hurried.deadline_s
        self.queue.hasten(hurried, priority=priority, deadline_s=deadline_s)
        assert hurried.priority == max(before[0], priority)
        assert hurried.deadline_s == min(before[1], deadline_s)

    def _one_that_waits(self, data: st.DataObject) -> Job:
        # By its place: where Hypothesis looks next depends on the hashes of samples, and a job's is its address.
        return self.waiting[data.draw(st.integers(0, len(self.waiting) - 1))]

    @invariant()
    def the_bounds_hold(self) -> None:
        assert len(self.queue) <= MAX_JOBS
        assert self.queue.size_bytes <= MAX_BYTES

    @invariant()
    def the_counts_are_those_of_who_waits(self) -> None:
        assert set(self.queue) == set(self.waiting)
        assert len(self.queue) == len(self.waiting)
        assert self.queue.size_bytes == sum(other.size_bytes for other in self.waiting)
        assert self.queue.depth == Counter(other.priority for other in self.waiting)
        assert self.queue.demand == Counter(other.route for other in self.waiting)
        for priority in Priority:
            images = sum(other.amounts.images for other in self.waiting if other.priority >= priority)
            assert self.queue.images_before(priority, "gpt-image-2") == images
            assert self.queue.images_before(priority, "another") == 0

    @invariant()
    def nobody_starves(self) -> None:
        """Two callers that wait together at one priority are served alike, to within two calls' pictures."""
        lines = {(other.priority, other.caller) for other in self.waiting}
        pairs = {(p, a, b) for (p, a), (q, b) in itertools.permutations(lines, 2) if p is q and a < b}
        self.together = {pair: self.together.get(pair, Counter()) for pair in pairs}
        for (_, a, b), had in self.together.items():
            assert abs(had[a] - had[b]) <= 2 * MOST_IMAGES

    def _count(self, taken: Job) -> None:
        for (priority, *callers), had in self.together.items():
            if priority is taken.priority and taken.caller in callers:
                had[taken.caller] += taken.amounts.images


TestJobQueue = pytest.mark.no_cover(JobQueueMachine.TestCase)
TestJobQueue.settings = settings(max_examples=80, stateful_step_count=30)


@pytest.mark.no_cover
def test_one_callers_hundred_thousand_rows_do_not_starve_anothers_one(loop: asyncio.AbstractEventLoop) -> None:
    queue = JobQueue(max_jobs=200_000, max_bytes=10_000_000)
    for _ in range(100_000):
        queue.add(job(loop, "bulk", deadline_s=1.0))
    one = job(loop, "other", deadline_s=99.0)
    queue.add(one)
    assert one in [take(queue) for _ in range(2)]


def test_who_has_had_its_turn_does_not_go_first_by_coming_back(loop: asyncio.AbstractEventLoop) -> None:
    queue = JobQueue(max_jobs=10, max_bytes=1_000)
    queue.add(job(loop, "ann", images=4))
    queue.add(job(loop, "bob"))
    assert take(queue).caller == "ann"
    queue.add(job(loop, "ann"))
    assert [take(queue).caller for _ in range(2)] == ["bob", "ann"]


def test_a_full_queue_lets_the_interactive_in_and_the_warm_up_out(loop: asyncio.AbstractEventLoop) -> None:
    queue = JobQueue(max_jobs=2, max_bytes=1_000)
    warm_up, standard = job(loop, priority=Priority.WARM_UP), job(loop)
    queue.add(standard)
    queue.add(warm_up)
    interactive = job(loop, priority=Priority.INTERACTIVE)
    assert queue.add(interactive) == [warm_up]
    assert queue.add(job(loop, priority=Priority.INTERACTIVE)) == [standard]
    with pytest.raises(QueueOverflowError):
        queue.add(job(loop))


def test_a_request_too_large_for_the_queue_drives_nobody_out(loop: asyncio.AbstractEventLoop) -> None:
    queue = JobQueue(max_jobs=9, max_bytes=100)
    small = job(loop, priority=Priority.WARM_UP, size_bytes=60)
    queue.add(small)
    with pytest.raises(QueueOverflowError):
        queue.add(job(loop, priority=Priority.INTERACTIVE, size_bytes=101))
    assert list(queue) == [small]
    assert queue.size_bytes == 60
