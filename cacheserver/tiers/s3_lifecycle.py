"""A rule of a bucket's own that removes our objects once nobody can be answered with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rule = Mapping[str, Any]
"""A lifecycle rule as S3 tells it."""


def with_ours(rules: Sequence[Rule], *, prefix: str, days: int) -> list[Rule] | None:
    """A bucket's rules with ours among them: what begins with `prefix` goes so many days after it was written.

    All others stay as they are, and in their order. None: ours is among them already.
    """
    ours = {
        "ID": f"cacheserver {prefix}",
        "Status": "Enabled",
        "Filter": {"Prefix": prefix},
        "Expiration": {"Days": days},
    }
    if ours in rules:
        return None
    return [*(rule for rule in rules if rule.get("ID") != ours["ID"]), ours]
