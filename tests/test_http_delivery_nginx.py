"""Conditional and range requests are answered as nginx answers them for the same file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.delivery_front import open_delivery, path_of
from tests.house import House
from tests.nginx import CASES, MODIFIED_S, PICTURE, Asker, Reply, is_installed, nginx

RECORDED = {
    name: Reply(**reply)
    for name, reply in json.loads((Path(__file__).parent / "data" / "nginx_replies.json").read_text()).items()
}
"""What nginx 1.22 answered; `python -m scripts.bench.delivery --record` writes it anew."""

RATHER = {case.name: case.rather for case in CASES if case.rather is not None}


@pytest.fixture
async def ours(house: House) -> AsyncIterator[Asker]:
    async with open_delivery(house) as front:
        entry = await front.stored(PICTURE, create_time_s=MODIFIED_S)
        with httpx.Client(trust_env=False) as client:
            yield await asyncio.to_thread(Asker, client, front.base_url + path_of(entry))


def replies(asker: Asker) -> dict[str, Reply]:
    return {case.name: asker.reply(case) for case in CASES}


async def test_we_answer_as_nginx_did_but_where_the_rfc_must_have_it_otherwise(ours: Asker) -> None:
    told = await asyncio.to_thread(replies, ours)
    assert {name: reply for name, reply in told.items() if reply != RECORDED[name]}.keys() == RATHER.keys()
    assert {name: told[name].status for name in RATHER} == RATHER


def test_what_is_recorded_is_all_of_it_and_where_we_differ_has_a_reason() -> None:
    assert list(RECORDED) == [case.name for case in CASES]
    assert all(bool(case.because) == (case.name in RATHER) for case in CASES)


@pytest.mark.skipif(not is_installed(), reason="apt-get install nginx-light")
def test_nginx_answers_as_it_did_when_it_was_recorded(tmp_path: Path) -> None:
    with nginx(tmp_path) as url, httpx.Client(trust_env=False) as client:
        assert replies(Asker(client, url)) == RECORDED
