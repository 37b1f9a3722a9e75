"""How much memory large bodies may take together: each has a bound of its own, and many come at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Self
from weakref import finalize

from starlette.requests import Request

from cacheserver.errors import OverloadedError
from cacheserver.http.body import body_pieces
from cacheserver.model import InputImage


class Uploads:
    """The memory that the bodies of all calls in progress may take."""

    def __init__(self, *, max_bytes: int, memory_bytes: int) -> None:
        """One body may have `max_bytes`; together they take `memory_bytes` at most."""
        self._max_bytes = max_bytes
        self._free_bytes = memory_bytes
        self._given_back: deque[int] = deque()

    @property
    def free_bytes(self) -> int:
        """What is left for further bodies."""
        while self._given_back:
            self._free_bytes += self._given_back.popleft()
        return self._free_bytes

    def hold(self) -> Hold:
        """What the body of one call takes, nothing yet."""
        return Hold(self)

    async def pieces(self, request: Request, hold: Hold, *, copies: int = 1) -> AsyncIterator[bytes]:
        """The body of `request` as it comes, counted into `hold` as often as it is going to be in memory.

        What is announced and has not come is not counted: whoever only announces keeps nobody out.

        Raises:
            HttpError: 413, it is too large; 408, it comes too slowly.
            OverloadedError: the bodies of others leave no room for it now.
            ClientDisconnect: its client went away before the end.
        """
        if self.announced_bytes(request) * copies > self.free_bytes:
            raise _overloaded()
        async for piece in body_pieces(request, max_bytes=self._max_bytes):
            hold.take(len(piece) * copies)
            yield piece

    def announced_bytes(self, request: Request) -> int:
        """What the body is announced to have, as far as it is going to be taken; 0 where it is not announced."""
        stated = request.headers.get("content-length", "")
        return min(int(stated[:20]), self._max_bytes) if stated.isascii() and stated.isdecimal() else 0

    def take(self, size_bytes: int) -> None:
        """So much more is taken. Raises OverloadedError where there is no room for it."""
        if size_bytes > self.free_bytes:
            raise _overloaded()
        self._free_bytes -= size_bytes

    def give_back(self, size_bytes: int) -> None:
        """So much is free again. May be called from any thread, at any point of what another one does."""
        self._given_back.append(size_bytes)


class Hold:
    """What the body of one call takes of that memory while it is read: a context."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._taken_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._uploads.give_back(self._taken_bytes)
        self._taken_bytes = 0

    def take(self, size_bytes: int) -> None:
        """So much more of it has come. Raises OverloadedError where there is no room for it."""
        self._uploads.take(size_bytes)
        self._taken_bytes += size_bytes

    def hand_over(self, images: Iterable[InputImage]) -> None:
        """From now on these images stand for what they take, each until nothing refers to it any more.

        A load whose callers have all gone still needs them.
        """
        for image in images:
            size_bytes = len(image.data or b"")
            self._taken_bytes -= size_bytes
            finalize(image, self._uploads.give_back, size_bytes).atexit = False


def _overloaded() -> OverloadedError:
    return OverloadedError("The uploads of others take all the memory there is for them; try again.")
