"""How much memory the pictures that answers hold until they are read may take together, over HTTP and gRPC.

L1 drops a picture when it has to; an answer that is being sent keeps it as long as its client takes to read it. Each
counts from when it begins to be sent, once however many answers send it, and L1 gives way to all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from cacheserver.errors import OverloadedError
from cacheserver.model import ImageBytes, buffer_of

STALLED_S = 60.0
"""How long a client may take nothing of its answer, in seconds; then it is ended."""


class DownloadMemory:
    """The memory that the pictures of all answers being sent may take. It belongs to the event loop's thread."""

    def __init__(self, max_bytes: int, *, give_way: Callable[[int], None] = lambda _: None) -> None:
        """All together take `max_bytes` at most; `give_way` is told how much they take whenever that changes."""
        self._max_bytes = max_bytes
        self._give_way = give_way
        self._holders: Counter[int] = Counter()
        """How often each buffer is held, by its id: whoever holds it keeps it."""
        self.held_bytes = 0
        """How much they take now."""

    @property
    def is_full(self) -> bool:
        """Whether there is no room for a further picture, however small."""
        return self.held_bytes >= self._max_bytes

    def hold(self) -> Hold:
        """What one answer holds, nothing yet."""
        return Hold(self)

    def check(self, pictures: Iterable[ImageBytes]) -> None:
        """Raise OverloadedError if there is no room for these now. Alone an answer has it, however large it is."""
        buffers = {id(buffer): buffer for buffer in map(buffer_of, pictures)}
        new_bytes = sum(len(buffer) for key, buffer in buffers.items() if key not in self._holders)
        if new_bytes and self.held_bytes and self.held_bytes + new_bytes > self._max_bytes:
            raise OverloadedError("Images that others have yet to read take all the memory for them; try again.")

    def add(self, buffer: bytes) -> None:
        """One more answer holds this."""
        self._holders[id(buffer)] += 1
        if self._holders[id(buffer)] == 1:
            self._change(len(buffer))

    def remove(self, buffer: bytes) -> None:
        """One of those answers holds it no longer."""
        self._holders[id(buffer)] -= 1
        if not self._holders[id(buffer)]:
            del self._holders[id(buffer)]
            self._change(-len(buffer))

    def _change(self, by_bytes: int) -> None:
        self.held_bytes += by_bytes
        self._give_way(self.held_bytes)


class Hold:
    """What one answer holds of that memory until it is read, or over: a context."""

    def __init__(self, memory: DownloadMemory) -> None:
        self._memory = memory
        self._buffers: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.let_go()

    def take(self, pictures: Sequence[ImageBytes]) -> None:
        """The answer sends these. Raises OverloadedError where there is no room for them."""
        self._memory.check(pictures)
        self.count(pictures)

    def count(self, pictures: Sequence[ImageBytes]) -> None:
        """It sends these, whether there is room for them or not."""
        for buffer in map(buffer_of, pictures):
            self._memory.add(buffer)
            self._buffers.append(buffer)

    def let_go(self) -> None:
        """Nothing of it is sent any more."""
        while self._buffers:
            self._memory.remove(self._buffers.pop())
