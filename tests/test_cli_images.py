"""The commands import and export, in this process against a whole service on real directories."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cacheserver.app import Service
from cacheserver.cli import export
from cacheserver.cli.manifest import Manifest
from cacheserver.client import AsyncClient
from tests.provider import OpenAIStandIn, small_image
from tests.running import environment, running
from tests.servers import S3Server
from tests.test_cli import command, printed

Run = Callable[..., Awaitable[typer.testing.Result]]


@pytest.fixture(autouse=True)
def _quiet_service() -> Iterator[None]:
    """The service shares this process, and its log lines are not what a command prints."""
    with capture_logs():
        yield


def env_of(directory: Path, provider: OpenAIStandIn, **more: object) -> dict[str, str]:
    directory.mkdir()
    return environment(directory, provider=provider, redis__embedded=False, disk__fsync=False, **more)


@pytest.fixture
async def service(tmp_path: Path, provider: OpenAIStandIn) -> AsyncIterator[Service]:
    async with running(env_of(tmp_path / "data", provider)) as service:
        yield service


@pytest.fixture
def run(service: Service) -> Run:
    """Runs the command against the service."""
    return running_at(service)


def running_at(service: Service) -> Run:
    return lambda *args, **options: command(*args, address=service.grpc_address, **options)


def row(number: int, **fields: Any) -> dict[str, Any]:
    """A row of a manifest; its picture is among those that `write` makes."""
    return {"spec": {"prompt": f"picture {number}"}, "source": f"{number}.png", **fields}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_manifest(*rows: Any, pictures: int = 4) -> Path:
        directory = tmp_path / "old"
        directory.mkdir(exist_ok=True)
        for number in range(pictures):
            (directory / f"{number}.png").write_bytes(small_image(number))
        file = directory / "manifest.jsonl"
        lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
        file.write_text("".join(f"{line}\n" for line in lines))
        return file

    return write_manifest


Write = Callable[..., Path]


def images_in(tmp_path: Path, name: str = "data") -> int:
    return len(list((tmp_path / name / "images/v1").rglob("v1.*")))


# --- import ---


async def test_import_stores_what_the_manifest_names_and_hits_save_what_it_cost(
    run: Run, write: Write, provider: OpenAIStandIn, tmp_path: Path
) -> None:
    digest = f"sha256:{hashlib.sha256(small_image(1)).hexdigest()}"
    file = write(
        row(0, cost_usd=0.053, tags=["old"], create_time="2026-05-04T12:30:00Z"),
        "",
        row(1, cost_microusd=40_000, digest=digest),
    )
    result = await run("import", str(file))
    assert result.exit_code == 0, result.output
    assert result.stdout == "2 stored, 0 there already, 0 failed\n"
    got = printed(await run("get", "picture 0", "-o", str(tmp_path / "got.png"), "--json"))
    assert (got["saved_microusd"], got["images"][0]["tier"]) == (53_000, "disk")
    assert (tmp_path / "got.png").read_bytes() == small_image(0)
    assert printed(await run("get", "picture 1", "--json"))["saved_microusd"] == 40_000
    assert provider.calls == 0


async def test_import_run_again_leaves_out_what_is_done(run: Run, write: Write, tmp_path: Path) -> None:
    file = write(row(0), row(1), row(2, digest=f"sha256:{'0' * 64}"))
    first = await run("import", str(file), "--json")
    assert first.exit_code == 1
    facts = printed(first)
    assert (facts["rows"], facts["created"], facts["failed"]) == (3, 2, 1)
    assert facts["failures"] == [
        {
            "line": 3,
            "error": {
                "reason": "INVALID_FIELD",
                "message": "digest: the bytes have another digest",
                "violations": {"digest": "the bytes have another digest"},
            },
        }
    ]
    again = printed(await run("import", str(file), "--json"))
    assert (again["done_before"], again["created"], again["present"], again["failed"]) == (2, 0, 0, 1)
    without = printed(await run("import", str(file), "--json", "--result", str(tmp_path / "other")))
    assert (without["done_before"], without["present"], without["failed"]) == (0, 2, 1)
    assert images_in(tmp_path) == 2


async def test_a_result_whose_last_line_is_torn_counts_up_to_it(run: Run, write: Write) -> None:
    file = write(row(0), row(1), row(2))
    await run("import", str(file))
    result = file.with_name("manifest.jsonl.result")
    lines = result.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    result.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    facts = printed(await run("import", str(file), "--json"))
    assert (facts["done_before"], facts["present"]) == (1, 2)
    assert [json.loads(line).get("created") for line in result.read_bytes().splitlines()] == [None, True, False, False]


async def test_the_result_of_another_manifest_or_namespace_is_refused(run: Run, write: Write) -> None:
    file = write(row(0))
    result = file.with_name("result")
    assert (await run("import", str(file), "--result", str(result))).exit_code == 0
    for number, namespace, what in ((1, "default", "manifest"), (0, "other", "namespace")):
        write(row(number))
        refused = await run("import", str(file), "--result", str(result), "--namespace", namespace)
        assert (refused.exit_code, f"is of another {what}" in " ".join(refused.stderr.split())) == (2, True)
    assert (await run("import", str(file), "--result", str(result), "--namespace", "default")).exit_code == 0
    result.write_text("half of something\nelse\n")
    refused = await run("import", str(file), "--result", str(result))
    assert (refused.exit_code, "line 1: is no JSON object" in refused.stderr) == (2, True)


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
async def test_a_file_that_is_no_result_is_left_as_it_is(run: Run, write: Write, end: str) -> None:
    file = write(row(0), row(1))
    text = file.read_text().rstrip("\n") + end
    file.write_text(text)
    refused = await run("import", str(file), "--result", str(file))
    assert (refused.exit_code, "name another file" in " ".join(refused.stderr.split())) == (2, True)
    assert file.read_text() == text


async def test_what_was_away_for_a_while_is_sent_again(
    run: Run, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "data/images/tmp"
    waits: list[float] = []

    def mend(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            temporary.unlink()
            temporary.mkdir()

    monkeypatch.setattr("cacheserver.cli.imports._wait", mend)
    temporary.rmdir()
    temporary.write_text("a file where the directory should be")
    result = await run("import", str(write(row(0), row(1))), "--json")
    assert (result.exit_code, printed(result)["created"], printed(result)["failed"]) == (0, 2, 0)
    assert waits == [5.0, 5.0]


async def test_a_dry_run_writes_nothing(run: Run, write: Write, tmp_path: Path) -> None:
    file = write(row(0), row(1))
    result = await run("import", str(file), "--dry-run")
    assert result.stdout == "2 could be stored, 0 there already, 0 failed\n"
    assert images_in(tmp_path) == 0
    assert [each.name for each in file.parent.iterdir() if "result" in each.name] == []
    assert (await run("import", str(file), "--dry-run", "--result", "x")).exit_code == 2


async def test_import_has_the_service_copy_what_lies_in_its_own_store(
    write: Write, provider: OpenAIStandIn, tmp_path: Path, s3_server: S3Server
) -> None:
    bucket = await asyncio.to_thread(s3_server.new_bucket)
    for number in range(2):
        await asyncio.to_thread(
            s3_server.client.put_object, Bucket=bucket, Key=f"{number}.png", Body=small_image(number)
        )
    sources = [f"s3://{bucket}/0.png", f"s3://{bucket}/1.png", f"s3://{s3_server.bucket}/0.png"]
    file = write(*(row(number, source=source) for number, source in enumerate(sources)))
    config = f'[imports]\nbuckets = ["{bucket}"]\n'
    async with running(env_of(tmp_path / "data", provider, s3=s3_server), config) as service:
        result = await running_at(service)("import", str(file))
        assert result.exit_code == 1
        assert result.stdout.splitlines()[0] == "2 stored, 0 there already, 1 failed"
        assert "line 3: s3_uri: its bucket is none of imports.buckets" in result.stdout
        async with AsyncClient(service.grpc_address) as client:
            assert [(await client.get_image(f"picture {number}")).data for number in range(2)] == [
                small_image(0),
                small_image(1),
            ]
    assert provider.calls == 0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        (row(0, source="9.png"), "source: No such file"),
        (row(0, source="../data"), "source: lies outside"),
        (row(0, source="/etc/passwd"), "source: lies outside"),
        (row(0, source="\0"), "source: is no path"),
        (row(0, source=""), "source: must be set"),
        (row(0, source="."), "source: is no file"),
        (row(0, colour="red"), "colour: nobody knows this field"),
        (row(0, spec={"prompt": "x", "colour": "red"}), "spec.colour: nobody knows"),
        (row(0, spec={"size": "auto"}), "spec.prompt: must be set"),
        (row(0, spec={"prompt": 7}), "spec.prompt: must be a text"),
        (row(0, spec={"prompt": "x", "seed": True}), "spec.seed: must be a whole number"),
        (row(0, spec="x"), "spec: must be an object"),
        (row(0, key="k"), "set either spec, or all of"),
        (row(0, facts={}), "facts: go with a key"),
        ({"source": "0.png", "key": "k"}, "identity_digest: must be set"),
        ({"source": "0.png", "key": "k", "identity_digest": "0", "prompt_digest": "0"}, "identity_digest: must be 64"),
        (row(0, digest="0"), "digest: must be"),
        (row(0, create_time="yesterday"), "create_time: must be a moment"),
        (row(0, create_time=5), "create_time: must be a moment"),
        (row(0, cost_usd=0.0000001), "cost_usd: must be a sum of money"),
        (row(0, cost_usd="NaN"), "cost_usd: must be a sum of money"),
        (row(0, cost_usd=[]), "cost_usd: must be a sum of money"),
        (row(0, cost_microusd=-1), "cost_microusd: must be 0 to"),
        (row(0, cost_usd=1, cost_microusd=1), "not both"),
        (row(0, tags="a"), "tags: must be a list"),
        (row(0, spec={"prompt": "x" * 1_100_000}), "is longer than"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
async def test_a_line_that_cannot_be_imported_is_named_before_anything_is_sent(
    run: Run, write: Write, tmp_path: Path, line: Any, complaint: str
) -> None:
    result = await run("import", str(write(row(1), line)))
    assert result.exit_code == 2
    assert "line 2: " in result.stderr
    assert complaint in result.stderr
    assert images_in(tmp_path) == 0


async def test_a_link_out_of_the_directory_is_followed_only_if_allowed(run: Run, write: Write, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(small_image(1))
    file = write(row(0, source="link.png"), pictures=0)
    (file.parent / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert (await run("import", str(file))).exit_code == 2
    assert (await run("import", str(file), "--allow-any-path")).exit_code == 0


async def test_a_manifest_that_is_not_there_is_told(run: Run) -> None:
    result = await run("import", "nowhere.jsonl")
    assert (result.exit_code, "nowhere.jsonl" in result.stderr) == (1, True)


@pytest.mark.no_cover
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.recursive(st.none() | st.text(max_size=5) | st.integers(), st.lists).map(json.dumps))
def test_whatever_a_manifest_holds_it_is_complained_of(tmp_path: Path, line: bytes | str) -> None:
    file = tmp_path / "manifest.jsonl"
    file.write_bytes(line if isinstance(line, bytes) else line.encode())
    _, rows, complaints = Manifest(file).check(5)
    assert len(complaints) == min(rows, 5)


# --- export ---


async def test_what_is_exported_comes_back_byte_for_byte_under_the_same_keys(
    run: Run, service: Service, provider: OpenAIStandIn, tmp_path: Path
) -> None:
    async with AsyncClient(service.grpc_address) as client:
        for number in range(3):
            await client.get_image(f"picture {number}", n=number + 1, tags=["spring"], output_format="webp")
        await client.put(small_image(9), "a given one", paid_microusd=7)
        before = {each.identity.key: each async for each in client.admin.list_images()}
        assert len(before) == 7
        bytes_before = {key: (await client.get_by_key(key)).data for key in before}
    exported = await run("export", str(tmp_path / "out"))
    assert exported.exit_code == 0, exported.output
    assert exported.stdout.startswith("7 exported\n")
    calls = provider.calls
    async with running(env_of(tmp_path / "empty", provider)) as other:
        imported = await running_at(other)("import", str(tmp_path / "out" / "manifest.jsonl"), "--json")
        assert (imported.exit_code, printed(imported)["created"]) == (0, 7), imported.output
        async with AsyncClient(other.grpc_address) as client:
            after = {each.identity.key: each async for each in client.admin.list_images()}
            assert {key: (await client.get_by_key(key)).data for key in after} == bytes_before
            await client.get_image("picture 2", n=3, output_format="webp")
    for key, stored in after.items():
        was, image = before[key].image, stored.image
        assert (stored.identity, stored.tags) == (before[key].identity, before[key].tags)
        for fact in ("digest", "model", "quality", "background", "revised_prompt", "create_time", "paid_microusd"):
            assert getattr(image, fact) == getattr(was, fact), fact
    assert provider.calls == calls


async def test_export_run_again_fetches_only_what_is_missing(run: Run, write: Write, tmp_path: Path) -> None:
    await run("import", str(write(row(0), row(1), row(2))))
    out = tmp_path / "out"
    await run("export", str(out))
    manifest = out / "manifest.jsonl"
    whole = manifest.read_bytes()
    lines = whole.splitlines(keepends=True)
    manifest.write_bytes(lines[0] + lines[1][:20])
    (out / json.loads(lines[0])["source"]).write_bytes(b"left alone")
    assert printed(await run("export", str(out), "--json")) == {"exported": 2, "done_before": 1, "gone": 0}
    assert manifest.read_bytes() == whole
    assert (out / json.loads(lines[0])["source"]).read_bytes() == b"left alone"
    assert (out / json.loads(lines[1])["source"]).read_bytes() in [small_image(number) for number in range(3)]


async def test_export_without_images_is_a_list_and_no_import(run: Run, write: Write, tmp_path: Path) -> None:
    await run("import", str(write(row(0, cost_usd="0.04"))))
    out = tmp_path / "out"
    assert (await run("export", str(out), "--no-images")).exit_code == 0
    [listed] = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert (listed["cost_microusd"], "source" in listed) == (40_000, False)
    assert [each.name for each in out.iterdir()] == ["manifest.jsonl"]
    other_kind = await run("export", str(out))
    assert (other_kind.exit_code, "another kind" in other_kind.stderr) == (2, True)
    refused = await run("import", str(out / "manifest.jsonl"))
    assert (refused.exit_code, "line 1: source: must be set" in refused.stderr) == (2, True)


async def test_export_passes_over_what_is_gone_meanwhile(
    run: Run, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run("import", str(write(row(0), row(1))))
    [first, *_] = sorted((tmp_path / "data/images/v1").rglob("v1.*"))
    fetched = export._fetched

    def gone_first(*args: Any) -> Any:
        first.unlink(missing_ok=True)
        return fetched(*args)

    monkeypatch.setattr(export, "_fetched", gone_first)
    assert printed(await run("export", str(tmp_path / "out"), "--json")) == {
        "exported": 1,
        "done_before": 0,
        "gone": 1,
    }
