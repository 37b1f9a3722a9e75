"""How long a newcomer waits for the first picture, and an operator for a restart.

Measured, in a fresh copy of the checkout (what git tracks or would), where no `.venv` is and pip caches nothing: the
time from `scripts/serve` to the end of the first `cacheserver get "a red fox"` that brought a picture, downloads
included; then, the service stopped, the time from a second `scripts/serve` until it takes calls.

Against: 90 s and 5 s. The service's own defaults apply, with the local painter as upstream; only the ports are
free ones. Packages come from wherever pip is set up to find them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cacheserver.embedded.child import free_ports
from scripts.bench.figures import print_table, print_verdict, write_json

FIRST_ANSWER_LIMIT_S = 90.0
SECOND_START_LIMIT_S = 5.0

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE_S = 600.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.05


class Checkout:
    """A fresh copy of the checkout, and the service run out of it."""

    def __init__(self, root: Path) -> None:
        for name in _files():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_ROOT / name, root / name)
        self._root = root
        self._grpc_port, self._http_port = free_ports(2)
        # A newcomer has nothing set up: no upstream, no settings, no environment of Python's.
        foreign = ("CACHESERVER_", "OPENAI_", "AWS_", "VIRTUAL_ENV", "PYTHON")
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._env["PIP_NO_CACHE_DIR"] = "1"

    @contextmanager
    def served(self) -> Iterator[None]:
        """The service, from the moment `scripts/serve` is typed until it has stopped."""
        ports = ["--grpc-port", str(self._grpc_port), "--http-port", str(self._http_port)]
        command = [str(self._root / "scripts" / "serve"), *ports]
        # A session of its own, so that what a failed start leaves running can be ended as one.
        process = subprocess.Popen(command, cwd=self._root, env=self._env, start_new_session=True)  # noqa: S603 - ours
        try:
            self._wait_until_ready(process)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def get(self) -> int:
        """Ask for a picture as a newcomer does; its size in bytes."""
        picture = self._root / "fox.png"
        address = f"127.0.0.1:{self._grpc_port}"
        command = [str(self._root / ".venv" / "bin" / "cacheserver"), "get", "a red fox", "-o", str(picture)]
        subprocess.run([*command, "--address", address], cwd=self._root, env=self._env, check=True)  # noqa: S603 - ours
        return picture.stat().st_size

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("scripts/serve did not start the service")
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}/readyz", timeout=1):
                return True
        except (urllib.error.URLError, TimeoutError):
            return False


def _files() -> list[str]:
    """What git tracks in the checkout, and what it would if it were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True)  # noqa: S603 - git, by name
    return [name for name in listed.stdout.split("\0") if (_ROOT / name).is_file()]


def main(*, json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None) -> None:
    """Time from nothing to the first picture, and of a second start."""
    with tempfile.TemporaryDirectory(prefix="checkout-") as directory:
        checkout = Checkout(Path(directory))
        typed_s = time.monotonic()
        with checkout.served():
            ready_s = time.monotonic() - typed_s
            size_bytes = checkout.get()
            first_answer_s = time.monotonic() - typed_s
        typed_s = time.monotonic()
        with checkout.served():
            second_start_s = time.monotonic() - typed_s
    figures = (
        ("first answer", first_answer_s, FIRST_ANSWER_LIMIT_S),
        ("second start", second_start_s, SECOND_START_LIMIT_S),
    )
    shortfalls = [f"{name}: {took_s:.1f} s" for name, took_s, limit_s in figures if took_s >= limit_s]
    print_table(
        f"From a fresh checkout: ready after {ready_s:.1f} s, a picture of {size_bytes:,} bytes",
        ("", "took", "must be under"),
        [(name, f"{took_s:.1f} s", f"{limit_s:g} s") for name, took_s, limit_s in figures],
    )
    print_verdict(shortfalls)
    result = {"first_ready_s": ready_s, "first_answer_s": first_answer_s, "second_start_s": second_start_s}
    write_json(json, "first_answer", {**result, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
