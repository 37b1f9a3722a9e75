"""SIGHUP: callers, namespaces, budgets, prices and upstreams as the file has them now, without a restart.

All of it comes into force at once, or none: what can fail is done before anything is changed. Calls under way keep what
they began with. What of the file cannot be brought into force is named, and stays as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from cacheserver.app.core import Core
from cacheserver.app.front import Front
from cacheserver.app.miss_path import changed_lanes, check_upper_bounds, last_month_s, load_prices
from cacheserver.errors import CacheServerError, ConfigError
from cacheserver.identity import load_dictionary
from cacheserver.settings import Settings
from cacheserver.settings.changes import needing_restart

_log = structlog.get_logger(__name__)


class Reloading:
    """Brings a changed configuration into force. `reload` it."""

    def __init__(self, load: Callable[[], Settings], *, core: Core, front: Front) -> None:
        """`load` reads the settings anew; it raises ConfigError, and may take its time: it is called in a thread."""
        self._load = load
        self._core = core
        self._front = front
        self._settings = core.settings
        self._one_at_a_time = asyncio.Lock()
        self._metrics = _Metrics(core.registry, now_s=core.clock.now_s)

    async def reload(self) -> None:
        """Bring what the file says now into force; one that cannot be used leaves everything as it is. Never raises."""
        async with self._one_at_a_time:
            try:
                settings = await asyncio.to_thread(self._load)
                restart_for = await self._bring_into_force(settings)
            except (ConfigError, CacheServerError) as error:
                self._metrics.failed()
                _log.error("config_not_reloaded", error=str(error), text="what was in force before still is")
                return
            self._metrics.succeeded()
            _log.info("config_reloaded", restart_needed_for=", ".join(restart_for) or "nothing")

    async def _bring_into_force(self, settings: Settings) -> list[str]:
        """What of it needs a restart. Raises ConfigError or CacheServerError with nothing changed."""
        core, front, miss_path = self._core, self._front, self._core.miss_path
        restart_for = needing_restart(core.settings, settings)
        if bool(settings.callers) != bool(core.settings.callers):
            # Whether whoever connects may call at all is no matter for a slip in a file.
            raise ConfigError("callers: the first and the last one come and go with a restart; restart the service")
        prices = await load_prices(settings)
        check_upper_bounds(settings, prices)
        lanes = changed_lanes(
            self._settings,
            settings,
            miss_path.pool,
            started=core.settings,
            prices=prices,
            are_repriced=prices != miss_path.generator.prices,
            clock=core.clock,
        )
        spent = await miss_path.ledger.sums(last_month_s(core.clock))
        prechecks = await front.policies.build(settings)
        if any(namespace.corrects_typos for namespace in settings.namespaces.values()):
            await asyncio.to_thread(load_dictionary)
        # No await from here to the end: no call meets half of it.
        namespaces = settings.namespaces.values()
        front.authenticator.replace(settings.caller_tokens, certified=settings.caller_certificates)
        front.asking.replace(namespaces)
        front.policies.replace(prechecks)
        front.admin_images.replace(namespaces)
        front.admin_matches.replace(namespaces)
        front.partitions.replace(namespaces)
        core.reviews.replace(namespaces)
        miss_path.budgets.replace(settings.budgets, spent)
        miss_path.generator.replace(prices, lanes)
        self._settings = settings
        return restart_for


class _Metrics:
    def __init__(self, registry: CollectorRegistry, *, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._reloads = Counter("cacheserver_config_reloads", "Reloads of the file", ["result"], registry=registry)
        for result in ("ok", "failed"):
            self._reloads.labels(result)
        name = "cacheserver_config_reload_last_success_timestamp_seconds"
        self._last = Gauge(name, "When the configuration in force was read, since 1970", registry=registry)
        self._last.set(now_s())

    def succeeded(self) -> None:
        self._reloads.labels("ok").inc()
        self._last.set(self._now_s())

    def failed(self) -> None:
        self._reloads.labels("failed").inc()
