"""Who asks: bearer tokens, known by their SHA-256 only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from cacheserver.errors import UnauthenticatedError
from cacheserver.model import Caller

_HELP = "Send `authorization: Bearer <token>` with the token of one of the service's callers."


_MOST_KNOWN, _LONGEST_KNOWN = 1_000, 1_000
"""Headers known at a time, and their length: one header may be written in many ways."""


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
        self._known: dict[str, Caller] = {}
        """Callers by the headers that named them: to take the digest of a token costs as much as the rest of a hit."""

    def known(self, metadata: Mapping[str, str]) -> Caller | None:
        """The caller of a call with this metadata, if it is one that nothing has to be found out about."""
        authorization = metadata.get("authorization")
        if self._anonymous is not None and (authorization is None or not self._callers):
            return self._anonymous
        return None if authorization is None else self._known.get(authorization)

    def authenticate(self, metadata: Mapping[str, str]) -> Caller:
        """The caller whose token is in a call's metadata.

        Raises:
            UnauthenticatedError: there is no token, or one nobody knows.
        """
        if (known := self.known(metadata)) is not None:
            return known
        authorization = metadata.get("authorization")
        if authorization is None:
            raise UnauthenticatedError(f"No token. {_HELP}")
        scheme, _, token = authorization.partition(" ")
        caller = self._callers.get(hashlib.sha256(token.strip().encode()).digest())
        if scheme.lower() != "bearer" or caller is None:
            raise UnauthenticatedError(f"Unknown token. {_HELP}")
        if len(self._known) < _MOST_KNOWN and len(authorization) <= _LONGEST_KNOWN:
            self._known[authorization] = caller
        return caller
