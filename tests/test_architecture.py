"""The dependency rule: values <- interfaces <- cache <- {rpc, http, cli} <- app, and libraries in their rooms."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import cacheserver

PACKAGE = Path(cacheserver.__file__).parent

VALUES = {"model", "figures", "errors", "interfaces", "epochs", "clock", "tasks", "images"}
MAY_IMPORT: dict[str, set[str]] = {
    "model": set(),
    "figures": {"model"},
    "errors": {"model"},
    "interfaces": {"model", "figures", "errors"},
    "epochs": {"model"},
    "clock": set(),
    "tasks": {"errors", "interfaces"},
    "images": set(),
    "log": set(),
    "machine": set(),
    "allocator": set(),
    "loop_first": set(),
    "identity": VALUES,
    "tiers": VALUES | {"loop_first"},
    "generation": VALUES,
    "accounting": VALUES,
    "alarms": VALUES,
    "embedded": VALUES,
    "freshness": VALUES,
    "tending": VALUES | {"keep"},
    "flight": VALUES | {"freshness", "identity"},
    "variants": VALUES,
    "control": VALUES | {"tiers"},
    "journal": VALUES | {"tiers"},
    "undrained": VALUES,
    "keep": VALUES | {"tiers", "journal", "undrained"},
    "orphans": VALUES | {"keep", "undrained"},
    "backpressure": VALUES | {"journal"},
    "pressure": VALUES | {"tiers", "machine"},
    "coherence": VALUES,
    "purge": VALUES | {"tiers", "keep", "coherence"},
    "paying": VALUES | {"flight", "backpressure"},
    "reviews": VALUES | {"tiers", "keep"},
    "oversight": VALUES | {"coherence"},
    "imports": VALUES | {"keep"},
    "renditions": VALUES | {"images", "tiers", "keep", "loop_first"},
    "remakes": VALUES,
    "rungs": VALUES,
    "recall": VALUES | {"identity"},
    "precheck": VALUES | {"identity"},
    "resent": VALUES | {"flight"},
    "alone": VALUES | {"flight", "paying", "resent"},
    "carrying": VALUES | {"identity", "flight", "keep"},
    "matching": VALUES | {"flight", "identity"},
    "similarity": VALUES | {"identity", "generation"},
    "leasing": VALUES,
    "deriving": VALUES | {"carrying", "identity", "flight", "keep", "renditions"},
    "cache": VALUES
    | {"tiers", "flight", "keep", "purge", "paying", "resent", "alone", "variants", "reviews", "remakes", "rungs"}
    | {"carrying", "matching", "leasing", "deriving", "backpressure", "coherence", "freshness", "tending"},
    "settings": VALUES | {"identity", "machine", "tiers"},
    "calls": VALUES | {"cache", "identity", "precheck", "recall"},
    "http": VALUES | {"cache", "calls", "identity", "generation", "renditions"},
    "warming": VALUES | {"keep", "cache"},
    "rpc": VALUES
    | {"cache", "calls", "purge", "imports", "warming", "identity", "accounting", "generation"}
    | {"oversight", "precheck", "recall", "pb"},
    "whatif": VALUES | {"identity", "generation", "tiers"},
    "client": {"pb", "model"},
    "reports": {"client", "model"},
    "pb": {"pb"},
}
"""What each room may import of ours, besides itself. cli/ and app.py see everything: they put it together."""

LIBRARIES: dict[str, set[str]] = {
    "grpc": {"rpc", "client", "pb"},
    "grpc_health": {"rpc"},
    "grpc_reflection": {"rpc"},
    "google": {"rpc", "client", "pb"},
    "redis": {"tiers/redis.py", "tiers/redis_client.py", "control"},
    "boto3": {"tiers/s3_client.py"},
    "botocore": {"tiers/s3.py", "tiers/s3_client.py", "tiers/s3_requests.py", "tiers/objects.py"},
    "orjson": {"log"},
    "opencc": {"identity"},
    "spellchecker": {"identity"},
    "numpy": {"similarity"},
    "faiss": {"similarity"},
    "PIL": {"generation", "images", "renditions"},
    "aiohttp": {"generation"},
    "httpx": {"generation", "similarity", "alarms", "cli", "embedded", "client/openai.py"},
    "starlette": {"http", "app"},
    "python_multipart": {"http"},
    "uvicorn": {"http"},
    "prometheus_client": {"accounting", "http", "app", "cli"},
    "pydantic": {"settings"},
    "pydantic_settings": {"settings"},
    "typer": {"cli"},
    "rich": {"cli"},
    "altair": {"reports/charts.py"},
    "vl_convert": {"reports/charts.py"},
}
"""Where a library may be imported; everywhere else its place is taken by an interface of ours."""


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imports(file: Path) -> frozenset[str]:
    return frozenset(_imports(file))


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module or ""
            if node.module == "cacheserver":
                yield from (f"cacheserver.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_rule() -> None:
    assert {room(file) for file in FILES} == {*MAY_IMPORT, "cli", "app", "__init__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below_it(file: Path) -> None:
    here = room(file)
    if here in {"cli", "app", "__init__"}:
        return
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("cacheserver.")}
    assert ours - {here} <= MAY_IMPORT[here]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_library_stays_in_its_room(file: Path) -> None:
    here = {room(file), str(file.relative_to(PACKAGE))}
    for library in {name.split(".")[0] for name in imports(file)} & LIBRARIES.keys():
        assert here & LIBRARIES[library], f"{library} in {file.relative_to(PACKAGE)}"
