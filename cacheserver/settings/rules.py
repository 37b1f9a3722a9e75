"""What must hold between settings, and what is worth a warning."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from cacheserver.errors import ConfigError
from cacheserver.identity import QUALITIES
from cacheserver.model import PARTITION_PATTERN, REVIEW_PREFIX, Namespace, TierName
from cacheserver.settings.schema import PAINTER, STORING_TIERS, Settings, is_loopback

_USUAL_LATENCY_S = 20
"""What an image of medium or high quality takes at most providers."""


def check_rules(settings: Settings) -> None:
    """Return if the settings can work together.

    Raises:
        ConfigError: one line that names a setting, what is wrong and how to mend it.
    """
    for rule in _RULES:
        rule(settings)


def warnings(settings: Settings) -> list[str]:
    """What works and may not be meant, a line each."""
    server = settings.server
    lines = [
        *_in_the_clear(settings, "grpc_host", server.grpc_host, "tls_cert_file", server.tls_cert_file),
        *_in_the_clear(settings, "http_host", server.http_host, "http_tls_cert_file", server.http_tls_cert_file),
    ]
    if settings.insecure:
        lines.append("insecure: whoever can connect may use, fill and purge the cache and spend money")
    if settings.redis.url is not None and settings.delivery.url_secret is None is settings.delivery.url_secret_file:
        lines.append(
            "delivery.url_secret_file: not set, so each service on this Redis signs URLs with a secret of its own, "
            "which the others refuse; give all of them the same if there are several"
        )
    if settings.redis.url is None and settings.redis.embedded and not settings.serves_loopback_only:
        lines.append("redis.url: not set, and our own Valkey runs only on loopback: no Redis level")
    lines += filter(None, (_never_stale(namespace) for namespace in settings.namespaces.values()))
    lines += filter(None, (_few_places(settings, name) for name in settings.limit_groups))
    return lines


def _in_the_clear(settings: Settings, setting: str, host: str, wanted: str, cert: Path | None) -> list[str]:
    """What is to be said of an address that others can reach and listen to."""
    if is_loopback(host) or cert is not None:
        return []
    what = "callers' tokens travel" if settings.callers else "everything travels"
    return [f"server.{setting}: without {wanted} {what} in the clear; fine only behind a proxy that does TLS"]


def _never_stale(namespace: Namespace) -> str | None:
    """What is to be said of a namespace that serves what is past its end, where most has none."""
    if not namespace.stale_s or namespace.lifetime_s(None) is not None:
        return None
    setting = "stale_while_revalidate_s" if namespace.stale_while_revalidate_s else "stale_if_error_s"
    return f"namespaces.{namespace.name}.{setting}: without ttl_s an image has no end unless its caller says ttl"


def _few_places(settings: Settings, name: str) -> str | None:
    """What is to be said of a limit group whose places, not its rate, decide how many images it makes."""
    group = settings.limit_groups[name]
    places = group.concurrent * (1 - settings.generation.interactive_share)
    per_minute = math.floor(places * 60 / _USUAL_LATENCY_S)
    if group.images_per_minute is None or per_minute >= group.images_per_minute:
        return None
    return (
        f"limit_groups.{name}.concurrent: {group.concurrent} calls at a time make {per_minute} images a minute where "
        f"each takes {_USUAL_LATENCY_S} s, less than images_per_minute allows; raise it if the provider takes more"
    )


def _upstream_is_there(settings: Settings) -> None:
    if not settings.upstreams:
        raise ConfigError(
            "upstreams: there is none; set OPENAI_API_KEY or add [[upstreams]] (the painter's placeholders are only "
            "for a loopback service without callers and without a Redis or bucket of yours)"
        )


def _painter_is_harmless(settings: Settings) -> None:
    for index, upstream in enumerate(settings.upstreams):
        alone = len(settings.upstreams) == 1 and settings.is_a_trial
        if upstream.kind == PAINTER and not (alone and list(upstream.models) == [PAINTER]):
            raise ConfigError(
                f"upstreams[{index}].kind: the painter draws placeholders; it runs only as model painter, with no "
                "other upstream, no callers, no Redis or bucket of yours and on loopback; remove it or those"
            )


def _upstreams_are_distinct(settings: Settings) -> None:
    names = [each.name for each in settings.upstreams]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"upstreams[{index}].name: another upstream is called {name}; give each its own name")


def _limit_groups_are_used(settings: Settings) -> None:
    used = sorted({each.group for each in settings.upstreams})
    for name in settings.limit_groups:
        if name not in used:
            raise ConfigError(
                f"limit_groups.{name}: no upstream is in this group (there {_are(used)}); "
                "set the upstream's limit_group, or rename the table"
            )


def _partitions_leave_room_for_review(settings: Settings) -> None:
    for name, each in settings.namespaces.items():
        if each.partition.startswith(REVIEW_PREFIX):
            raise ConfigError(
                f"namespaces.{name}.partition: may not begin with {REVIEW_PREFIX}, where reviews wait; rename it"
            )
        if each.min_score is not None and not PARTITION_PATTERN.fullmatch(REVIEW_PREFIX + each.partition):
            raise ConfigError(
                f"namespaces.{name}.min_score: needs a partition of at most {63 - len(REVIEW_PREFIX)} characters; "
                "shorten it"
            )


def _what_the_bucket_removes_has_an_end(settings: Settings) -> None:
    for name, each in settings.namespaces.items() if settings.s3.lifecycle_rule else ():
        if each.max_ttl_s is None:
            raise ConfigError(
                f"namespaces.{name}.max_ttl_s: not set, so its images may have no end, and s3.lifecycle_rule "
                "would remove them; set it, or lifecycle_rule = false"
            )


def _ladder_can_be_walked(settings: Settings) -> None:
    for index, rung in enumerate(settings.generation.ladder):
        model, _, quality = rung.rpartition(":")
        if quality not in QUALITIES or (model and model not in settings.model_names):
            raise ConfigError(
                f"generation.ladder[{index}]: {rung} should be a quality, or model:quality of a model that is served "
                f"(there {_are(settings.model_names)})"
            )


def _uses_have_qualities(settings: Settings) -> None:
    for name, each in settings.namespace_settings.items():
        for use, quality in each.quality_by_use.items():
            if quality not in QUALITIES:
                raise ConfigError(
                    f"namespaces.{name}.quality_by_use.{use}: {quality} is no quality; "
                    f"take one of {', '.join(QUALITIES)}"
                )


def _default_models_are_served(settings: Settings) -> None:
    wanted = {"default_model": settings.default_model} | {
        f"namespaces.{name}.default_model": each.default_model for name, each in settings.namespace_settings.items()
    }
    for setting, model in wanted.items():
        if model is not None and model not in settings.model_names:
            raise ConfigError(
                f"{setting}: no upstream serves {model}; there {_are(settings.model_names)}; "
                "name one of them, or add it to an upstream's models"
            )


def _callers_guard_the_door(settings: Settings) -> None:
    if settings.callers or settings.insecure or settings.serves_loopback_only:
        return
    name = "grpc_host" if not is_loopback(settings.server.grpc_host) else "http_host"
    raise ConfigError(
        f"server.{name}: {getattr(settings.server, name)} can be reached from other machines and there are no callers; "
        "add [[callers]], bind to 127.0.0.1, or set insecure = true"
    )


def _callers_are_distinct(settings: Settings) -> None:
    for setting, what in (("name", "name"), ("token_sha256", "token"), ("certificate", "certificate")):
        values = [getattr(each, setting) for each in settings.callers]
        for index, value in enumerate(values):
            if value is not None and value in values[:index]:
                raise ConfigError(f"callers[{index}].{setting}: another caller has this {what}; give each its own")


def _certificates_are_asked_for(settings: Settings) -> None:
    for index, caller in enumerate(settings.callers):
        if caller.certificate is not None and settings.server.tls_client_ca_file is None:
            raise ConfigError(
                f"callers[{index}].certificate: nobody is asked for one; set server.tls_client_ca_file, or a token"
            )


def _callers_namespaces_exist(settings: Settings) -> None:
    for index, caller in enumerate(settings.callers):
        for name in set(caller.namespaces) - set(settings.namespaces) - {"*"}:
            raise ConfigError(
                f"callers[{index}].namespaces: there is no namespace {name}; add [namespaces.{name}] "
                f"(there {_are(sorted(settings.namespaces))})"
            )


def _alarms_can_be_watched(settings: Settings) -> None:
    names = [each.name for each in settings.alarms]
    targets = [*settings.tier_names[1:], *(each.name for each in settings.upstreams)]
    for index, alarm in enumerate(settings.alarms):
        if alarm.name in names[:index]:
            raise ConfigError(f"alarms[{index}].name: another alarm is called {alarm.name}; give each its own name")
        if alarm.namespace is not None and alarm.namespace not in settings.namespaces:
            raise ConfigError(
                f"alarms[{index}].namespace: there is no namespace {alarm.namespace}; add "
                f"[namespaces.{alarm.namespace}] (there {_are(sorted(settings.namespaces))})"
            )
        if alarm.target is not None and alarm.target not in targets:
            raise ConfigError(
                f"alarms[{index}].target: no tier under memory and no upstream is called {alarm.target}; "
                f"there {_are(targets)}"
            )


def _webhook_token_can_be_sent(settings: Settings) -> None:
    token = settings.alerting.webhook_token
    if token is None:
        return
    if settings.alerting.webhook_url is None:
        raise ConfigError("alerting.webhook_token: is set and webhook_url is not; set it, or remove the token")
    if not (token.get_secret_value().isascii() and token.get_secret_value().isprintable()):
        raise ConfigError("alerting.webhook_token: has characters that no header may carry; write it anew")


def _tiers_are_in_order(settings: Settings) -> None:
    names = settings.tier_names
    if list(names) != [tier for tier in STORING_TIERS if tier in names] or TierName.MEMORY not in names:
        raise ConfigError('tiers: should begin with "memory" and be in the order "memory", "redis", "disk", "s3"')


def _tiers_can_be_had(settings: Settings) -> None:
    names = settings.tier_names
    if TierName.S3 in names and not (settings.s3.bucket or settings.s3.local):
        raise ConfigError('tiers: has "s3" and s3.bucket is not set; set it, or take "s3" out')
    if TierName.S3 not in names and settings.s3.bucket:
        raise ConfigError('tiers: lacks "s3" and s3.bucket is set; add "s3", or remove s3.bucket')
    if TierName.REDIS in names and settings.redis.url is None and not settings.runs_own_valkey:
        raise ConfigError(
            'tiers: has "redis", redis.url is not set and our own Valkey needs redis.embedded and loopback; '
            'set redis.url, or take "redis" out'
        )


def _workers_share_what_lies_below(settings: Settings) -> None:
    names = settings.tier_names
    if settings.server.workers > 1 and (TierName.REDIS not in names or names[-1] is not TierName.S3):
        raise ConfigError(
            "server.workers: several share budgets and leases through Redis and pictures through S3, and a directory "
            "has one owner; set redis.url (or leave it to our own Valkey) and s3.bucket (or --local-s3), or workers = 1"
        )


def _tls_files_are_there(settings: Settings) -> None:
    for name in ("tls_cert_file", "tls_key_file", "tls_client_ca_file", "http_tls_cert_file", "http_tls_key_file"):
        file = getattr(settings.server, name)
        if file is not None and not os.access(file, os.R_OK):
            raise ConfigError(f"server.{name}: {file} cannot be read; mend the path or its permissions")


_RULES = (
    _callers_guard_the_door,
    _upstream_is_there,
    _callers_are_distinct,
    _certificates_are_asked_for,
    _callers_namespaces_exist,
    _tiers_are_in_order,
    _tiers_can_be_had,
    _workers_share_what_lies_below,
    _painter_is_harmless,
    _upstreams_are_distinct,
    _limit_groups_are_used,
    _default_models_are_served,
    _partitions_leave_room_for_review,
    _what_the_bucket_removes_has_an_end,
    _ladder_can_be_walked,
    _uses_have_qualities,
    _tls_files_are_there,
    _alarms_can_be_watched,
    _webhook_token_can_be_sent,
)


def _are(names: Sequence[str]) -> str:
    return f"is {names[0]}" if len(names) == 1 else f"are {', '.join(names)}"
