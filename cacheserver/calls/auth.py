"""Who asks: bearer tokens, known by their SHA-256 only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from cacheserver.errors import UnauthenticatedError
from cacheserver.model import Caller

_HELP = "Send `authorization: Bearer <token>` with the token of one of the service's callers."


class Authenticator:
    """Tells callers apart by their bearer token.

    Tokens are looked up by their digest in a dict. Its timing tells at most how a digest compares with
    others, which nobody can steer towards a token's digest, so no comparison in constant time is needed.
    """

    def __init__(self, callers: Sequence[tuple[bytes, Caller]], *, anonymous: Caller | None) -> None:
        """`callers` pairs the SHA-256 of a token (32 bytes) with its caller.

        `anonymous` answers every call when there are no callers; with callers, one without a token. None
        turns callers without a token away.
        """
        self._callers = dict(callers)
        self._anonymous = anonymous

    def known(self, metadata: Mapping[str, str]) -> Caller | None:
        """The caller whose token is in a call's metadata; None if there is none, or one nobody knows."""
        authorization = metadata.get("authorization")
        if self._anonymous is not None and (authorization is None or not self._callers):
            return self._anonymous
        if authorization is None:
            return None
        scheme, _, token = authorization.partition(" ")
        return (
            self._callers.get(hashlib.sha256(token.strip().encode()).digest()) if scheme.lower() == "bearer" else None
        )

    def authenticate(self, metadata: Mapping[str, str]) -> Caller:
        """The caller whose token is in a call's metadata.

        Raises:
            UnauthenticatedError: there is no token, or one nobody knows.
        """
        caller = self.known(metadata)
        if caller is None:
            raise UnauthenticatedError(f"{'Unknown' if 'authorization' in metadata else 'No'} token. {_HELP}")
        return caller
