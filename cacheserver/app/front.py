"""The gRPC front: the rpcs, and what only they work with."""

from __future__ import annotations

import asyncio
import functools
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random

from prometheus_client import Gauge
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from cacheserver.alarms import Alarms
from cacheserver.app.background import keep_doing
from cacheserver.app.core import Core
from cacheserver.app.delivery import build_image_urls
from cacheserver.app.live import live_view
from cacheserver.app.policies import Policies
from cacheserver.app.routes import build_routes
from cacheserver.app.tiers import CONTROL_TIMEOUT_S
from cacheserver.calls.asking import Asking
from cacheserver.calls.auth import Authenticator
from cacheserver.calls.reception import Reception
from cacheserver.calls.sampling import Sampler
from cacheserver.calls.uploads import UploadMemory
from cacheserver.control.matches import LocalMatches, RedisMatches
from cacheserver.control.prompts import LocalPrompts, RedisPrompts
from cacheserver.generation.images import inspect_in_thread
from cacheserver.http.delivery.partitions import Partitions
from cacheserver.imports import Imports, Inspect
from cacheserver.interfaces import Matches, Prompts
from cacheserver.model import Caller, Permission
from cacheserver.oversight import Oversight
from cacheserver.recall import Recall
from cacheserver.rpc.admin import AdminService
from cacheserver.rpc.admin_images import AdminImages
from cacheserver.rpc.admin_matches import AdminMatches
from cacheserver.rpc.server import Listen, RpcServer
from cacheserver.rpc.service import Limits, PromptCacheService
from cacheserver.warming import Warming
from cacheserver.whatif.recording import FLUSH_S, TraceFile, TraceRecorder

_ANYBODY = Caller("anonymous", frozenset(Permission))


@dataclass(frozen=True, slots=True)
class Front:
    """What callers reach: the server of both gRPC APIs, not started yet, and the routes of HTTP.

    And what of it changes with callers and namespaces.
    """

    rpc: RpcServer
    routes: list[BaseRoute]
    authenticator: Authenticator
    asking: Asking
    policies: Policies
    admin_images: AdminImages
    admin_matches: AdminMatches
    partitions: Partitions


async def build_front(core: Core, *, alarms: Alarms, undo: AsyncExitStack, is_shared: bool = False) -> Front:
    """The two transports over one cache, on ports that other processes may share. Raises ConfigError."""
    settings, clock, books, lower = core.settings, core.clock, core.books, core.lower
    generation, server = settings.generation, settings.server
    prompts = _prompts(core, undo=undo)
    matches = _matches(core, undo=undo)
    prechecks = Policies(clock=clock, undo=undo)
    prechecks.replace(await prechecks.build(settings))
    policies = prechecks.by_namespace
    authenticator = Authenticator(
        settings.caller_tokens,
        anonymous=None if settings.callers else _ANYBODY,
        certified=settings.caller_certificates,
    )
    recall = Recall()
    reception = Reception(
        authenticator=authenticator,
        books=books,
        clock=clock,
        max_in_progress=server.max_concurrent_calls,
        recall=recall,
    )
    asking = Asking(
        cache=core.cache,
        namespaces=settings.namespaces.values(),
        default_model=settings.model,
        books=books,
        clock=clock,
        policies=policies,
        prompts=prompts,
        trace=await _trace(core, undo=undo),
        sampler=Sampler(matches, percent=settings.similarity.review_percent, rng=Random()),  # noqa: S311 - a sample
        gone=(ClientDisconnect,),
    )
    urls = await build_image_urls(core)
    uploads = UploadMemory(server.upload_memory_bytes)
    inspect = functools.partial(
        inspect_in_thread, max_pixels=generation.max_image_pixels, max_bytes=generation.max_image_bytes
    )
    service = PromptCacheService(
        cache=core.cache,
        asking=asking,
        reception=reception,
        books=books,
        inspect=inspect,
        clock=clock,
        limits=Limits(
            batch_in_flight=server.batch_in_flight,
            known_requests=server.known_requests,
            max_image_bytes=generation.max_image_bytes,
        ),
        warming=_warming(core),
        recall=recall,
        uploads=uploads,
        downloads=core.downloads,
        policies=policies,
        figures=core.miss_path.figures,
        live=live_view(core),
        urls=None if urls.public_url is None else urls,
    )
    admin_images = AdminImages(
        _imports(core, inspect), namespaces=settings.namespaces.values(), clock=clock, policies=policies
    )
    oversight = Oversight(coherence=core.coherence, matches=matches)
    admin_matches = AdminMatches(oversight, namespaces=settings.namespaces.values())
    admin = AdminService(
        upstreams=core.miss_path.pool,
        budgets=core.miss_path.budgets,
        ledger=core.miss_path.ledger,
        reviews=core.reviews,
        images=admin_images,
        matches=admin_matches,
        alarms=alarms,
        authenticator=authenticator,
        books=books,
        clock=clock,
        prompts=prompts,
    )
    listen = Listen(
        host=server.grpc_host,
        port=server.grpc_port,
        unix_socket=server.grpc_unix_socket,
        tls_cert_file=server.tls_cert_file,
        tls_key_file=server.tls_key_file,
        tls_client_ca_file=server.tls_client_ca_file,
        is_shared=is_shared,
    )
    rpc = RpcServer(
        service,
        listen=listen,
        tiers=[tier.name for tier in lower.tiers],
        further=[admin],
        max_receive_bytes=server.max_receive_bytes,
        max_connection_age_s=server.max_connection_age_s,
    )
    return Front(
        rpc,
        build_routes(core, asking=asking, reception=reception, urls=urls, uploads=uploads),
        authenticator=authenticator,
        asking=asking,
        policies=prechecks,
        admin_images=admin_images,
        admin_matches=admin_matches,
        partitions=urls.partitions,
    )


def _warming(core: Core) -> Warming:
    return Warming(
        cache=core.cache,
        tiers=core.lower.tiers,
        keeper=core.keeper,
        generation=core.miss_path.generator,
        ledger=core.miss_path.ledger,
        clock=core.clock,
    )


def _imports(core: Core, inspect: Inspect) -> Imports:
    lower = core.lower
    return Imports(
        last=lower.tiers[-1] if lower.tiers else None,
        keeper=core.keeper,
        objects=lower.objects,
        inspect=inspect,
        clock=core.clock,
        max_image_bytes=core.settings.generation.max_image_bytes,
        copier=lower.copier,
        epochs=lower.epochs,
        on_stored=core.cache.matching.add,
    )


def _prompts(core: Core, *, undo: AsyncExitStack) -> Prompts | None:
    """Where prompts are recorded; None if no namespace stores any."""
    names = [namespace.name for namespace in core.settings.namespaces.values() if namespace.store_prompts]
    if not names:
        return None
    if core.lower.control is None:
        return LocalPrompts(namespaces=names, clock=core.clock)
    shared = RedisPrompts(
        client=core.lower.control,
        namespaces=names,
        clock=core.clock,
        prefix=core.settings.redis.prefix,
        timeout_s=CONTROL_TIMEOUT_S,
    )
    shared.start()
    undo.push_async_callback(shared.aclose)
    return shared


def _matches(core: Core, *, undo: AsyncExitStack) -> Matches:
    """Where similar hits are kept for review."""
    if core.lower.control is None:
        return LocalMatches(clock=core.clock)
    shared = RedisMatches(
        client=core.lower.control,
        clock=core.clock,
        prefix=core.settings.redis.prefix,
        timeout_s=CONTROL_TIMEOUT_S,
    )
    shared.start()
    undo.push_async_callback(shared.aclose)
    return shared


async def _trace(core: Core, *, undo: AsyncExitStack) -> TraceRecorder | None:
    """The record of what is answered, if there is to be one. Raises ConfigError for a file that cannot be used."""
    written = core.settings.trace
    if written.path is None:
        return None
    file = await asyncio.to_thread(TraceFile.open, written.path, max_bytes=written.max_bytes)
    recorder = TraceRecorder(file, sample=written.sample, clock=core.clock)
    undo.push_async_callback(recorder.aclose)
    keep_doing(recorder.flush, FLUSH_S, clock=core.clock, name="record trace", undo=undo)
    dropped = Gauge("cacheserver_trace_dropped", "Answers that the trace could not take", registry=core.registry)
    dropped.set_function(lambda: recorder.dropped)
    return recorder
