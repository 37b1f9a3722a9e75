"""Where a download stands: what to ask for next, and whether what arrived is what was announced. Does no I/O."""

from __future__ import annotations

import hashlib

import grpc

from cacheserver.client.channel import MAX_ATTEMPTS
from cacheserver.client.errors import CacheError, CorruptDownloadError, TryAgainError, UnreachableError
from cacheserver.client.messages import read_image, read_status
from cacheserver.client.values import Chunk, ImageHeader, Progress, State, StreamEvent
from cacheserver.pb import promptcache_pb2 as pb

_FIRST_PAUSE_S = 0.2
"""Before the second call where the service did not say when; twice as long before each further one."""


class Download:
    """One download over as many StreamImage calls as it takes.

    Before the first header a broken call is made again as it was. After it, the picture is asked for by its
    key from where it broke off, pinned to its digest, so that a resumed download never pays and never mixes
    two pictures. With several pictures in one download a break after the first header is final: the API
    resumes single pictures only.
    """

    def __init__(self, request: pb.GetImageRequest) -> None:
        self.request = request
        """What was asked for; a resumed call asks for the key of what it was answered with."""
        self._header: ImageHeader | None = None
        self._received = 0
        self._sha256 = hashlib.sha256()
        self._fruitless = 0
        self._heard = False

    @property
    def resumed(self) -> bool:
        """Whether a call has broken since bytes last arrived; the next one should wait for the connection.

        Not where nothing was heard ever: the caller should know that nobody is there.
        """
        return self._heard and self._fruitless > 0

    @property
    def complete(self) -> bool:
        """Whether all bytes are here, so that a call that broke after the last of them needs no other."""
        return self._header is not None and self._single and 0 < self._header.image.size_bytes == self._received

    def next_request(self) -> pb.StreamImageRequest:
        """The message of the next call."""
        if self._header is None:
            return pb.StreamImageRequest(request=self.request)
        return pb.StreamImageRequest(
            request=pb.GetImageRequest(namespace=self.request.namespace, key=self._header.image.key),
            read_offset=self._received,
            if_digest=self._header.image.digest,
        )

    def read(self, response: pb.StreamImageResponse) -> StreamEvent | None:
        """The event a message stands for; None for the second header of a resumed picture.

        Raises:
            CorruptDownloadError: a picture ended early, or its bytes are not those announced.
        """
        self._heard = True
        match response.WhichOneof("event"):
            case "progress":
                progress = response.progress
                return Progress(
                    keys=tuple(progress.keys),
                    waited_s=progress.waited.ToTimedelta().total_seconds(),
                    estimated_wait_s=progress.estimated_wait.ToTimedelta().total_seconds(),
                )
            case "header":
                return self._begin(response.header)
            case "chunk":
                return self._continue(response.chunk)
            case _:
                return None  # an event of a newer service, which an older client may leave aside

    def pause_s(self, error: CacheError) -> float | None:
        """Seconds to wait before another call after one that ended with `error`; None: there is to be none.

        Calls that bring no bytes are bounded.
        """
        self._fruitless += 1
        if self._fruitless >= MAX_ATTEMPTS:
            return None
        if not self._heard:
            return _pause_s(error, _FIRST_PAUSE_S * 2 ** (self._fruitless - 1))
        if self._header is None and not isinstance(error, UnreachableError):
            return None  # the service itself declined, and asking again could start a second generation
        return _pause_s(error, 0.0) if self._header is None or self._single else None

    def finish(self) -> None:
        """Check the last picture once no more will come.

        Raises:
            CorruptDownloadError: it ended early, or its bytes are not those announced.
        """
        if self._header is None:
            raise _corrupt("the service sent no image")
        if self._header.status.state is not State.READY:
            return
        announced = self._header.image
        if self._received != announced.size_bytes:
            raise _corrupt(f"{self._received} of {announced.size_bytes} bytes arrived")
        if f"sha256:{self._sha256.hexdigest()}" != announced.digest:
            raise _corrupt("the bytes do not have the announced digest")

    @property
    def _single(self) -> bool:
        return not self.request.HasField("n") or self.request.n == 1

    def _begin(self, header: pb.ImageHeader) -> ImageHeader | None:
        begun = ImageHeader(image=read_image(header.image), status=read_status(header.status), index=header.index)
        if self._header is not None and self._single:
            if (begun.image.digest, header.read_offset) != (self._header.image.digest, self._received):
                raise _corrupt("the resumed image is not the one begun")
            return None
        if self._header is not None:
            self.finish()
        self._header, self._received, self._sha256 = begun, 0, hashlib.sha256()
        return begun

    def _continue(self, chunk: bytes) -> Chunk:
        self._fruitless = 0
        self._received += len(chunk)
        self._sha256.update(chunk)
        return Chunk(chunk)


def _pause_s(error: CacheError, otherwise_s: float) -> float | None:
    """How long the service says to wait, or else `otherwise_s`; None where trying again does not help."""
    if not isinstance(error, TryAgainError):
        return None
    return otherwise_s if error.retry_after_s is None else error.retry_after_s


def _corrupt(what: str) -> CorruptDownloadError:
    return CorruptDownloadError(f"damaged download: {what}", code=grpc.StatusCode.DATA_LOSS)
