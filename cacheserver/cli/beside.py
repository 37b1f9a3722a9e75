"""What is read beside the import of the service, in a thread: certificates, which takes long and no interpreter."""

from __future__ import annotations

import threading


def read_certificates() -> None:
    """Begin to import what reads the system's certificates as it is imported, and to read those for our own calls."""
    threading.Thread(target=_read, name="certificates", daemon=True).start()


def _read() -> None:
    import aiohttp  # noqa: F401, PLC0415 - importing it is the work

    from cacheserver.generation.providers.exchanges import ssl_context  # noqa: PLC0415 - as above

    ssl_context()
