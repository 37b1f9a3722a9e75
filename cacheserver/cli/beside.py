"""What is read beside the import of the service, in a thread: certificates, which takes long and no interpreter."""

from __future__ import annotations

import threading


def read_certificates() -> None:
    """Begin to read the system's certificates, and ours for calls to providers."""
    threading.Thread(target=_read, name="certificates", daemon=True).start()


def _read() -> None:
    # aiohttp, which comes with it, reads the system's twice while it is imported.
    from cacheserver.generation.providers.exchanges import ssl_context  # noqa: PLC0415 - the import is half of the work

    ssl_context()
