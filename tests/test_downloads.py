"""Pictures that answers hold until they are read: each counts once, as long as any answer sends it."""

from __future__ import annotations

import pytest

from cacheserver.calls.downloads import DownloadMemory
from cacheserver.errors import OverloadedError

FOX, OWL, ELK = bytes(600), bytes(500), bytes(400)
FOX_IN_REPLY = memoryview(FOX)[10:]


@pytest.fixture
def memory() -> DownloadMemory:
    return DownloadMemory(1_000)


def test_a_picture_counts_once_however_many_answers_send_it_until_the_last_is_over(memory: DownloadMemory) -> None:
    with memory.hold() as one:
        one.take([FOX])
        with memory.hold() as another:
            another.take([FOX_IN_REPLY, ELK])
            assert memory.held_bytes == 1_000
        assert memory.held_bytes == 600
    assert memory.held_bytes == 0


def test_what_there_is_no_room_for_is_refused_and_holds_nothing(memory: DownloadMemory) -> None:
    with memory.hold() as one, memory.hold() as another:
        one.take([FOX])
        with pytest.raises(OverloadedError, match="try again"):
            another.take([OWL])
        assert memory.held_bytes == 600
        another.take([ELK, FOX])  # what is held already takes no room
        assert memory.is_full
        one.let_go()
        one.let_go()
        assert memory.held_bytes == 1_000
        another.let_go()
        another.take([OWL])


def test_an_answer_larger_than_all_the_room_is_sent_when_no_other_is(memory: DownloadMemory) -> None:
    with memory.hold() as one, memory.hold() as another:
        one.take([FOX, OWL])
        with pytest.raises(OverloadedError):
            another.take([ELK])


def test_what_cannot_be_refused_counts_all_the_same(memory: DownloadMemory) -> None:
    with memory.hold() as one, memory.hold() as another:
        one.take([FOX])
        another.count([OWL])
        assert memory.held_bytes == 1_100


def test_whoever_gives_way_is_told_of_every_change() -> None:
    told: list[int] = []
    memory = DownloadMemory(1_000, give_way=told.append)
    with memory.hold() as one, memory.hold() as another:
        one.take([FOX])
        another.take([FOX])
        another.take([ELK])
    assert told == [600, 1_000, 600, 0]
