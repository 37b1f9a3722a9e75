"""Why two requests have different keys."""

from __future__ import annotations

import json
from typing import NamedTuple

from cacheserver.identity.fingerprint import canonical_json
from cacheserver.model import Identity, JsonValue


class FieldDifference(NamedTuple):
    """One field in which two canonical identities differ.

    `field` is a name of ImageRequest, "extra." and a parameter's name, "profile" or "catalog_patterns". A text
    is given as it is, anything else as JSON, and a field that one of the two lacks as "".
    """

    field: str
    value: str
    other_value: str


def differences(identity: Identity, other: Identity) -> list[FieldDifference]:
    """The fields in which two identities differ, by name; empty if and only if they are the same."""
    mine, theirs = fields_of(identity), fields_of(other)
    return [
        FieldDifference(name, mine.get(name, ""), theirs.get(name, ""))
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def fields_of(identity: Identity) -> dict[str, str]:
    """Every field of a canonical identity by its name, as a difference shows it."""
    profile, values = json.loads(identity.canonical)
    extra: dict[str, JsonValue] = values.pop("extra")
    values |= {f"extra.{name}": value for name, value in extra.items()}
    return {name: _shown(value) for name, value in {"profile": profile, **values}.items()}


def _shown(value: JsonValue) -> str:
    return value if isinstance(value, str) else canonical_json(value)
