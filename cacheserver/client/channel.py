"""How the client connects: address, TLS, token, retries, limits."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Sequence
from typing import Final

import grpc

from cacheserver.pb import promptcache_pb2 as pb

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"

MAX_ATTEMPTS: Final = 4
"""How often a call is made in all before its UNAVAILABLE reaches the caller."""

RETRY_FIRST_S: Final = 0.2
"""About how long after a failed attempt the second one is made, where the service does not say."""

RETRY_LONGEST_S: Final = 5.0
"""The pause doubles from one attempt to the next, up to this."""

RETRY_TOKENS: Final = 10
"""The throttle stops retries of a client most of whose calls fail, so that a sick service is not kept sick: a failure
takes one of these tokens, and no call is repeated while only half of them are left."""

RETRY_TOKENS_A_SUCCESS: Final = 0.1
"""What a success gives back."""

MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""Largest answer accepted in one message: ten inline images of the default limit, and room to raise it."""

ROUTE_HEADER: Final = "x-promptcache-route"
"""The header that scripts/deploy/envoy.yaml picks a replica by."""

_SERVICE: Final = "promptcache.v1.PromptCacheService"
_REPEATED: Final = ("GetImage", "FindCached", "PutImage", "PurgeImages", "ExplainKey", "GetStats", "ExplainCall")
"""Those that answer one message. A stream that a retry policy covers and whose connection breaks before its first
answer never ends where nobody can be connected to then, not even at its deadline (grpcio 1.85, sync calls alone)."""

# UNAVAILABLE is the one code that says "try again"; pushback from the service replaces the backoff.
_SERVICE_CONFIG: Final = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE, "method": method} for method in _REPEATED],
            "retryPolicy": {
                "maxAttempts": MAX_ATTEMPTS,
                "initialBackoff": f"{RETRY_FIRST_S:g}s",
                "maxBackoff": f"{RETRY_LONGEST_S:g}s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": RETRY_TOKENS, "tokenRatio": RETRY_TOKENS_A_SUCCESS},
}

_FIT_FOR_A_LOG: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

CHANNEL_OPTIONS: Final[Sequence[tuple[str, str | int]]] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

IMPATIENT_OPTIONS: Final[Sequence[tuple[str, str | int]]] = (
    *CHANNEL_OPTIONS,
    ("grpc.min_reconnect_backoff_ms", 3_000),  # also the time to connect, 20 s if not given
)
"""For a client that knows what to do while nobody answers."""


def credentials(
    *, tls: bool, root_certificates: bytes | None, certificate: tuple[bytes, bytes] | None
) -> grpc.ChannelCredentials | None:
    """Credentials for a TLS connection; None for a plain one.

    Args:
        tls: Use TLS. Implied by the others.
        root_certificates: PEM certificates to trust instead of the usual authorities.
        certificate: The PEM certificate to show, and its key.
    """
    if not tls and root_certificates is None and certificate is None:
        return None
    shown, key = certificate or (None, None)
    return grpc.ssl_channel_credentials(root_certificates, key, shown)


def call_metadata(token: str | None) -> Sequence[tuple[str, str]]:
    """What every call carries beside its message."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def route_metadata(request: object) -> Sequence[tuple[str, str]]:
    """What a proxy picks the replica by, so that a picture is in the memory of one of them and not of all.

    Equal namespaces and prompts, as written, have equal values: SHA-256 of both with a line feed between. Nothing for
    what is no single picture's request, or names its picture by the key: any replica will do.
    """
    if not isinstance(request, pb.GetImageRequest) or not request.HasField("spec"):
        return ()
    text = f"{request.namespace}\n{request.spec.prompt}"
    return ((ROUTE_HEADER, hashlib.sha256(text.encode()).hexdigest()),)


def call_id() -> str:
    """A new x-request-id: the service knows the call by it."""
    return uuid.uuid4().hex


def item_id(stream_id: str, request_id: str, number: int) -> str:
    """The x-request-id by which the service knows the item of this number, from 1, of a stream."""
    return f"{stream_id}/{request_id if _FIT_FOR_A_LOG.fullmatch(request_id) else f'?{number}'}"
