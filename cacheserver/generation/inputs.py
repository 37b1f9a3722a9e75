"""The input images of an edit, looked at before anything is spent on it."""

from __future__ import annotations

import asyncio

from cacheserver.errors import InvalidRequestError
from cacheserver.generation.images import inspect
from cacheserver.images import BadImageError
from cacheserver.model import ImageRequest, InputImage

_AT_A_TIME = 2
"""Requests whose images are decoded at a time: one of 40 megapixels takes 160 MB while it is."""


class Inputs:
    """Tells whether a request's input images can be what an edit starts from."""

    def __init__(self, *, max_bytes: int, max_pixels: int) -> None:
        """Both are for each image."""
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._turn = asyncio.Semaphore(_AT_A_TIME)

    async def check(self, request: ImageRequest) -> None:
        """Return if each input image, all of whose bytes are there, is a whole one of its type.

        Raises:
            InvalidRequestError: some are not; it names them all.
        """
        if not request.inputs:
            return
        async with self._turn:
            problems = await asyncio.to_thread(self._problems, request.inputs)
        if problems:
            raise InvalidRequestError(problems)

    def _problems(self, inputs: tuple[InputImage, ...]) -> dict[str, str]:
        found = ((f"spec.inputs[{index}].data", self._problem(image)) for index, image in enumerate(inputs))
        return {path: problem for path, problem in found if problem}

    def _problem(self, image: InputImage) -> str:
        try:
            facts = inspect(image.data or b"", max_pixels=self._max_pixels, max_bytes=self._max_bytes)
        except BadImageError as error:
            return str(error)
        if facts.sha256 != image.sha256:
            raise AssertionError("a request's input images count by the digests of their bytes")
        is_other = facts.content_type != image.content_type
        return f"the image is {facts.content_type}; it was said to be {image.content_type}" if is_other else ""


def size_of_inputs(request: ImageRequest) -> int:
    """How many bytes the request's input images have."""
    return sum(len(image.data or b"") for image in request.inputs)
