"""Large bodies, counted as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request

from cacheserver.calls.uploads import Hold, UploadMemory
from cacheserver.http.body import body_pieces


class Uploads:
    """Reads bodies into the memory there is for all of them."""

    def __init__(self, memory: UploadMemory, *, max_bytes: int) -> None:
        """One body may have `max_bytes`."""
        self._memory = memory
        self._max_bytes = max_bytes

    def hold(self) -> Hold:
        """What the body of one call takes, nothing yet."""
        return self._memory.hold()

    async def pieces(self, request: Request, hold: Hold, *, copies: int = 1) -> AsyncIterator[bytes]:
        """The body of `request` as it comes, counted into `hold` as often as it is going to be in memory.

        What is announced and has not come is not counted: whoever only announces keeps nobody out.

        Raises:
            HttpError: 413, it is too large; 408, it comes too slowly.
            OverloadedError: the bodies of others leave no room for it now.
            ClientDisconnect: its client went away before the end.
        """
        self._memory.check(self._announced_bytes(request) * copies)
        async for piece in body_pieces(request, max_bytes=self._max_bytes):
            hold.take(len(piece) * copies)
            yield piece

    def _announced_bytes(self, request: Request) -> int:
        """What the body is announced to have, as far as it is going to be taken; 0 where it is not announced."""
        stated = request.headers.get("content-length", "")
        return min(int(stated[:20]), self._max_bytes) if stated.isascii() and stated.isdecimal() else 0
