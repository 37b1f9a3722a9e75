"""What all control state in Redis shares: what may go wrong, and a server that would not keep it."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.exceptions import RedisClusterException, RedisError

from cacheserver.errors import ConfigError
from cacheserver.tiers.redis_client import Client

UNREACHABLE = (RedisError, RedisClusterException, OSError, TimeoutError)
"""What talking to Redis may raise; a Cluster's own exception is no RedisError."""


async def refuse_eviction_of_control_state(client: Client, *, timeout_s: float = 0.5) -> None:
    """Return unless a reachable Redis is set to evict keys without expiry when it is full.

    Raises:
        ConfigError: it is, and would drop control state.
    """
    try:
        async with asyncio.timeout(timeout_s):
            policies = await _eviction_policies(client)
    except UNREACHABLE:
        return  # away: its tier says so
    if evicting := [policy for policy in policies if policy.startswith("allkeys")]:
        raise ConfigError(
            f"redis.url: this Redis has maxmemory-policy {evicting[0]} and would drop control state; "
            "set maxmemory-policy to volatile-lfu"
        )


async def _eviction_policies(client: Client) -> set[str]:
    info: dict[str, Any] = await client.info("memory")
    # A Cluster answers once per node, a single server with the fields themselves.
    nodes = [node for node in info.values() if isinstance(node, dict)] or [info]
    return {str(node.get("maxmemory_policy", "")) for node in nodes}
