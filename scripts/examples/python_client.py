#!/usr/bin/env python3
"""Calling the cache service from Python.

Start the service in another terminal (scripts/serve), then:

    .venv/bin/python scripts/examples/python_client.py ["a prompt"]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cacheserver.client import (
    DEFAULT_ADDRESS,
    CacheError,
    CachePolicy,
    Client,
    ImageHeader,
    InvalidRequestError,
    NotCachedError,
    Progress,
    VariantPolicy,
)


def main(prompt: str = "a red fox in the snow") -> None:
    """Ask, ask again, ask for another one, fail on purpose, and download."""
    address = os.environ.get("CACHESERVER_ADDRESS", DEFAULT_ADDRESS)
    with Client(address, token=os.environ.get("CACHESERVER_TOKEN")) as client:
        # The first call may generate; the second is a hit, with the very same bytes.
        first = client.get_image(prompt)
        again = client.get_image(prompt)
        print(f"first from {first.tier}, again from {again.tier}, same bytes: {first.data == again.data}")
        print(f"the second call saved ${again.status.saved_microusd / 1e6:.4f}")

        # "Another one" neither replaces the first nor is paid twice if the call has to be repeated.
        another = client.get_image(prompt, variant_policy=VariantPolicy.NEXT, exclude_keys=[first.key])
        print(f"another one: variant {another.image.variant}, {len(another.data)} bytes")

        # Many at once, over one stream: each outcome under an id of your own, as soon as it is ready.
        for request_id, outcome in client.batch([("one", prompt), ("other", "a blue whale")], quality="low"):
            print(f"{request_id}: {outcome if isinstance(outcome, CacheError) else outcome.tier}")

        # What can go wrong has a class, a published reason, and names the field.
        try:
            client.get_image("never asked before", cache_policy=CachePolicy.ONLY_IF_CACHED)
        except NotCachedError as error:
            print(f"only if cached: {error.reason}")
        try:
            client.get_image(prompt, size="17x99999")
        except InvalidRequestError as error:
            print(f"a wrong size: {error.reason} {error.violations}")

        # Images of any size: events while they come, or a file. A broken download goes on where it broke.
        for event in client.stream_image(prompt):
            if isinstance(event, Progress):
                print(f"waiting, about {event.estimated_wait_s:.0f} s more")
            elif isinstance(event, ImageHeader):
                print(f"an image of {event.image.size_bytes} bytes from {event.status.tier}")
        file = Path("fox.png")
        client.download(file, key=first.key)
        print(f"downloaded to {file}, same bytes: {file.read_bytes() == first.data}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
