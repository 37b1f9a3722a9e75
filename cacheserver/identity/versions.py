"""The versions of the identity: what a release makes of a prompt, and what it can still look up of earlier ones.

Readers lead writers, as with the codec: a new version comes into VERSIONS one release before WRITE_VERSION is raised to
it. Requests are keyed by the version that is written, and before money is spent a miss is looked up under all others
(carrying.py). So the one before the newest stays here as long as entries of it may be asked for, two back at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from cacheserver.identity.normalize import PROFILES, Profile, normalize_prompt

WRITE_VERSION = 1
"""The version that requests are keyed by unless told otherwise: the newest that the release before this one reads."""


class Version(NamedTuple):
    """What prompts become under each profile.

    `normalize` takes a prompt, a profile's name and catalog patterns. A profile that a version leaves as it was keeps
    its `versioned` name, and so all its keys. `is_widening`: what shared a key in the version before shares one in this
    one too, so that a picture of that one answers whoever had its key.
    """

    profiles: Mapping[str, Profile]
    normalize: Callable[[str, str, tuple[str, ...]], str]
    is_widening: bool = False


VERSIONS: dict[int, Version] = {1: Version(PROFILES, normalize_prompt)}
"""The versions by number, oldest first, without gaps."""


def answers_all(version: int, later: int) -> bool:
    """Whether a picture of `version` answers each request of `later` that had its key, whatever its own prompt was."""
    return version < later and all(VERSIONS[step].is_widening for step in range(version + 1, later + 1))
