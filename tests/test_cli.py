"""The command, run in this process against a real service over a real port."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.testing
from PIL import Image
from structlog.testing import capture_logs

from cacheserver.app import start
from cacheserver.cli import app
from cacheserver.errors import ConfigError, PromptRefusedError
from cacheserver.model import Caller, Permission
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.settings import Settings
from tests.house import House
from tests.provider import large_png, small_image
from tests.rpc_front import Front, open_front
from tests.servers import S3Server, ValkeyServer
from tests.test_client import Service, chunk, contents, header, serving

Run = Callable[..., Awaitable[typer.testing.Result]]


@pytest.fixture(autouse=True)
def _quiet_service() -> Iterator[None]:
    """The service shares this process, and its log lines are not what a command prints."""
    with capture_logs():
        yield


@pytest.fixture
async def front(house: House) -> AsyncIterator[Front]:
    async with open_front(house) as front:
        yield front


@pytest.fixture
def run(front: Front) -> Run:
    """Runs the command against the service."""
    return lambda *args, **options: command(*args, address=f"127.0.0.1:{front.server.port}", **options)


async def command(
    *args: str, address: str = "127.0.0.1:1", env: dict[str, str | None] | None = None, text: str = ""
) -> typer.testing.Result:
    """The command's exit code and what it printed; `text` is typed in."""
    variables = {"CACHESERVER_ADDRESS": address, "CACHESERVER_TOKEN": None} | (env or {})
    return await asyncio.to_thread(typer.testing.CliRunner().invoke, app, args, env=variables, input=text)


def printed(result: typer.testing.Result) -> Any:
    """The one JSON object on standard output."""
    return json.loads(result.stdout)


def opened(file: Path) -> Image.Image:
    return Image.open(io.BytesIO(file.read_bytes()))


# --- get ---


async def test_get_generates_once_and_then_says_memory(run: Run, front: Front, tmp_path: Path) -> None:
    first = await run("get", "a red fox", "-o", str(tmp_path / "fox.png"))
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("upstream  64x48 image/png")
    assert "cost $0.0530  saved $0.0000" in first.stdout
    assert f"  file  {tmp_path / 'fox.png'}" in first.stdout
    again = await run("get", "a red fox", "-o", str(tmp_path / "again.png"))
    assert again.stdout.startswith("memory  64x48")
    assert "cost $0.0000  saved $0.0530" in again.stdout
    assert (tmp_path / "fox.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert front.house.upstream.calls == 1


async def test_get_prints_one_json_object(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "fox.webp"
    facts = printed(await run("get", "a red fox", "--format", "webp", "-o", str(file), "--json"))
    [image] = facts["images"]
    assert (facts["pending"], facts["cost_microusd"], image["tier"]) == (False, 53_000, "upstream")
    assert (image["file"], image["content_type"], image["size_bytes"]) == (
        str(file),
        "image/webp",
        file.stat().st_size,
    )
    assert image["digest"] == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert opened(file).format == "WEBP"


async def test_get_without_a_file_only_tells(run: Run) -> None:
    result = await run("get", "a red fox", "-n", "2", "--json")
    facts = printed(result)
    assert result.exit_code == 0
    assert [image["file"] for image in facts["images"]] == [None, None]
    assert [image["variant"] for image in facts["images"]] == [0, 1]


async def test_get_numbers_the_files_of_several_images(run: Run, tmp_path: Path) -> None:
    result = await run("get", "a red fox", "-n", "3", "-o", str(tmp_path / "fox.png"))
    assert result.exit_code == 0, result.output
    written = {(tmp_path / f"fox-{number}.png").read_bytes() for number in (1, 2, 3)}
    assert len(written) == 3
    assert not (tmp_path / "fox.png").exists()


async def test_get_next_after_get_is_another_picture_than_the_first(run: Run, tmp_path: Path) -> None:
    first = printed(await run("get", "a red fox", "-o", str(tmp_path / "1.png"), "--json"))
    second = printed(await run("get", "a red fox", "--next", "-o", str(tmp_path / "2.png"), "--json"))
    assert first["images"][0]["key"] != second["images"][0]["key"]


async def test_get_next_is_another_picture_and_its_key_fetches_it(run: Run, tmp_path: Path) -> None:
    first = printed(await run("get", "a red fox", "--next", "-o", str(tmp_path / "1.png"), "--json"))
    second = printed(await run("get", "a red fox", "--next", "-o", str(tmp_path / "2.png"), "--json"))
    keys = [facts["images"][0]["key"] for facts in (first, second)]
    assert keys[0] != keys[1]
    await run("get", "--key", keys[1], "-o", str(tmp_path / "3.png"))
    assert (tmp_path / "3.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "2.png").read_bytes()


async def test_get_writes_to_a_pipe_and_tells_on_standard_error(run: Run) -> None:
    result = await run("get", "a red fox", "-o", "-")
    assert Image.open(io.BytesIO(result.stdout_bytes)).size == (64, 48)
    assert result.stderr.startswith("upstream  64x48")


async def test_get_writes_no_image_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("cacheserver.cli.get.sys", terminal)
    result = await command("get", "a red fox", "-o", "-")
    assert result.exit_code == 2
    assert "garble" in result.stderr


async def test_get_carries_images_of_any_size_with_a_bar_on_a_terminal(run: Run, front: Front, tmp_path: Path) -> None:
    data = large_png(1, 6_000_000)
    (tmp_path / "large.png").write_bytes(data)
    await run("put", str(tmp_path / "large.png"), "a large fox")
    result = await run("get", "a large fox", "-o", str(tmp_path / "fox.png"), env={"FORCE_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert (tmp_path / "fox.png").read_bytes() == data
    assert "\x1b[" in result.stdout
    assert "image 1" in result.stderr
    assert front.house.upstream.calls == 0


async def test_off_a_terminal_there_are_no_colours_and_no_bar(run: Run, tmp_path: Path) -> None:
    result = await run("get", "a red fox", "-o", str(tmp_path / "fox.png"))
    assert "\x1b" not in result.output
    assert result.stderr == ""


async def test_get_leaves_with_a_key_when_max_wait_is_over(run: Run, front: Front, tmp_path: Path) -> None:
    front.house.upstream.hold()
    started = await run("get", "a red fox", "--max-wait", "0")
    assert started.exit_code == 0
    assert "still being made" in started.stdout
    pending = await run("get", "a red fox", "--max-wait", "0", "-o", str(tmp_path / "fox.png"), "--json")
    assert pending.exit_code == 3
    assert printed(pending)["pending"]
    front.house.upstream.release()
    key = printed(pending)["images"][0]["key"]
    collected = await run("get", "--key", key, "-o", str(tmp_path / "fox.png"))
    assert collected.exit_code == 0
    assert opened(tmp_path / "fox.png").size == (64, 48)
    assert front.house.upstream.calls == 1


async def test_get_says_what_it_is_for_and_how_many_to_choose_from(house: House) -> None:
    house.namespace = replace(house.namespace, quality_by_use={"thumbnail": "low"})
    async with open_front(house) as front:
        address = f"127.0.0.1:{front.server.port}"
        result = await command("get", "a red fox", "--use", "thumbnail", "--candidates", "3", "--json", address=address)
        unknown = await command("get", "a red fox", "--use", "poster", address=address)
    [image] = printed(result)["images"]
    assert 0 < image["score"] < 1
    assert image["won_against"] == 2
    assert house.upstream.asked[0][0].quality == "low"
    assert house.upstream.images == 3
    assert unknown.exit_code == 2
    assert "use: " in unknown.stderr


async def test_get_says_degraded_and_the_score_where_there_is_one() -> None:
    degraded = header(score=0.5, won_against=2, content_type="image/png")
    degraded.header.status.degraded = True
    service = Service(script=[[degraded, chunk()], [degraded, chunk()], [header(), chunk()]])
    async with serving(service) as address:
        drawn = await command("get", "a red fox", "--allow-degraded", address=address)
        facts = printed(await command("get", "a red fox", "--allow-degraded", "--json", address=address))
        plain = await command("get", "a red fox", address=address)
    assert drawn.stdout.startswith("s3  degraded  0x0 image/png  ")
    assert "  score 0.50  cost " in drawn.stdout
    [image] = facts["images"]
    assert (image["degraded"], image["score"], image["won_against"]) == (True, 0.5, 2)
    assert "degraded" not in plain.stdout
    assert "score" not in plain.stdout
    assert [request.request.allow_degraded for request in service.asked] == [True, True, False]
    assert not service.asked[2].request.HasField("candidates")


async def test_get_of_a_picture_in_review_writes_nothing_and_says_how_to_collect_it(tmp_path: Path) -> None:
    waiting = header(state="STATE_PENDING_REVIEW", size_bytes=0, digest="")
    service = Service(script=[[waiting], [waiting]])
    async with serving(service) as address:
        drawn = await command("get", "a red fox", "-o", str(tmp_path / "fox.png"), address=address)
        told = await command("get", "a red fox", "--json", address=address)
    assert drawn.exit_code == 3
    assert "waits for a person's review" in drawn.stdout
    assert "cacheserver get --key k0 -o FILE" in drawn.stdout
    assert contents(tmp_path) == {}
    assert told.exit_code == 0
    assert printed(told)["images"][0]["state"] == "pending_review"


async def test_an_edit_is_made_of_files_and_found_explained_and_purged_by_their_digests(
    run: Run, front: Front, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("fox.png", "style.jpg", "mask.png")]
    for number, (file, image_format) in enumerate(zip(files, ("png", "jpeg", "png"), strict=True)):
        file.write_bytes(small_image(number, image_format))
    given = ["--input", str(files[0]), "--input", str(files[1]), "--mask", str(files[2])]
    assert (await run("find", "a hat", *given)).exit_code == 3
    made = printed(await run("get", "a hat", *given, "--json"))["images"][0]
    [(asked, _)] = front.house.upstream.asked
    assert [(each.role, each.content_type, each.data) for each in asked.inputs] == [
        ("image", "image/png", files[0].read_bytes()),
        ("image", "image/jpeg", files[1].read_bytes()),
        ("mask", "image/png", files[2].read_bytes()),
    ]
    found = printed(await run("find", "a hat", *given, "--json"))["items"][0]
    explained = printed(await run("explain", "a hat", *given, "--json"))["explanation"]
    assert found["key"] == explained["key"] == made["key"]
    another = printed(await run("get", "a hat", *given, "--next", "--json"))["images"][0]
    assert another["key"] != made["key"]
    assert printed(await run("purge", "a hat", *given, "--yes", "--json"))["images"] == 2


async def test_an_input_that_cannot_be_read_or_is_none_is_said(run: Run, front: Front, tmp_path: Path) -> None:
    absent = await run("get", "a hat", "--input", str(tmp_path / "absent.png"))
    assert absent.exit_code == 1
    assert "absent.png" in absent.stderr
    (tmp_path / "notes.txt").write_text("no image")
    wrong = await run("get", "a hat", "--input", str(tmp_path / "notes.txt"))
    assert wrong.exit_code == 2
    assert "inputs[0].data" in wrong.stderr
    assert front.house.upstream.calls == 0


async def test_get_of_what_is_not_cached_exits_3(run: Run, tmp_path: Path) -> None:
    result = await run("get", "a red fox", "--policy", "only_if_cached", "-o", str(tmp_path / "fox.png"))
    assert result.exit_code == 3
    assert "NOT_CACHED" in result.stderr
    assert not (tmp_path / "fox.png").exists()
    gone = await run("get", "--key", f"v1.default.{'0' * 32}.{'0' * 32}.0", "--json")
    assert gone.exit_code == 3
    assert printed(gone)["error"]["reason"] == "KEY_GONE"


async def test_get_says_which_field_is_wrong_and_exits_2(run: Run) -> None:
    result = await run("get", "a red fox", "--size", "17x99999")
    assert result.exit_code == 2
    assert result.stderr.startswith("spec.size: ") or "size: " in result.stderr
    assert "size" in str(printed(await run("get", "a red fox", "--size", "17x99999", "--json"))["error"]["violations"])


async def test_a_refused_prompt_exits_1_and_is_not_repeated(run: Run, front: Front) -> None:
    front.house.upstream.fail_next(PromptRefusedError("The provider refuses this prompt."))
    result = await run("get", "a secret fox")
    assert result.exit_code == 1
    assert "PROMPT_REFUSED" in result.stderr
    assert "secret" not in result.output


async def test_extra_parameters_are_a_json_object(run: Run, front: Front) -> None:
    await run("get", "a red fox", "--extra", '{"steps": 20}')
    assert front.house.upstream.asked[0][0].extra == {"steps": 20}
    for wrong in ("{", "[1]"):
        assert (await run("get", "a red fox", "--extra", wrong)).exit_code == 2


@pytest.mark.parametrize(
    "args",
    [
        ["get"],
        ["get", "a fox", "--key", "k"],
        ["get", "a fox", "-o", "-", "-n", "2"],
        ["get", "a fox", "-o", "-", "--json"],
        ["get", "a fox", "-n", "11"],
        ["get", "a fox", "--policy", "sometimes"],
        ["get", "a fox", "--candidates", "0"],
        ["get", "a fox", "--next", "--use", "thumbnail"],
        ["find"],
        ["purge"],
        ["purge", "a fox", "--everything"],
        ["token", "Not A Name"],
        ["fetch"],
    ],
    ids=" ".join,
)
async def test_wrong_use_exits_2(args: list[str]) -> None:
    assert (await command(*args)).exit_code == 2


# --- the connection ---


@pytest.mark.parametrize("args", [["get", "a red fox"], ["stats"]], ids=["stream", "unary"])
async def test_an_unreachable_service_is_one_clear_line(args: list[str]) -> None:
    result = await command(*args)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "no answer from the cache service at 127.0.0.1:1: start it with scripts/serve, or name another with --address"
    ]
    error = printed(await command(*args, "--json"))["error"]
    assert (error["code"], error["reason"]) == ("UNAVAILABLE", "")


async def test_the_address_is_a_flag_too(front: Front) -> None:
    result = await command("stats", "--json", "--address", f"127.0.0.1:{front.server.port}")
    assert result.exit_code == 0


async def test_the_token_comes_from_the_environment_or_a_file(house: House, tmp_path: Path) -> None:
    caller = Caller("web", frozenset(Permission))
    known = [(hashlib.sha256(b"s3cret").digest(), caller)]
    async with open_front(house, callers=known, anonymous=None) as front:
        address = f"127.0.0.1:{front.server.port}"
        assert (await command("stats", address=address, env={"CACHESERVER_TOKEN": "s3cret"})).exit_code == 0
        (tmp_path / "token").write_text("s3cret\n")
        by_file = await command("stats", "--token-file", str(tmp_path / "token"), address=address)
        assert by_file.exit_code == 0
        wrong = await command("stats", address=address, env={"CACHESERVER_TOKEN": "other"})
        assert wrong.exit_code == 1
        assert "UNAUTHENTICATED" in wrong.stderr
        assert "other" not in wrong.stderr


async def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    result = await command("stats", "--token-file", str(tmp_path / "missing"))
    assert result.exit_code == 1
    assert result.stderr == f"{tmp_path / 'missing'}: No such file or directory\n"
    facts = printed(await command("stats", "--ca-file", str(tmp_path / "missing"), "--json"))
    assert "No such file" in facts["error"]["message"]


# --- find, put, purge, explain, stats ---


async def test_find_tells_the_tier_and_exits_3_if_one_is_absent(run: Run, tmp_path: Path) -> None:
    await run("get", "a red fox")
    result = await run("find", "a red fox")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "memory    a red fox")
    (tmp_path / "prompts").write_text("a red fox\n\na blue fox\n")
    both = await run("find", "--file", str(tmp_path / "prompts"), "--json")
    assert both.exit_code == 3
    assert printed(both)["counts"] == {"cached": 1, "absent": 1}
    assert [item["tier"] for item in printed(both)["items"]] == ["memory", None]
    from_stdin = await run("find", "-f", "-", text="a red fox\n")
    assert from_stdin.exit_code == 0


async def test_find_says_which_tier_could_not_be_asked(run: Run, front: Front) -> None:
    front.house.s3.is_down = True
    result = await run("find", "a red fox")
    assert result.exit_code == 3
    assert "not asked" in result.stdout
    assert printed(await run("find", "a red fox", "--json"))["unknown_tiers"] == ["s3"]


async def test_put_stores_a_file_that_get_then_finds(run: Run, front: Front, tmp_path: Path) -> None:
    file = tmp_path / "own.png"
    file.write_bytes(small_image(99))
    stored = await run("put", str(file), "my fox", "--tag", "mine", "--paid", "1000")
    assert stored.stdout.startswith("stored  64x48 image/png")
    again = printed(await run("put", str(file), "my fox", "--json"))
    assert not again["created"]
    got = printed(await run("get", "my fox", "-o", str(tmp_path / "got.png"), "--json"))
    assert (got["saved_microusd"], got["images"][0]["key"]) == (1000, again["key"])
    assert (tmp_path / "got.png").read_bytes() == file.read_bytes()
    assert front.house.upstream.calls == 0


async def test_put_of_no_image_exits_2_and_of_no_file_1(run: Run, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not an image")
    assert (await run("put", str(tmp_path / "note.txt"), "a note")).exit_code == 2
    assert (await run("put", str(tmp_path / "missing.png"), "a note")).exit_code == 1


async def test_purge_counts_first_and_then_removes(run: Run) -> None:
    await run("get", "a red fox", "-n", "2", "--tag", "spring")
    dry = await run("purge", "--tag", "spring", "--dry-run")
    assert dry.stdout.startswith("would remove 2 images: ")
    assert (await run("find", "a red fox")).exit_code == 0
    done = printed(await run("purge", "--tag", "spring", "--yes", "--json"))
    assert (done["images"], done["dry_run"]) == (2, False)
    assert (await run("find", "a red fox")).exit_code == 3


async def test_purge_of_one_image_does_not_ask(run: Run) -> None:
    key = printed(await run("get", "a red fox", "--json"))["images"][0]["key"]
    assert (await run("purge", "--key", key)).stdout.startswith("removed 1 image: ")
    await run("get", "a red fox")
    assert (await run("purge", "a red fox")).exit_code == 0


async def test_purge_of_several_asks_on_a_terminal_and_needs_yes_elsewhere(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run("get", "a red fox", "-n", "2")
    unasked = await run("purge", "--everything")
    assert unasked.exit_code == 2
    assert "--yes" in unasked.stderr
    monkeypatch.setattr("cacheserver.cli.purge.is_terminal", lambda: True)
    assert (await run("purge", "--everything", text="n\n")).exit_code == 1
    assert (await run("find", "a red fox")).exit_code == 0
    assert (await run("purge", "--everything", text="y\n")).exit_code == 0
    assert (await run("find", "a red fox")).exit_code == 3


async def test_explain_shows_the_key_and_why_two_differ(run: Run) -> None:
    key = printed(await run("get", "A  red fox.", "--json"))["images"][0]["key"]
    alone = await run("explain", "A  red fox.")
    assert "prompt    a red fox" in alone.stdout
    assert f"key       {key}" in alone.stdout
    same = await run("explain", "A  red fox.", "a red fox")
    assert "same key" in same.stdout
    assert printed(await run("explain", "A  red fox.", "a red fox", "--json"))["same_key"]
    differ = await run("explain", "a red fox", "a blue fox")
    assert "differs in prompt:" in differ.stdout
    facts = printed(await run("explain", "a red fox", "a blue fox", "--json"))
    assert [each["field"] for each in facts["differences"]] == ["prompt"]


async def test_stats_count_hits_and_money(run: Run) -> None:
    await run("get", "a red fox")
    await run("get", "a red fox")
    table = (await run("stats")).stdout
    assert "1 upstream calls" in table
    assert "$0.0530" in table
    facts = printed(await run("stats", "--json"))
    assert facts["total"]["saved_microusd"] == 53_000
    assert {(row["outcome"], row["tier"]) for row in facts["rows"]} == {("miss", "upstream"), ("hit", "memory")}


async def test_stats_show_what_may_be_spent_and_what_was_degraded() -> None:
    row = pb.StatsRow(namespace="shop", requests=3, degraded=2, spent_microusd=50_000, unknown_microusd=120_000)
    stats = pb.GetStatsResponse(rows=[row], total=row)
    async with serving(Service(script=[stats, stats])) as address:
        names, shop, *_ = (await command("stats", address=address)).stdout.splitlines()
        facts = printed(await command("stats", "--json", address=address))
    assert " ".join(names.split()) == "namespace outcome tier images degraded bytes mean time spent unknown saved"
    assert " ".join(shop.split()) == "shop 3 2 0 B 0.0 ms $0.0500 $0.1200 $0.0000"
    assert (facts["total"]["degraded"], facts["total"]["unknown_microusd"]) == (2, 120_000)


# --- token, serve ---


async def test_token_prints_the_config_on_stdout_and_the_token_on_stderr() -> None:
    result = await command("token", "web", "--namespace", "shop", "--allow", "read", "--allow", "purge")
    [caller] = tomllib.loads(result.stdout)["callers"]
    secret = result.stderr.strip().removeprefix("CACHESERVER_TOKEN=")
    assert caller == {
        "name": "web",
        "token_sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "namespaces": ["shop"],
        "allow": ["read", "purge"],
    }
    assert secret not in result.stdout
    settings = Settings.model_validate({"callers": [caller]})
    assert settings.caller_tokens[0][1].permissions == {Permission.READ, Permission.PURGE}


async def test_every_token_is_another() -> None:
    facts = [printed(await command("token", "web", "--json")) for _ in range(2)]
    assert facts[0]["token"] != facts[1]["token"]
    assert facts[0]["caller"]["allow"] == ["read", "generate"]


async def test_serve_hands_its_flags_to_the_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Settings] = []
    monkeypatch.setattr("cacheserver.app.run", lambda settings, **_: served.append(settings))
    (tmp_path / "c.toml").write_text('[server]\ngrpc_port = 1\nhttp_port = 2\n[log]\nlevel = "debug"\n')
    flags = ["--config", str(tmp_path / "c.toml"), "--grpc-port", "7", "--data-dir", str(tmp_path), "--local-s3"]
    result = await command("serve", *flags)
    assert result.exit_code == 0, result.output
    [settings] = served
    assert (settings.server.grpc_port, settings.server.http_port, settings.log.level) == (7, 2, "debug")
    assert settings.data_dir == tmp_path
    assert settings.s3.local


async def test_serve_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = await command("serve", env={"CACHESERVER_GRPC_PROT": "1"})
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "CACHESERVER_GRPC_PROT" in result.stderr

    def refuse(_: Settings, **__: object) -> None:
        raise ConfigError("redis.url: wrong")

    monkeypatch.setattr("cacheserver.app.run", refuse)
    assert (await command("serve")).stderr == "redis.url: wrong\n"


# --- doctor ---


def configured(tmp_path: Path, **sections: dict[str, Any]) -> list[str]:
    """A config file with these sections, as flags."""
    lines = [f'data_dir = "{tmp_path}"']
    for name, section in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    (tmp_path / "c.toml").write_text("\n".join(lines))
    return ["doctor", "--config", str(tmp_path / "c.toml")]


def findings(result: typer.testing.Result) -> dict[str, tuple[str, str]]:
    return {each["what"]: (each["verdict"], f"{each['text']} {each['remedy']}") for each in printed(result)["findings"]}


NO_UPSTREAM: dict[str, str | None] = {"OPENAI_API_KEY": None, "OPENAI_BASE_URL": None}
DEAD_UPSTREAM: dict[str, str | None] = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}


async def test_doctor_finds_the_embedded_default_well_and_the_service_not_running(tmp_path: Path) -> None:
    result = await command(*configured(tmp_path, server={"grpc_port": 1}), env=NO_UPSTREAM)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "well   config: tiers: memory > redis > disk"
    assert "well   redis: our own server, started with the service" in lines
    assert "well   disk: wrote, read and removed a test entry" in lines
    assert "note   upstream painter: draws placeholders, no real images" in lines
    assert "       start it with scripts/serve, or give its --address" in lines


async def test_doctor_tries_a_redis_and_a_bucket_of_yours(
    tmp_path: Path, valkey_server: ValkeyServer, s3_server: S3Server
) -> None:
    bucket = await asyncio.to_thread(s3_server.new_bucket)
    s3 = {
        "bucket": bucket,
        "endpoint": s3_server.endpoint,
        "access_key": s3_server.access_key,
        "secret_key": s3_server.secret_key,
        "read_timeout_s": 10.0,  # a new bucket's first object waits until SeaweedFS has made room for it
    }
    flags = configured(tmp_path, redis={"url": valkey_server.url}, s3=s3)
    found = findings(await command(*flags, "--json", env=DEAD_UPSTREAM))
    assert found["redis"][0] == found["s3"][0] == "well", (found["redis"][1], found["s3"][1])
    assert found["upstream openai"][0] == "broken"
    assert "UPSTREAM_DOWN" in found["upstream openai"][1]


async def test_doctor_says_what_is_broken_and_how_to_mend_it(tmp_path: Path, s3_server: S3Server) -> None:
    s3 = {
        "bucket": "no-such-bucket",
        "endpoint": s3_server.endpoint,
        "access_key": s3_server.access_key,
        "secret_key": s3_server.secret_key,
    }
    flags = configured(tmp_path, redis={"url": "redis://127.0.0.1:1"}, s3=s3)
    result = await command(*flags, "--json", env=DEAD_UPSTREAM)
    assert result.exit_code == 1
    assert not printed(result)["ok"]
    found = findings(result)
    assert found["redis"][0] == found["s3"][0] == "broken"
    assert "check redis.url" in found["redis"][1]
    assert "bucket no-such-bucket" in found["s3"][1]


async def test_doctor_refuses_a_redis_that_evicts_control_state(
    tmp_path: Path, own_valkey: Callable[[], ValkeyServer]
) -> None:
    server = await asyncio.to_thread(own_valkey)
    await asyncio.to_thread(server.execute, "CONFIG SET maxmemory-policy allkeys-lru")
    result = await command(*configured(tmp_path, redis={"url": server.url}), "--json", env=DEAD_UPSTREAM)
    assert findings(result)["redis"][0] == "broken"
    assert "volatile-lfu" in findings(result)["redis"][1]


async def test_doctor_asks_the_running_service(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {
            "data_dir": tmp_path / "data",
            "tiers": ["memory", "disk"],
            "server": {"grpc_port": 0, "http_port": 0},
            "upstreams": [{"name": "painter", "kind": "painter", "models": ["painter"]}],
        }
    )
    service = await start(settings)
    try:
        http_port = int(service.http_address.rpartition(":")[2])
        flags = configured(tmp_path, server={"http_port": http_port})
        result = await command(*flags, "--json", address=service.grpc_address, env=NO_UPSTREAM)
        assert findings(result)["service"] == ("well", "runs, and all its tiers answer ")
        flags = configured(tmp_path, server={"http_port": 1})
        result = await command(*flags, "--json", address=service.grpc_address, env=NO_UPSTREAM)
        assert findings(result)["service"][0] == "note"
    finally:
        await service.stop()


async def test_doctor_knows_a_service_that_wants_a_token(house: House, tmp_path: Path) -> None:
    async with open_front(house, anonymous=None) as front:
        address = f"127.0.0.1:{front.server.port}"
        result = await command(*configured(tmp_path), "--json", address=address, env=NO_UPSTREAM)
        assert findings(result)["service"][0] == "note"
        assert "CACHESERVER_TOKEN" in findings(result)["service"][1]


async def test_doctor_of_a_wrong_config_is_one_line(tmp_path: Path) -> None:
    result = await command(*configured(tmp_path, redis={"ur": "x"}))
    assert result.exit_code == 1
    assert "redis.ur" in result.stderr
    assert len(result.stderr.splitlines()) == 1
