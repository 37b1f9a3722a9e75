"""Who asks: bearer tokens, known by their digests only, and whom clients' certificates name."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cacheserver.errors import UnauthenticatedError
from cacheserver.model import Caller

_HELP = "Send `authorization: Bearer <token>` with the token of one of the service's callers."


CERTIFIED = "Certified-As"
"""In a call's metadata: whom its connection's certificate names, a line each. No caller can send a capital letter."""

_MOST_LATELY = 1_000


class Authenticator:
    """Tells callers apart by their bearer token.

    Tokens are looked up by their digests in dicts. Its timing tells at most how a digest compares with
    others, which nobody can steer towards a token's digest, so no comparison in constant time is needed.
    """

    def __init__(
        self,
        callers: Sequence[tuple[bytes, Caller]],
        *,
        anonymous: Caller | None,
        certified: Mapping[str, Caller] = MappingProxyType({}),
    ) -> None:
        """`callers` pairs the SHA-256 of a token (32 bytes) with its caller; `certified` are those certificates name.

        `anonymous` answers every call when there are no callers; with callers, one without a token. None
        turns callers without a token away.
        """
        self._callers = dict(callers)
        self._certified = dict(certified)
        self._anonymous = anonymous
        self._lately: dict[bytes, Caller] = {}
        """Callers by the keyed BLAKE2s of what they sent: OpenSSL's SHA-256 of it alone is a thirtieth of a hit."""
        self._key = secrets.token_bytes(hashlib.blake2s.MAX_KEY_SIZE)

    def replace(self, callers: Sequence[tuple[bytes, Caller]], *, certified: Mapping[str, Caller]) -> None:
        """From now on these are the callers. Every `Caller` is a new one: what is known of calls is so by theirs."""
        self._callers = dict(callers)
        self._certified = dict(certified)
        self._lately.clear()
        if self._anonymous is not None:
            self._anonymous = dataclasses.replace(self._anonymous)

    @property
    def knows_certificates(self) -> bool:
        """Whether there are callers that a certificate names."""
        return bool(self._certified)

    def known(self, metadata: Mapping[str, str]) -> Caller | None:
        """The caller whose token is in a call's metadata; without a token, whom the certificate names. None: nobody."""
        authorization = metadata.get("authorization")
        if self._anonymous is not None and (authorization is None or not self._callers):
            return self._anonymous
        if authorization is None:
            names = metadata.get(CERTIFIED, "").splitlines()
            return next((self._certified[name] for name in names if name in self._certified), None)
        sent = hashlib.blake2s(authorization.encode(), key=self._key).digest()
        return self._lately.get(sent) or self._find(authorization, sent)

    def _find(self, authorization: str, sent: bytes) -> Caller | None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        caller = self._callers.get(hashlib.sha256(token.strip().encode()).digest())
        if caller is not None:
            if len(self._lately) >= _MOST_LATELY:
                self._lately.clear()
            self._lately[sent] = caller
        return caller

    def authenticate(self, metadata: Mapping[str, str]) -> Caller:
        """The caller whose token is in a call's metadata.

        Raises:
            UnauthenticatedError: there is no token, or one nobody knows, and no certificate that names a caller.
        """
        caller = self.known(metadata)
        if caller is None:
            if CERTIFIED in metadata and "authorization" not in metadata:
                raise UnauthenticatedError(
                    f"The certificate names none of the service's callers, and no token. {_HELP}"
                )
            raise UnauthenticatedError(f"{'Unknown' if 'authorization' in metadata else 'No'} token. {_HELP}")
        return caller
