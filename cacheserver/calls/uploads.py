"""How much memory the images that calls bring with them may take together, over HTTP and gRPC.

Each body and message has a bound of its own; many come at a time, and wait for their pictures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Self
from weakref import finalize

from cacheserver.errors import OverloadedError
from cacheserver.model import InputImage


class UploadMemory:
    """The memory that what was uploaded for all calls in progress may take."""

    def __init__(self, max_bytes: int) -> None:
        """All together take `max_bytes` at most."""
        self._free_bytes = max_bytes
        self._given_back: deque[int] = deque()

    @property
    def free_bytes(self) -> int:
        """What is left for further ones."""
        while self._given_back:
            self._free_bytes += self._given_back.popleft()
        return self._free_bytes

    def hold(self) -> Hold:
        """What one call takes, nothing yet."""
        return Hold(self)

    def check(self, size_bytes: int) -> None:
        """Raise OverloadedError if there is no room for so much more now."""
        if size_bytes > self.free_bytes:
            raise OverloadedError("The uploads of others take all the memory there is for them; try again.")

    def take(self, size_bytes: int) -> None:
        """So much more is taken. Raises OverloadedError where there is no room for it."""
        self.check(size_bytes)
        self._free_bytes -= size_bytes

    def give_back(self, size_bytes: int) -> None:
        """So much is free again. May be called from any thread, at any point of what another one does."""
        self._given_back.append(size_bytes)


class Hold:
    """What one call takes of that memory until it is read, or over: a context."""

    def __init__(self, memory: UploadMemory) -> None:
        self._memory = memory
        self._taken_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._memory.give_back(self._taken_bytes)
        self._taken_bytes = 0

    def take(self, size_bytes: int) -> None:
        """So much more has come. Raises OverloadedError where there is no room for it."""
        self._memory.take(size_bytes)
        self._taken_bytes += size_bytes

    def hand_over(self, images: Iterable[InputImage]) -> None:
        """From now on these images stand for what they take, each until nothing refers to it any more.

        A load whose callers have all gone still needs them.
        """
        for image in images:
            size_bytes = len(image.data or b"")
            self._taken_bytes -= size_bytes
            finalize(image, self._memory.give_back, size_bytes).atexit = False
