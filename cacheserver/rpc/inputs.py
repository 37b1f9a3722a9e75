"""Input images of an edit, as messages spell them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from cacheserver.images import content_type_of
from cacheserver.model import InputImage, InputRole
from cacheserver.pb import promptcache_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")

_ROLES: Mapping[int, InputRole] = {
    pb.INPUT_ROLE_UNSPECIFIED: InputRole.IMAGE,
    pb.INPUT_ROLE_IMAGE: InputRole.IMAGE,
    pb.INPUT_ROLE_MASK: InputRole.MASK,
    pb.INPUT_ROLE_STYLE: InputRole.STYLE,
}
_NO_DIGEST = "0" * 64
"""What stands for a digest that could not be read; the violation noted with it keeps it from being used."""


async def reading(inputs: Sequence[pb.InputImage], read: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What `read` returns for these arguments; it runs in a thread if what it reads has input images.

    To digest large ones takes longer than others should wait for their turn.
    """
    return await asyncio.to_thread(read, *args, **kwargs) if inputs else read(*args, **kwargs)


def read_inputs(inputs: Iterable[pb.InputImage], path: str, add: Callable[[str, str], None]) -> tuple[InputImage, ...]:
    """The input images of a spec; `add` notes what is wrong with one under its path.

    They are known by the digests of their bytes, and 24 MiB, the largest message taken if nothing else is said, take
    about 40 ms to digest. What their bytes say they are is looked at; whether they are whole, before anything is made.
    """
    return tuple(_read(message, f"{path}[{index}]", add) for index, message in enumerate(inputs))


def _read(message: pb.InputImage, path: str, add: Callable[[str, str], None]) -> InputImage:
    if message.role not in _ROLES:
        add(f"{path}.role", f"has no value {message.role}")
    role = _ROLES.get(message.role, InputRole.IMAGE)
    match message.WhichOneof("source"):
        case "data":
            data = message.data
            content_type = content_type_of(data)
            if not content_type:
                add(f"{path}.data", "must be a PNG, JPEG or WebP image")
            return InputImage(role, hashlib.sha256(data).hexdigest(), content_type, data)
        case "digest":
            kind, _, digits = message.digest.partition(":")
            # What is no such digest the request itself finds wrong.
            return InputImage(role, digits.lower() if kind == "sha256" else "")
        case _:
            add(path, "data or digest must be set")
            return InputImage(role, _NO_DIGEST)
