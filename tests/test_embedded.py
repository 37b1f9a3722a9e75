"""Our own Valkey and S3 server: they keep data, die with us, come back, and say why they cannot start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import boto3
import pytest

from cacheserver.embedded import child, seaweed, valkey
from cacheserver.embedded.child import Program, SocketDirectory, SupervisedChild
from cacheserver.embedded.lock import DirectoryLock
from cacheserver.embedded.seaweed import LocalS3
from cacheserver.embedded.valkey import EmbeddedValkey
from cacheserver.errors import ConfigError
from tests.fakes import FakeClock
from tests.waiting import until

_MAX_BYTES = 64 * 1024 * 1024

_Server = TypeVar("_Server", EmbeddedValkey, LocalS3)


class _RealClock:
    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def _execute(server: EmbeddedValkey, *command: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(unquote(urlsplit(server.url).path))
    try:
        writer.write(b"*%d\r\n" % len(command))
        writer.writelines(b"$%d\r\n%s\r\n" % (len(word), word) for word in command)
        line = await reader.readline()
        if line.startswith(b"$") and line != b"$-1\r\n":
            return (await reader.readexactly(int(line[1:]) + 2))[:-2]
        return line.strip()
    finally:
        writer.close()
        await writer.wait_closed()


def _valkey(data_dir: Path) -> EmbeddedValkey:
    return EmbeddedValkey(data_dir=data_dir, max_bytes=_MAX_BYTES, clock=_RealClock())


@contextlib.asynccontextmanager
async def _running(server: _Server) -> AsyncIterator[_Server]:
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def _supervised(
    directory: Path, script: str, clock: FakeClock, *, is_ready: Callable[[], bool] = lambda: True
) -> AsyncIterator[SupervisedChild]:
    async def ready() -> bool:
        return is_ready()

    lock = await DirectoryLock.acquire(directory, clock=clock)
    program = Program(name="sleeper", argv=["sh", "-c", script], log_file=directory / "sleeper.log", stop_timeout_s=0.2)
    supervised = SupervisedChild(program, lock_fd=lock.fd, is_ready=ready, clock=clock)
    try:
        yield supervised
    finally:
        await supervised.stop()
        lock.release()


async def test_valkey_keeps_its_data_across_a_restart(tmp_path: Path) -> None:
    async with _running(_valkey(tmp_path)) as server:
        assert await _execute(server, b"SET", b"a", b"1") == b"+OK"
    async with _running(_valkey(tmp_path)) as server:
        assert await _execute(server, b"GET", b"a") == b"1"


async def test_valkey_may_evict_only_what_expires_and_holds_its_bound(tmp_path: Path) -> None:
    async with _running(_valkey(tmp_path)) as server:
        info = await _execute(server, b"INFO", b"memory")
    assert b"maxmemory:%d" % _MAX_BYTES in info
    assert b"maxmemory_policy:volatile-lfu" in info


async def test_valkey_is_started_again_with_its_data_when_it_dies(tmp_path: Path) -> None:
    async with _running(_valkey(tmp_path)) as server:
        await _execute(server, b"SET", b"a", b"1")
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: server.pid not in (None, first))
        await until(lambda: _still_has_it(server))


async def _still_has_it(server: EmbeddedValkey) -> bool:
    try:
        return await _execute(server, b"GET", b"a") == b"1"
    except OSError:
        return False


async def test_valkey_is_private_to_this_user(tmp_path: Path) -> None:
    async with _running(_valkey(tmp_path)):
        for path in (tmp_path / "valkey", tmp_path / "valkey" / "valkey.sock"):
            assert path.stat().st_mode & 0o077 == 0


async def test_a_long_data_dir_still_gets_a_socket(tmp_path: Path) -> None:
    data_dir = tmp_path / ("d" * 120)
    async with _running(_valkey(data_dir)) as server:
        socket = Path(unquote(urlsplit(server.url).path))
        assert await _execute(server, b"PING") == b"+PONG"
        assert (data_dir / "valkey" / "appendonlydir").is_dir()
    assert not socket.parent.exists()


async def test_a_data_dir_with_odd_characters_makes_a_sound_url(tmp_path: Path) -> None:
    async with _running(_valkey(tmp_path / "a b%20?ü")) as server:
        assert await _execute(server, b"PING") == b"+PONG"


async def test_a_second_service_on_one_data_dir_is_refused(tmp_path: Path) -> None:
    async with _running(_valkey(tmp_path)) as server:
        with pytest.raises(ConfigError, match=rf"data_dir: {tmp_path}.* in use by another .*process {os.getpid()}"):
            await _valkey(tmp_path).start()
        assert await _execute(server, b"PING") == b"+PONG"


async def test_a_service_that_cannot_start_its_valkey_says_why_and_lets_go_of_the_data_dir(tmp_path: Path) -> None:
    (tmp_path / "valkey").mkdir()
    (tmp_path / "valkey" / "appendonlydir").write_text("not a directory")
    with pytest.raises(ConfigError, match=r"embedded Valkey ended while starting; its last lines in .*append"):
        await _valkey(tmp_path).start()
    (tmp_path / "valkey" / "appendonlydir").unlink()
    async with _running(_valkey(tmp_path)):
        pass


async def test_without_a_binary_valkey_is_not_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert valkey.available()
    monkeypatch.setattr(valkey, "get_binary_path", None)
    assert not valkey.available()
    with pytest.raises(ConfigError, match=r"redis\.embedded"):
        await _valkey(tmp_path).start()


async def test_on_a_platform_without_a_binary_valkey_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Plan9")
    assert not valkey.available()


_OWNER = """
import asyncio, sys, time
from pathlib import Path
from cacheserver.embedded.{module} import {name}

class Clock:
    now_s = staticmethod(time.time)
    monotonic_s = staticmethod(time.monotonic)
    sleep = staticmethod(asyncio.sleep)

async def main():
    server = {name}(data_dir=Path(sys.argv[1]), clock=Clock() {more})
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("module", "name", "more"), [("valkey", "EmbeddedValkey", f", max_bytes={_MAX_BYTES}"), ("seaweed", "LocalS3", "")]
)
async def test_a_server_dies_with_a_service_that_is_killed_and_the_next_service_takes_over(
    tmp_path: Path, module: str, name: str, more: str
) -> None:
    script = _OWNER.format(module=module, name=name, more=more)
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert owner.stdout is not None
    pid = int(await owner.stdout.readline())
    assert _is_running(pid)
    owner.kill()
    await owner.wait()
    # Started at once, while the old server is still ending.
    server = _valkey(tmp_path) if module == "valkey" else LocalS3(data_dir=tmp_path, clock=_RealClock())
    await server.start()
    await server.stop()
    await until(lambda: not _is_running(pid))


async def test_local_s3_takes_puts_at_once_and_keeps_them_across_a_restart(tmp_path: Path) -> None:
    async with _running(LocalS3(data_dir=tmp_path, clock=_RealClock())) as server:
        await asyncio.to_thread(_s3(server).put_object, Bucket=server.bucket, Key="a", Body=b"1")
        first = (server.endpoint, server.secret_key)
    async with _running(LocalS3(data_dir=tmp_path, clock=_RealClock())) as server:
        assert (server.endpoint, server.secret_key) == first
        assert (await asyncio.to_thread(_s3(server).get_object, Bucket=server.bucket, Key="a"))["Body"].read() == b"1"


async def test_local_s3_moves_to_other_ports_when_one_is_taken_and_keeps_its_data(tmp_path: Path) -> None:
    async with _running(LocalS3(data_dir=tmp_path, clock=_RealClock())) as server:
        await asyncio.to_thread(_s3(server).put_object, Bucket=server.bucket, Key="a", Body=b"1")
        first = server.endpoint
    port = urlsplit(first).port
    squatter = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
    async with squatter, _running(LocalS3(data_dir=tmp_path, clock=_RealClock())) as server:
        assert server.endpoint != first
        assert (await asyncio.to_thread(_s3(server).get_object, Bucket=server.bucket, Key="a"))["Body"].read() == b"1"


async def test_local_s3_keeps_its_secret_from_others(tmp_path: Path) -> None:
    async with _running(LocalS3(data_dir=tmp_path, clock=_RealClock())):
        assert [(tmp_path / "s3" / name).stat().st_mode & 0o077 for name in ("account.json", "s3.json")] == [0, 0]


async def test_without_seaweedfs_local_s3_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(seaweed, "weed_binary", lambda: None)
    with pytest.raises(ConfigError, match=r"--local-s3: .*cacheserver\[local-s3\]"):
        await LocalS3(data_dir=tmp_path, clock=_RealClock()).start()


def _s3(server: LocalS3) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )


async def test_a_child_that_keeps_dying_is_started_ever_more_slowly(tmp_path: Path, clock: FakeClock) -> None:
    runs = tmp_path / "runs"
    async with _supervised(tmp_path, f"echo run >> {runs}", clock) as supervised:
        await supervised.start()
        for restarts, backoff_s in enumerate([0.1, 0.2, 0.4, 0.8], start=1):
            await until(lambda: clock.sleepers == 2)  # the log's and the backoff's
            clock.advance(backoff_s * 0.9)
            assert clock.sleepers == 2
            clock.advance(backoff_s * 0.2)
            await until(lambda: runs.read_text().count("run") == restarts + 1)  # noqa: B023 - awaited here


async def test_a_child_that_dies_after_a_steady_run_is_started_again_at_once(tmp_path: Path, clock: FakeClock) -> None:
    async with _supervised(tmp_path, "exec sleep 60", clock) as supervised:
        await supervised.start()
        for _ in range(3):
            clock.advance(61)
            pid = supervised.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: clock.sleepers == 2)
            clock.advance(0.11)
            await until(lambda: supervised.pid is not None)


async def test_a_child_that_is_never_ready_is_ended_and_its_last_lines_are_quoted(
    tmp_path: Path, clock: FakeClock
) -> None:
    def never() -> bool:
        clock.advance(10)
        return False

    async with _supervised(tmp_path, "echo cannot open the gate; exec sleep 60", clock, is_ready=never) as supervised:
        start = asyncio.create_task(supervised.start())
        await until(lambda: bool(clock.sleepers))
        await until(lambda: "gate" in (tmp_path / "sleeper.log").read_text())
        while not start.done():
            clock.advance(1)
            await asyncio.sleep(0)
        with pytest.raises(ConfigError, match=r"sleeper was not ready after 60 s; .*: cannot open the gate"):
            await start
        assert supervised.pid is None


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path, clock: FakeClock) -> None:
    trapped = tmp_path / "trapped"
    script = f"trap '' TERM; touch {trapped}; while :; do sleep 60; done"
    async with _supervised(tmp_path, script, clock, is_ready=trapped.exists) as supervised:
        start = asyncio.create_task(supervised.start())
        await until(trapped.exists)  # as long as that takes: no time passes meanwhile
        while not start.done():
            clock.advance(0.1)
            await asyncio.sleep(0)
        pid = supervised.pid
        assert pid is not None
        await supervised.stop()
        assert not _is_running(pid)


async def test_a_childs_log_stays_bounded(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_LOG_MAX_BYTES", 3)
    log = tmp_path / "sleeper.log"
    async with _supervised(tmp_path, "echo hello; exec sleep 60", clock) as supervised:
        await supervised.start()
        await until(lambda: clock.sleepers == 1 and log.read_text() == "hello\n")
        clock.advance(60)
        await until(lambda: log.read_text() == "")
        assert (tmp_path / "sleeper.log.1").read_text() == "hello\n"


async def test_a_child_sees_none_of_our_environment(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    log = tmp_path / "sleeper.log"
    async with _supervised(tmp_path, "env; echo end", clock) as supervised:
        await supervised.start()
        await until(lambda: log.exists() and log.read_text().endswith("end\n"))
    assert "OPENAI_API_KEY" not in log.read_text()


async def test_the_lock_waits_for_the_child_of_a_dead_service(tmp_path: Path, clock: FakeClock) -> None:
    dying = await DirectoryLock.acquire(tmp_path, clock=clock)
    (tmp_path / "lock").write_text("not a process")
    taking_over = asyncio.create_task(DirectoryLock.acquire(tmp_path, clock=clock))
    await until(lambda: clock.sleepers == 1)
    dying.release()
    clock.advance(1)
    (await taking_over).release()


async def test_the_lock_gives_up_on_a_child_that_does_not_end(tmp_path: Path, clock: FakeClock) -> None:
    stuck = await DirectoryLock.acquire(tmp_path, clock=clock)
    (tmp_path / "lock").write_text("")
    taking_over = asyncio.create_task(DirectoryLock.acquire(tmp_path, clock=clock))
    await until(lambda: clock.sleepers == 1)
    clock.advance(11)
    with pytest.raises(ConfigError, match="data_dir: "):
        await taking_over
    stuck.release()


def test_a_short_directory_holds_its_own_sockets(tmp_path: Path) -> None:
    sockets = SocketDirectory(Path("/run/x"), "a.sock")
    assert sockets.path == Path("/run/x")
    sockets = SocketDirectory(tmp_path / ("d" * 100), "a.sock")
    assert sockets.path.stat().st_mode & 0o077 == 0
    sockets.remove()
    assert not sockets.path.exists()
