"""`scripts/deploy/Dockerfile` and `compose.yaml`, without Docker: what they say is looked at, and run by hand."""

from __future__ import annotations

import fnmatch
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import httpx
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from cacheserver.embedded.child import free_ports
from cacheserver.settings import environment_names, load_settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "scripts" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")


# ---- The image


def parsed(dockerfile: str) -> DockerfileParser:
    file = io.BytesIO(dockerfile.encode())
    return DockerfileParser(fileobj=file)


def steps(dockerfile: str, name: str) -> list[str]:
    return [step["value"] for step in parsed(dockerfile).structure if step["instruction"] == name]


def is_sent(path: str) -> bool:
    """Whether a path of the checkout is in the build's context: the last line that fits decides."""
    sent = True
    for line in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        if fnmatch.fnmatch(path, line.removeprefix("!")):
            sent = line.startswith("!")
    return sent


def faults(dockerfile: str) -> Iterator[str]:
    """What would not build, or not run as it should."""
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD", "COMMENT"}
    yield from {step["instruction"] for step in parsed(dockerfile).structure} - known
    stages = {value.partition(" AS ")[2] for value in steps(dockerfile, "FROM")}
    for words in map(str.split, steps(dockerfile, "COPY")):
        if words[0].startswith("--from="):
            if words[0].removeprefix("--from=") not in stages:
                yield f"no stage {words[0]}"
        else:
            yield from (f"no {path}" for path in words[:-1] if not ((ROOT / path).exists() and is_sent(path)))
    for user in steps(dockerfile, "USER")[-1:] or ["root"]:
        if not user.partition(":")[0].isdigit() or user.startswith("0"):
            yield f"user {user}"
    names = environment_names()
    env = parsed(dockerfile).envs
    yield from (f"no setting {name}" for name in env if name.startswith("CACHESERVER_") and name not in names)
    if env.get("CACHESERVER_DATA_DIR") not in steps(dockerfile, "VOLUME"):
        yield "the data is in no volume"


def test_the_dockerfile_copies_what_there_is_and_runs_as_nobody() -> None:
    assert list(faults(DOCKERFILE)) == []


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("COPY cacheserver ", "COPY cacheservers "),
        ("COPY cacheserver ", "COPY protos "),  # which is there, and not sent
        ("--from=build", "--from=built"),
        ("USER 10001:10001", "USER 0"),
        ("USER 10001:10001\n", ""),
        ("CACHESERVER_SERVER__GRPC_HOST", "CACHESERVER_SERVER__GRPC_HOTS"),
        ("VOLUME /data", "VOLUME /date"),
        ("EXPOSE", "EXPOZE"),
    ],
)
def test_a_dockerfile_with_a_fault_is_not_taken(good: str, bad: str) -> None:
    assert good in DOCKERFILE
    assert len(list(faults(DOCKERFILE.replace(good, bad)))) == 1


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of what the Dockerfile copies, made and installed on its own."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "src"
    source.mkdir()
    for words in map(str.split, steps(DOCKERFILE, "COPY")):
        if not words[0].startswith("--from="):
            for path in words[:-1]:
                (source / path).symlink_to(ROOT / path)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", directory, source], check=True)  # noqa: S603 - ours
    (wheel,) = directory.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", directory / "site", wheel], check=True)  # noqa: S603
    return directory / "site"


@pytest.mark.timeout(180)
def test_what_the_image_runs_serves_and_writes_nothing_beside_its_data(installed: Path, tmp_path: Path) -> None:
    data, elsewhere, cwd = (tmp_path / name for name in ("data", "tmp", "cwd"))
    for directory in (data, elsewhere, cwd):
        directory.mkdir()
    grpc_port, http_port = free_ports(2)
    (entrypoint,), (command,) = steps(DOCKERFILE, "ENTRYPOINT"), steps(DOCKERFILE, "CMD")
    (program,) = json.loads(entrypoint)
    arguments = json.loads(command)
    environment = {name: value for name, value in parsed(DOCKERFILE).envs.items() if name != "PATH"}
    environment |= {
        "CACHESERVER_DATA_DIR": str(data),
        "CACHESERVER_GRPC_PORT": str(grpc_port),
        "CACHESERVER_HTTP_PORT": str(http_port),
        "CACHESERVER_INSECURE": "true",
        "OPENAI_API_KEY": "sk-test",
        "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
        "PYTHONPATH": str(installed),
        "TMPDIR": str(elsewhere),
        "HOME": str(cwd),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - ours
            [installed / "bin" / program, *arguments], env=environment, cwd=cwd, stdout=log, stderr=log
        )
    try:
        assert is_ready(f"http://127.0.0.1:{http_port}/readyz", process), (tmp_path / "log").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert list(data.iterdir())
    assert list(elsewhere.iterdir()) == list(cwd.iterdir()) == []


def is_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    ends_s = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < ends_s:
        try:
            return httpx.get(url, trust_env=False).is_success
        except httpx.TransportError:
            time.sleep(0.05)  # not listening yet
    return False


# ---- Compose


def composed(text: str) -> dict[str, Any]:
    """The services, by what Compose takes: ValueError otherwise. The anchors are YAML's affair."""
    made: dict[str, Any] = yaml.safe_load(text)
    compose_spec.PyCompose.from_json(json.dumps(made))
    services: dict[str, Any] = made["services"]
    return services


REPLICAS = {name: service for name, service in composed(COMPOSE).items() if "build" in service}


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("read_only: true", "read_onl: true"),
        ("restart: unless-stopped", "restart: perhaps"),
        ("condition: service_started", "condition: maybe"),
        ("127.0.0.1:8080:8080", "127.0.0.1:8080:http"),
        ("\nvolumes:\n", "\nvolums:\n"),
    ],
)
def test_a_compose_file_with_a_fault_is_refused(good: str, bad: str) -> None:
    assert good in COMPOSE
    with pytest.raises(ValueError, match=r"."):
        composed(COMPOSE.replace(good, bad))


def test_two_replicas_have_all_in_common_but_their_data_and_their_port() -> None:
    a, b = REPLICAS.values()
    assert {name for name in a if a[name] != b[name]} == {"volumes", "ports"}
    assert a["read_only"] is True
    assert (DEPLOY / a["build"]["context"]).resolve() == ROOT
    assert (ROOT / a["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("name", REPLICAS)
def test_a_replicas_environment_is_one_that_the_service_starts_with(name: str) -> None:
    told = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": "", "URL_SECRET": "s" * 32}
    environment = parsed(DOCKERFILE).envs | REPLICAS[name]["environment"]
    for setting, value in environment.items():
        if value.startswith("${"):
            environment[setting] = told[value.strip("${}").partition(":")[0]]
    settings = load_settings(None, environment)
    assert settings.redis.url is not None
    assert settings.s3.bucket == "images"
    assert 2 * settings.server.drain_timeout_s <= int(REPLICAS[name]["stop_grace_period"].removesuffix("s"))
    assert settings.server.drain_timeout_s >= settings.upstreams[0].read_timeout_s


def test_files_that_compose_mounts_are_there_and_its_volumes_are_declared() -> None:
    mounts = [mount.split(":")[0] for service in composed(COMPOSE).values() for mount in service.get("volumes", [])]
    named = [mount for mount in mounts if not mount.startswith(".")]
    assert sorted(named) == sorted(yaml.safe_load(COMPOSE)["volumes"])
    assert all((DEPLOY / mount).is_file() for mount in mounts if mount.startswith("."))


def test_envoy_asks_for_the_replicas_by_the_name_that_they_share() -> None:
    envoy = yaml.safe_load((DEPLOY / "envoy.yaml").read_text(encoding="utf-8"))["static_resources"]
    (endpoint,) = envoy["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    host = endpoint["endpoint"]["address"]["socket_address"]["address"]
    assert all(host in replica["networks"]["default"]["aliases"] for replica in REPLICAS.values())
    published = envoy["listeners"][0]["address"]["socket_address"]["port_value"]
    assert composed(COMPOSE)["envoy"]["ports"] == [f"127.0.0.1:{published}:{published}"]
