"""What operators load into Prometheus and Grafana, and read at night: it names what there is and leads somewhere."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main

from cacheserver.cli import app
from cacheserver.model import AlarmKind
from cacheserver.settings import load_settings, setting_names
from tests.provider import OpenAIStandIn
from tests.running import ask, calling, environment, running

DEPLOY = Path(__file__).parent.parent / "scripts" / "deploy"
RUNBOOK = (DEPLOY / "RUNBOOK.md").read_text(encoding="utf-8")
RUNBOOK_URL = "https://github.com/cacheserver/cacheserver/blob/main/scripts/deploy/RUNBOOK.md"

_METRIC = re.compile(r"\bcacheserver_[a-z0-9_]+")
_SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}


# ---- The files


class YamlReader:
    """The YAML that alerts.yml is written in: maps and lists by indentation, texts in one line or behind `|`.

    It refuses all else, so that it cannot take for granted what Prometheus would read otherwise.
    """

    def __init__(self, text: str) -> None:
        lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
        self._lines = [(len(line) - len(line.lstrip(" ")), line.strip()) for line in lines]

    def read(self) -> Any:
        value = self._block(0)
        assert not self._lines, f"not understood: {self._lines[0]}"
        return value

    def _block(self, indent: int) -> Any:
        is_list = self._lines[0][1].startswith("- ")
        made: Any = [] if is_list else {}
        while self._lines and self._lines[0][0] == indent and self._lines[0][1].startswith("- ") is is_list:
            if is_list:
                self._lines[0] = (indent + 2, self._lines[0][1].removeprefix("- "))
                made.append(self._block(indent + 2))
            else:
                name, _, text = self._lines.pop(0)[1].partition(":")
                assert re.fullmatch(r"[a-z_]+", name), f"no name of a field: {name}"
                assert name not in made, f"twice: {name}"
                made[name] = self._value(text.strip(), indent)
        return made

    def _value(self, text: str, indent: int) -> Any:
        if text == "|":
            return "\n".join(line for _, line in self._deeper(indent))
        if not text:
            return self._block(self._lines[0][0])
        if text.startswith('"'):
            return json.loads(text)
        assert not re.search(r"""^[\[{'&*!>%@`]|: | #""", text), f"not in quotes: {text}"
        return text

    def _deeper(self, indent: int) -> Iterator[tuple[int, str]]:
        while self._lines and self._lines[0][0] > indent:
            yield self._lines.pop(0)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading: lower case, without punctuation, hyphens for blanks."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


RULES: list[dict[str, Any]] = [
    rule
    for group in YamlReader((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")).read()["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
HEADINGS = re.findall(r"(?m)^## (.+)$", RUNBOOK)
SECTIONS = dict(zip(HEADINGS, re.split(r"(?m)^## .+$", RUNBOOK)[1:], strict=True))
IN_CODE = re.findall(r"`([^`\n]+)`", re.sub(r"(?s)```.*?```", "", RUNBOOK).replace("\n", " "))


def expressions() -> list[str]:
    targets = (target for panel in PANELS for target in panel.get("targets", []))
    return [*(rule["expr"] for rule in RULES), *(target["expr"] for target in targets)]


# ---- The reader, where it must not be lenient


def test_the_reader_reads_what_is_written() -> None:
    text = 'a:\n  - b: 1m\n    c: |\n      x > 1\n        and y\n    d: "e: #f"\n  - b: g\n'
    assert YamlReader(text).read() == {"a": [{"b": "1m", "c": "x > 1\nand y", "d": "e: #f"}, {"b": "g"}]}


@pytest.mark.parametrize(
    "text", ["a: {b: c}", "a: 'b'", "a: b: c", "a: b # c", "a: *b", "a: b\na: c", "A B: c", "a: >"]
)
def test_the_reader_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        YamlReader(text).read()


# ---- Alerts


def test_alerts_and_headings_of_the_runbook_are_the_same_names() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    assert len(set(HEADINGS)) == len(HEADINGS)
    assert set(names) == set(HEADINGS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_since_when_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"[1-9]\d*[smh]", rule["for"])
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert annotations["summary"]
    assert annotations["description"]
    page, _, anchor = annotations["runbook_url"].partition("#")
    assert page == RUNBOOK_URL
    assert anchor == slug(rule["alert"])
    assert anchor in map(slug, HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_section_of_the_runbook_has_sign_check_and_action(heading: str) -> None:
    assert re.findall(r"(?m)^\*\*(\w+)\.\*\*", SECTIONS[heading]) == ["Sign", "Check", "Action"]


@pytest.mark.parametrize("kind", AlarmKind)
def test_a_notice_of_every_kind_leads_to_a_section(kind: AlarmKind, tmp_path: Path) -> None:
    file = tmp_path / "cacheserver.toml"
    file.write_text(f'[[alarms]]\nname = "mine"\nkind = "{kind}"\nthreshold = 0.5')
    mine = load_settings(file, {}).alarm_rules[-1]
    page, _, anchor = mine.runbook_url.partition("#")
    assert page == RUNBOOK_URL
    assert anchor in map(slug, HEADINGS)
    assert f"`{kind}`" in RUNBOOK


# ---- The runbook


def test_links_within_the_runbook_lead_somewhere() -> None:
    anchors = re.findall(r"\]\(#([^)]+)\)", RUNBOOK)
    assert anchors
    assert set(anchors) <= set(map(slug, HEADINGS))
    for path in re.findall(r"\]\(([^)#:]+)\)", RUNBOOK):
        assert (DEPLOY / path).is_file()


def commands() -> list[str]:
    blocks = itertools.chain.from_iterable(block.splitlines() for block in re.findall(r"(?s)```sh\n(.*?)```", RUNBOOK))
    lines = [*blocks, *IN_CODE]
    return sorted({line.partition("#")[0].strip() for line in lines if line.startswith("cacheserver ")})


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_runbook_is_one(line: str) -> None:
    words = shlex.split(line.partition(">")[0])[1:]
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands"):  # alone, it lists
        assert not words
        return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known


def test_settings_that_the_runbook_names_are_settings() -> None:
    tables = {name.rpartition(".")[0] for name in setting_names()}
    named = {each.partition(" ")[0] for each in IN_CODE if re.match(r"[a-z0-9_]+\.[a-z_]+( = |$)", each)}
    assert {"generation.when_unknown", "alerting.webhook_url"} <= named
    assert {each for each in named if each.rpartition(".")[0] in tables} <= set(setting_names())
    assert {each.rpartition(".")[0] for each in named} <= tables


# ---- Metrics


async def served_metrics(tmp_path: Path) -> set[str]:
    """The names of all series that a service which has served a call has, or can have."""
    config = "[budget]\nper_day_microusd = 1_000_000"
    async with OpenAIStandIn() as provider, running(environment(tmp_path, provider=provider), config) as service:
        async with calling(service) as stub:
            await stub.GetImage(ask("a red fox"))
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"http://{service.http_address}/metrics")).text
    types = re.findall(r"(?m)^# TYPE (\S+) (\S+)$", text)
    return {name + suffix for name, kind in types for suffix in _SUFFIXES[kind]}


async def test_every_metric_that_is_looked_at_is_served(tmp_path: Path) -> None:
    served = await served_metrics(tmp_path)
    named = {name for expression in expressions() for name in _METRIC.findall(expression)}
    named |= {name for code in IN_CODE for name in _METRIC.findall(code)}
    assert len(named) > 25
    assert named - served == set()


# ---- The dashboard


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert {"title", "uid", "panels", "templating", "time", "annotations"} <= DASHBOARD.keys()
    variables = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "namespace": "query"}
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_asks_the_chosen_source(panel: dict[str, Any]) -> None:
    if panel["type"] == "row":
        return
    assert panel["description"]
    assert panel["type"] in {"timeseries", "stat", "bargauge"}
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    names = [target["refId"] for target in panel["targets"]]
    assert names == sorted(set(names))
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert target["legendFormat"]
        assert set(re.findall(r"\$(\w+)", target["expr"])) <= {"namespace", "__rate_interval"}


def test_no_two_panels_lie_on_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells
