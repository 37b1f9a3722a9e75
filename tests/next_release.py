"""The service as its next release would be: it knows version 2 of the identity and of the codec, too.

`python -m tests.next_release serve` runs it. Version 2 of the identity leaves the word "please" out of prompts.
"""

from __future__ import annotations

import zlib

from cacheserver.cli import main
from cacheserver.identity import PROFILES, VERSIONS, Version, normalize_prompt
from cacheserver.tiers.codec import LAYOUTS, Layout


def _without_please(prompt: str, profile: str, patterns: tuple[str, ...]) -> str:
    normalized = normalize_prompt(prompt, profile, patterns)
    return normalized if profile == "exact" else normalized.replace("please ", "")


_CHANGED = {name: profile._replace(versioned=f"{name}/2") for name, profile in PROFILES.items() if name != "exact"}
IDENTITY = Version({**PROFILES, **_CHANGED}, _without_please)
CODEC = Layout(
    pack=lambda entry: zlib.compress(LAYOUTS[1].pack(entry)),
    unpack=lambda packed, data: LAYOUTS[1].unpack(zlib.decompress(packed), data),
)

if __name__ == "__main__":
    VERSIONS[2], LAYOUTS[2] = IDENTITY, CODEC
    main()
