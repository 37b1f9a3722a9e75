"""An answer on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

import pytest

from cacheserver.http.answer import Answer

PIECES = [bytes(256 * 1024)] * 32


async def one_by_one() -> AsyncIterator[bytes]:
    for piece in PIECES:
        yield piece


@pytest.mark.parametrize("body", [PIECES, one_by_one()], ids=["made at once", "made one by one"])
async def test_others_get_their_turn_while_a_large_answer_is_sent_to_a_client_that_reads_at_once(
    body: Iterable[bytes] | AsyncIterable[bytes],
) -> None:
    turns, since_turn, longest, sent = 0, 0, 0, 0

    async def send(message: Any) -> None:  # never waits
        nonlocal since_turn, longest, sent
        sent += len(message.get("body", b""))
        since_turn += len(message.get("body", b""))
        longest = max(longest, since_turn)

    async def another() -> None:
        nonlocal turns, since_turn
        while True:
            turns, since_turn = turns + 1, 0
            await asyncio.sleep(0)

    other = asyncio.create_task(another())
    await Answer(200, {}, body, None)({"type": "http", "method": "GET"}, None, send)  # type: ignore[arg-type] # unused
    other.cancel()
    assert sent == sum(map(len, PIECES))
    assert longest == 1024 * 1024
    assert turns >= 8
