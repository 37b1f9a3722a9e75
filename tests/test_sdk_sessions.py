"""Clients of OpenAI's API as teams have them: they see of our front what they see of OpenAI's, and the cache besides.

Each session (`tests/clients/`) runs twice: before a small server that does what OpenAI's does, and before our front
with a stand-in for a provider behind it. What a client hears is the same, word for word; what is paid for is not.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.installed import NODE, installed
from tests.clients.stage import front_stage, openai_stage, session

SESSIONS = Path(__file__).parent / "clients"

pytestmark = pytest.mark.timeout(180)  # four interpreters with large packages, on however busy a machine


def answered(*formats: str) -> dict[str, Any]:
    """An answer with pictures in these formats."""
    return {
        "created": True,
        "formats": list(formats),
        "urls": [None] * len(formats),
        "different": True,
        "told": ["1024x1024", "low", formats[0], "opaque"],
        "usage_adds_up": True,
        "text_tokens": True,
    }


def failed(status: int, name: str, code: str, param: str | None = None, **more: Any) -> dict[str, Any]:
    """An error, sent once, unless `more` says otherwise."""
    return {
        "class": name,
        "status": status,
        "type": "invalid_request_error",
        "code": code,
        "param": param,
        "all_four_keys": True,
        "request_id": True,
        "requests": 1,
        **more,
    }


STREAMED = {
    "last": "image_generation.completed",
    "format": "png",
    "told": ["1024x1024", "low", "png", "opaque"],
    "created_at": True,
    "usage_adds_up": True,
    "text_tokens": True,
}
WRONG_KEY = failed(401, "AuthenticationError", "invalid_api_key")
UNKNOWN_MODEL = failed(404, "NotFoundError", "model_not_found", "model")

HEARD_BY_OPENAI = {
    "generate": answered("png"),
    "request_id": True,
    "repeat": answered("png"),
    "two": answered("png", "png"),
    "two_again": answered("png", "png"),
    "jpeg": answered("jpeg"),
    "compressed": answered("jpeg"),
    "webp": answered("webp"),
    "b64_json": answered("png"),
    "url": {"b64_json": None, "content_type": "image/png", "format": "png"},
    "stream": STREAMED | {"partials": [["image_generation.partial_image", index, "png"] for index in (0, 1)]},
    "stream_again": STREAMED,
    "edit": answered("png"),
    "edit_again": answered("png"),
    "edit_of_another": answered("png"),
    "edit_stream": ["image_edit.partial_image", "image_edit.completed"],
    "wrong_key": WRONG_KEY,
    "wrong_key_stream": WRONG_KEY,
    "bad_size": failed(400, "BadRequestError", "invalid_value", "size"),
    "bad_n": failed(400, "BadRequestError", "integer_above_max_value", "n"),
    "unknown_model": UNKNOWN_MODEL,
    "blocked": failed(400, "BadRequestError", "moderation_blocked", type="image_generation_user_error"),
    "broke": failed(429, "RateLimitError", "insufficient_quota", type="insufficient_quota"),
    "limited": failed(429, "RateLimitError", "rate_limit_exceeded", type="rate_limit_error", requests=2, waited=[True]),
    "after_the_crowd": ["png"],
    "timeout": {"sent_again": True, "formats": ["png"]},
    "models": {"listed": True, "retrieved": ["gpt-image-2", "model"], "unknown": UNKNOWN_MODEL},
}
"""What every package of OpenAI's hears, of whatever version and language."""


def made(*types: str) -> dict[str, Any]:
    return {"types": list(types), "different": True, "usage_adds_up": True, "warnings": 0, "model": "gpt-image-2"}


def refused(status: int, code: str, param: str | None = None, *, requests: int = 1) -> dict[str, Any]:
    return {"status": status, "code": code, "param": param, "retryable": requests > 1, "requests": requests}


HEARD_BY_AI_SDK = {
    "two": made("image/png", "image/png"),
    "two_again": made("image/png", "image/png"),
    "one": made("image/png"),
    "jpeg": made("image/jpeg"),
    "edit": made("image/png"),
    "edit_again": made("image/png"),
    "wrong_key": refused(401, "invalid_api_key"),
    "bad_size": refused(400, "invalid_value", "size"),
    "unknown_model": refused(404, "model_not_found", "model"),
    "blocked": refused(400, "moderation_blocked"),
    "limited": refused(429, "rate_limit_exceeded", requests=2),
}


async def told_of_both(command: list[str], tmp_path: Path, **env: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a session tells of a server like OpenAI's, and of our front."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    async with openai_stage() as openai, front_stage(data_dir) as ours:
        first, second = await asyncio.gather(session(openai, command, env), session(ours, command, env))
        return first, second


def node_command(name: str, tmp_path: Path) -> list[str]:
    """A session in JavaScript, beside the packages: Node looks for them from where a file is."""
    shutil.copy(SESSIONS / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(installed("sdk") / "node_modules")
    return [str(NODE), str(tmp_path / name)]


def images(cache: dict[str, Any]) -> dict[str, int]:
    """How many pictures had been made in all, after each step."""
    return {name: step["images"] for name, step in cache.items() if "images" in step}


def digests(cache: dict[str, Any]) -> dict[str, list[str]]:
    return {name: step["digests"] for name, step in cache.items() if "digests" in step}


def assert_there_is_a_cache(control: dict[str, Any], ours: dict[str, Any]) -> None:
    """Each picture is paid for once, and is the same ever after; without a cache it is neither."""
    assert images(ours) == {
        "generate": 1,
        "repeat": 1,
        "two": 2,
        "two_again": 2,
        "jpeg": 3,
        "compressed": 4,
        "webp": 5,
        "b64_json": 5,
        "url": 5,
        "stream": 6,
        "stream_again": 6,
        "edit": 7,
        "edit_again": 7,
        "edit_of_another": 8,
    }
    of = digests(ours)
    assert of["generate"] == of["repeat"] == of["b64_json"] == of["url"] == of["two"][:1]
    assert of["two"] == of["two_again"]
    assert of["stream"] == of["stream_again"]
    assert of["edit"] == of["edit_again"] != of["edit_of_another"]
    # Sent again, it joins what its first sending has begun.
    assert ours["timeout"] == {"calls": 1}
    assert control["timeout"]["calls"] > 1
    assert images(control)["edit_of_another"] == 18
    assert digests(control)["generate"] != digests(control)["repeat"]


def assert_headers_tell_of_it(ours: dict[str, Any]) -> None:
    miss, hit = ours["generate"]["headers"], ours["repeat"]["headers"]
    assert "hit" not in miss["cache-status"]
    assert "fwd=" in miss["cache-status"]
    assert "; hit" in hit["cache-status"]
    assert float(miss["x-cacheserver-cost-usd"]) > 0 == float(hit["x-cacheserver-cost-usd"])
    assert float(miss["x-cacheserver-saved-usd"]) == 0 < float(hit["x-cacheserver-saved-usd"])
    assert miss["etag"] == hit["etag"]
    assert int(hit["age"]) >= 0


@pytest.mark.parametrize("version", ["3", "1"])
async def test_openais_package_for_python_hears_what_it_hears_of_openai(version: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SESSIONS / "openai_session.py")]
    control, ours = await told_of_both(command, tmp_path, PYTHONPATH=str(installed(f"openai-{version}")))
    assert control["cache"]["version"].startswith(f"{version}.")
    assert control["contract"] == HEARD_BY_OPENAI
    assert ours["contract"] == HEARD_BY_OPENAI
    assert_there_is_a_cache(control["cache"], ours["cache"])
    assert_headers_tell_of_it(ours["cache"])


async def test_openais_package_for_node_hears_what_it_hears_of_openai(tmp_path: Path) -> None:
    control, ours = await told_of_both(node_command("openai_session.mjs", tmp_path), tmp_path)
    assert control["contract"] == HEARD_BY_OPENAI
    assert ours["contract"] == HEARD_BY_OPENAI
    assert_there_is_a_cache(control["cache"], ours["cache"])
    assert_headers_tell_of_it(ours["cache"])


async def test_the_ai_sdk_hears_what_it_hears_of_openai(tmp_path: Path) -> None:
    control, ours = await told_of_both(node_command("ai_session.mjs", tmp_path), tmp_path)
    assert control["contract"] == HEARD_BY_AI_SDK
    assert ours["contract"] == HEARD_BY_AI_SDK
    assert images(ours["cache"]) == {"two": 2, "two_again": 2, "one": 2, "jpeg": 3, "edit": 4, "edit_again": 4}
    of = digests(ours["cache"])
    assert of["two"] == of["two_again"]
    assert of["one"] == of["two"][:1]
    assert of["edit"] == of["edit_again"]
    assert digests(control["cache"])["two"] != digests(control["cache"])["two_again"]
