"""Images by URL: what their URLs are signed with, and the routes they lead to."""

from __future__ import annotations

import asyncio

from cacheserver.app.core import Core
from cacheserver.http.delivery.partitions import Partitions
from cacheserver.http.delivery.secret import own_secrets, read_secrets
from cacheserver.http.delivery.urls import ImageUrls
from cacheserver.settings import Settings


async def build_image_urls(core: Core) -> ImageUrls:
    """URLs of the pictures of this service. Raises ConfigError for a secret that cannot be had."""
    written = core.settings.delivery
    return ImageUrls(
        await _secrets(core.settings),
        partitions=Partitions(core.settings.namespaces.values()),
        expires_s=written.url_expires_s,
        clock=core.clock,
        public_url=None if written.public_url is None else str(written.public_url),
    )


async def _secrets(settings: Settings) -> list[bytes]:
    written = settings.delivery
    if written.url_secret is not None:
        return [written.url_secret.get_secret_value().encode()]
    if written.url_secret_file is not None:
        return await asyncio.to_thread(read_secrets, written.url_secret_file)
    return await asyncio.to_thread(own_secrets, settings.data_dir)
