"""Upstreams that speak OpenAI's API, over a stand-in for a provider."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from cacheserver.generation.prices import PriceTable
from cacheserver.generation.providers.openai import Endpoint, OpenAIUpstream
from tests.fakes import FakeClock
from tests.provider import API_KEY, OpenAIStandIn

Make = Callable[..., OpenAIUpstream]


@asynccontextmanager
async def openai_upstreams(provider: OpenAIStandIn, clock: FakeClock) -> AsyncIterator[Make]:
    """Makes upstreams at `provider`, with an Endpoint's fields as given; they are closed at the end."""
    made: list[OpenAIUpstream] = []

    def make(**fields: Any) -> OpenAIUpstream:
        known: dict[str, Any] = {"name": "main", "base_url": provider.base_url, "api_key": lambda: API_KEY}
        known["models"] = {model: model for model in provider.models}
        made.append(OpenAIUpstream(Endpoint(**(known | fields)), prices=PriceTable.load(), clock=clock))
        return made[-1]

    yield make
    for one in made:
        await one.aclose()
