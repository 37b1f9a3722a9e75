"""The canonical identity of a request, its hashes, and the cache key made of them.

The canonical identity is a JSON array of two: the profile's name and version, and an object with every field
of ImageRequest, the prompt normalized. Its JSON is canonical: keys sorted by code point, no white space, UTF-8
unescaped, equal numbers written alike. Two requests have the same identity if and only if these bytes are equal.
The partition is part of the key and not of the identity, so who shares can change without new fingerprints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import xxhash

from cacheserver.identity.canonical import CANONICAL_VERSION, canonical_form
from cacheserver.identity.normalize import Profile
from cacheserver.identity.typos import corrected
from cacheserver.identity.versions import VERSIONS, Version, answers_all
from cacheserver.model import (
    CacheKey,
    Identity,
    ImageRequest,
    InputImage,
    JsonValue,
    MatchLevel,
    Namespace,
)

CANONICAL = Profile("canonical", CANONICAL_VERSION, MatchLevel.CANONICAL)
"""The profile of canonical keys, which name no picture: an alias says which identity's pictures answer for them."""

_LOSSY_FORMATS = frozenset({"jpeg", "webp"})
_FIELDS = tuple(field.name for field in fields(ImageRequest))
_INPUT_FIELDS = tuple(field.name for field in fields(InputImage) if field.compare)
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))

PLAIN_FIELDS = tuple(name for name in _FIELDS if name not in {"prompt", "extra", "inputs"})
"""The fields with short values, which many requests have in common."""

plain_values = attrgetter(*PLAIN_FIELDS)
"""The values of a request's PLAIN_FIELDS."""


Named: TypeAlias = tuple[str, bytes, bytes, str, bytes]
"""What names a prompt's picture: name, digest and fingerprint of its key, the prompt normalized, canonical bytes."""


class Identifier:
    """Identifies validated requests that differ in nothing but their prompt. All else of them is written once."""

    def __init__(self, request: ImageRequest, namespace: Namespace, match_level: MatchLevel | None = None) -> None:
        """`request` is one of them, whatever its prompt; `namespace` and `match_level` are those of `identify`.

        Raises:
            KeyError: the namespace's profile does not exist.
            ValueError: the request holds what `validate` refuses.
        """
        self._partition = namespace.partition
        version = VERSIONS[namespace.identity_version]
        self._normalize = version.normalize
        self._profile = profile = _profile(version, namespace, match_level)
        self._patterns = _patterns(namespace, profile)
        self._before, self._after = _around_prompt(request, profile, self._patterns)

    def identity(self, prompt: str) -> Identity:
        """The identity of the one with this prompt, with the key of variant 0; ValueError as that of `identify`."""
        return self.identity_of(prompt, self.named(prompt))

    def named(self, prompt: str) -> Named:
        """What `identity` finds out of the one with this prompt, for whoever may need no more; ValueError as there."""
        normalized = self._normalize(prompt, self._profile.name, self._patterns)
        canonical = f"{self._before}{_JSON.encode(normalized)}{self._after}".encode()
        fingerprint, digest = fingerprint_of(canonical), digest_of(canonical)
        return CacheKey.name_of(self._partition, fingerprint, digest, 0), digest, fingerprint, normalized, canonical

    def identity_of(self, prompt: str, named: Named) -> Identity:
        """The identity of the one with this prompt, which `named` told."""
        _, digest, fingerprint, normalized, canonical = named
        return Identity(
            key=CacheKey(self._partition, fingerprint, digest, variant=0),
            level=self._profile.level,
            profile=self._profile.versioned,
            normalized_prompt=normalized,
            canonical=canonical,
            prompt_digest=digest_of(prompt.encode()),
        )


def identify(request: ImageRequest, namespace: Namespace, match_level: MatchLevel | None = None) -> Identity:
    """The identity of a validated request under the namespace's profile, with the key of variant 0.

    A `match_level` tighter than the namespace's profile keys the request by the tighter profile; a looser one
    or None changes nothing.

    Raises:
        KeyError: the namespace's profile does not exist.
        ValueError: a catalog pattern cannot be used, or the request holds what `validate` refuses.
    """
    return Identifier(request, namespace, match_level).identity(request.prompt)


def key_of(request: ImageRequest, namespace: Namespace, variant: int) -> CacheKey:
    """The key that `identify` gives a request's `variant`, for whoever wants nothing else of its identity."""
    version = VERSIONS[namespace.identity_version]
    profile = version.profiles[namespace.profile]
    patterns = _patterns(namespace, profile)
    canonical = _canonical(request, profile, version.normalize(request.prompt, profile.name, patterns), patterns)
    return CacheKey(namespace.partition, fingerprint_of(canonical), digest_of(canonical), variant)


class OtherIdentity(NamedTuple):
    """The identity of a request under another version.

    `answers_all`: what lies under its key answers the request whatever prompt it was made from.
    """

    identity: Identity
    answers_all: bool


def other_identities(request: ImageRequest, identity: Identity, namespace: Namespace) -> list[OtherIdentity]:
    """What a request with this identity has for one under the other versions that are known, newest first.

    Those that key it alike count once.
    """
    written = namespace.identity_version
    seen, found = {identity.key}, list[OtherIdentity]()
    for version in sorted(VERSIONS.keys() - {written}, reverse=True):
        other = identify(request, replace(namespace, identity_version=version), identity.level)
        if other.key not in seen:
            seen.add(other.key)
            found.append(OtherIdentity(other, answers_all(version, written)))
    return found


def lasting_name(request: ImageRequest, identity: Identity, namespace: Namespace) -> str:
    """What stands for a request's identity in replicas that write different versions: its name under the oldest.

    Where a release no longer knows the oldest it has another one, and two replicas may pay for what both miss at once.
    """
    if namespace.identity_version == (oldest := min(VERSIONS)):
        return identity.key.identity_name
    return identify(request, replace(namespace, identity_version=oldest), identity.level).key.identity_name


def key_of_alike(identity: Identity, request: ImageRequest) -> CacheKey:
    """The key of another validated request with the prompt of the one that has this identity, of the same variant.

    What `identify` would say, without normalizing the prompt again, which takes most of the time.
    """
    profiles = (profile for version in VERSIONS.values() for profile in version.profiles.values())
    profile = next(profile for profile in profiles if profile.versioned == identity.profile)
    patterns: list[str] = []
    if profile.level is MatchLevel.CATALOG:
        patterns = json.loads(identity.canonical)[1]["catalog_patterns"]
    canonical = _canonical(request, profile, identity.normalized_prompt, tuple(patterns))
    return replace(identity.key, fingerprint=fingerprint_of(canonical), digest=digest_of(canonical))


def canonical_prompt(prompt: str, namespace: Namespace) -> str | None:
    """The canonical form of a prompt as the namespace has it; None where there is none."""
    form = canonical_form(prompt, ignore_quality_words=namespace.ignore_quality_words)
    return corrected(form) if form is not None and namespace.corrects_typos else form


def canonical_key(request: ImageRequest, namespace: Namespace) -> CacheKey | None:
    """The key that a validated request shares with all that ask for the same picture in other words.

    They differ in nothing but the prompt. None where its prompt has no canonical form. Takes a tenth of a millisecond.
    """
    form = canonical_prompt(request.prompt, namespace)
    if form is None:
        return None
    profile = _canonical_profile(namespace.ignore_quality_words, namespace.corrects_typos)
    canonical = _canonical(request, profile, form, ())
    return CacheKey(namespace.partition, fingerprint_of(canonical), digest_of(canonical), 0)


def _canonical_profile(ignores_quality_words: bool, corrects_typos: bool) -> Profile:  # noqa: FBT001 - a table
    """CANONICAL as a namespace has it: what its settings change is another profile, with other keys."""
    if ignores_quality_words and not corrects_typos:
        return CANONICAL
    changes = ("" if ignores_quality_words else "+quality") + ("+typos" if corrects_typos else "")
    return CANONICAL._replace(versioned=CANONICAL_VERSION + changes)


def group_of(request: ImageRequest, namespace: Namespace) -> str:
    """What stands for all validated requests of a partition that differ in nothing but their prompt."""
    return f"{namespace.partition}:{digest_of(_canonical(request, CANONICAL, '', ())).hex()}"


def fingerprint_of(canonical: bytes) -> bytes:
    """The xxh3-128 of the canonical identity, 16 bytes.

    Fast and not secure: a collision must read as a miss everywhere. `identify` looks this name up in the module
    on every call, so a test may replace it to force one.
    """
    return xxhash.xxh3_128_digest(canonical)


def digest_of(data: bytes) -> bytes:
    """The SHA-256 of `data`, 32 bytes: what settles whether two identities are one."""
    return hashlib.sha256(data).digest()


def canonical_json(value: object) -> str:
    """`value` as canonical JSON.

    A whole number is written as an integer however it came: protobuf's Struct knows only doubles, so 7.0 is 7
    and -0.0 is 0. True is not 1. A null is kept: what an unknown parameter's null means is the provider's to say.

    Raises:
        ValueError: a number is infinite or not a number.
        TypeError: something is no JSON value.
    """
    return _JSON.encode(_plain(value))


def _profile(version: Version, namespace: Namespace, match_level: MatchLevel | None) -> Profile:
    own = version.profiles[namespace.profile]
    if match_level is None or match_level >= own.level:
        return own
    return next(profile for profile in version.profiles.values() if profile.level is match_level)


def _patterns(namespace: Namespace, profile: Profile) -> tuple[str, ...]:
    return namespace.catalog_patterns if profile.level is MatchLevel.CATALOG else ()


def _canonical(request: ImageRequest, profile: Profile, prompt: str, patterns: tuple[str, ...]) -> bytes:
    """The canonical bytes with a normalized prompt."""
    before, after = _around_prompt(request, profile, patterns)
    return f"{before}{_JSON.encode(prompt)}{after}".encode()


def _around_prompt(request: ImageRequest, profile: Profile, patterns: tuple[str, ...]) -> tuple[str, str]:
    """What stands before and after the prompt in the canonical JSON of a request, whatever its prompt.

    Every field enters by itself: one is left out by saying so, never by oversight.
    """
    if request.extra or request.inputs:
        return _written_around(profile, patterns, {name: getattr(request, name) for name in _FIELDS})
    return _around_plain(profile, patterns, *plain_values(request))


@lru_cache(maxsize=256, typed=True)  # typed: 1 and True are equal, and not alike as JSON
def _around_plain(profile: Profile, patterns: tuple[str, ...], *plain: object) -> tuple[str, str]:
    """The same for a request that has these values and no others."""
    values = dict(zip(PLAIN_FIELDS, plain, strict=True))
    return _written_around(profile, patterns, values | {"extra": {}, "inputs": ()})


def _written_around(profile: Profile, patterns: tuple[str, ...], values: dict[str, object]) -> tuple[str, str]:
    written = _identity_json(profile, patterns, values | {"prompt": ""})
    # Of what may hold such a name `extra` alone does, and it stands before; no text does: its quotes are escaped.
    before, name, after = written.rpartition('"prompt":')
    return before + name, after.removeprefix('""')


def _identity_json(profile: Profile, patterns: tuple[str, ...], values: dict[str, object]) -> str:
    if values["output_format"] not in _LOSSY_FORMATS:
        values["output_compression"] = None
    if profile.level is MatchLevel.CATALOG:
        # Namespaces of one partition may drop different things, and patterns change.
        values["catalog_patterns"] = patterns
    return canonical_json([profile.versioned, values])


def _plain(value: object) -> JsonValue:
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, InputImage):
        return {name: _plain(getattr(value, name)) for name in _INPUT_FIELDS}
    raise TypeError(f"{type(value).__name__} is no JSON value")
