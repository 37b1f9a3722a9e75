"""The chart in `scripts/deploy/helm`, rendered by Helm itself and held to the schemas of Kubernetes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from cacheserver.app.state import ProcessState
from cacheserver.http.operations import operations
from cacheserver.settings import Settings, load_settings

DEPLOY = Path(__file__).parent.parent / "scripts" / "deploy"
CHART = DEPLOY / "helm" / "cacheserver"
VERSIONS = ("1.27", "1.37")
"""The oldest Kubernetes that Chart.yaml takes, and the newest whose schemas are here."""

CONFIG = f"""
[[callers]]
name = "shop"
token_sha256 = "{"0" * 64}"
[s3]
bucket = "images"
"""
LEAST = {"existingSecret": "cacheserver", "config": CONFIG}
ALL = LEAST | {
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "serviceAccount": {"annotations": {"a/role": "cacheserver"}},
    "imagePullSecrets": [{"name": "registry"}],
    "persistence": {"storageClassName": "fast"},
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
    ],
}

# Helm is a library in Go, which is better kept out of the process of the tests.
_HELM = """
import json, sys, helm_python
chart, values = sys.argv[1], json.loads(sys.argv[2])
with helm_python.Chart.load(chart) as loaded:
    loaded.validate_schema(values)
    rendered = loaded.render(values, name="mine", namespace="prod")
print(json.dumps({"rendered": rendered, "errors": helm_python.lint(chart, values, strict=True)["errors"]}))
"""


@cache
def _helm(values: str, chart: Path) -> Any:
    run = subprocess.run([sys.executable, "-c", _HELM, chart, values], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if run.returncode:
        raise ValueError(run.stderr)
    return json.loads(run.stdout)


def rendered(values: dict[str, Any], chart: Path = CHART) -> list[dict[str, Any]]:
    """All manifests; ValueError where Helm takes chart or values for wrong."""
    told = _helm(json.dumps(values), chart)
    if told["errors"]:
        raise ValueError(told["errors"])
    texts = told["rendered"].values()
    return [copy.deepcopy(manifest) for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def validate(manifest: dict[str, Any], version: str) -> None:
    """ValidationError where Kubernetes would not take it, or does not know one of its fields."""
    kubernetes_validate.validate(manifest, version, strict=True)


def manifest(kind: str, values: dict[str, Any] = ALL, name: str = "mine") -> dict[str, Any]:
    (found,) = (each for each in rendered(values) if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def container(values: dict[str, Any] = ALL) -> dict[str, Any]:
    (found,) = manifest("StatefulSet", values)["spec"]["template"]["spec"]["containers"]
    made: dict[str, Any] = found
    return made


# ---- What Helm and Kubernetes say


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [LEAST, ALL], ids=["least", "all"])
def test_kubernetes_takes_every_manifest(values: dict[str, Any], version: str) -> None:
    kinds = []
    for each in rendered(values):
        kinds.append(each["kind"])
        if each["kind"] != "ServiceMonitor":  # the operator's own, of which Kubernetes has no schema
            validate(each, version)
    usual = ["ConfigMap", "PodDisruptionBudget", "Service", "Service", "ServiceAccount", "StatefulSet"]
    further = ["HorizontalPodAutoscaler", "ServiceMonitor"] if values is ALL else []
    assert sorted(kinds) == sorted([*usual, *further])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda it: it["spec"].update(replicas="three"),
        lambda it: it["spec"].pop("selector"),
        lambda it: it["spec"].update(replica=3),
        lambda it: it["spec"]["template"]["spec"].update(terminationGracePeriodSecond=3),
        lambda it: it["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["httpGet"].pop("port"),
        lambda it: it["spec"]["template"]["spec"]["containers"][0].update(env={"A": "b"}),
        lambda it: it["spec"]["volumeClaimTemplates"][0]["spec"].update(accessModes="ReadWriteOnce"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_broken_manifest_is_refused(spoil: Callable[[dict[str, Any]], object], version: str) -> None:
    broken = manifest("StatefulSet")
    validate(broken, version)
    spoil(broken)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken, version)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"existingSecret": ""}, "existingSecret"),
        ({"config": ""}, "config"),
        ({"replica": 3}, "'replica'"),
        ({"replicas": "three"}, "replicas"),
        ({"upstreamTimeoutSeconds": 0}, "upstreamTimeoutSeconds"),
    ],
)
def test_wrong_values_are_refused_by_their_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        rendered(LEAST | wrong)


def test_a_template_that_is_broken_is_refused(tmp_path: Path) -> None:
    for file in CHART.rglob("*.*"):
        (tmp_path / file.relative_to(CHART)).parent.mkdir(exist_ok=True)
        (tmp_path / file.relative_to(CHART)).write_text(file.read_text())
    assert rendered(LEAST, tmp_path) == rendered(LEAST)
    budget = tmp_path / "templates" / "poddisruptionbudget.yaml"
    budget.write_text(budget.read_text().replace(".Values.maxUnavailable }}", ".Values.maxUnavailable"))
    _helm.cache_clear()
    with pytest.raises(ValueError, match="poddisruptionbudget"):
        rendered(LEAST, tmp_path)


# ---- What the service needs


def started_with(values: dict[str, Any], tmp_path: Path) -> Settings:
    """The settings of a replica, with what the Secret is to have."""
    file = tmp_path / "cacheserver.toml"
    file.write_text(manifest("ConfigMap", values)["data"]["cacheserver.toml"])
    secret = {
        "OPENAI_API_KEY": "sk-test",
        "CACHESERVER_REDIS_URL": "redis://redis:6379/0",
        "CACHESERVER_DELIVERY__URL_SECRET": "s" * 32,
    }
    env = {each["name"]: each["value"] for each in container(values)["env"]}
    assert Path(env["CACHESERVER_CONFIG"]).parent == Path("/etc/cacheserver")
    return load_settings(file, env | secret)


def test_a_replica_starts_with_the_environment_and_the_config_that_it_gets(tmp_path: Path) -> None:
    settings = started_with(LEAST, tmp_path)
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    assert ports == {"grpc": settings.server.grpc_port, "http": settings.server.http_port}
    assert {each["mountPath"] for each in container()["volumeMounts"]} == {
        str(settings.data_dir),
        "/etc/cacheserver",
        "/tmp",
    }
    assert [caller.name for caller in settings.callers] == ["shop"]
    assert not settings.insecure


def test_no_variable_of_a_service_is_taken_for_a_setting() -> None:
    assert manifest("StatefulSet")["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("timeout_s", [30, 600, 1_000_000])
def test_a_replica_may_end_what_it_has_begun(timeout_s: int, tmp_path: Path) -> None:
    values = LEAST | {"upstreamTimeoutSeconds": timeout_s}
    settings = started_with(values, tmp_path)
    assert settings.server.drain_timeout_s == timeout_s
    grace_s = manifest("StatefulSet", values)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s == 2 * timeout_s + 30


def test_the_usual_grace_is_enough_for_an_upstream_that_takes_its_time(tmp_path: Path) -> None:
    settings = started_with(LEAST, tmp_path)
    assert settings.server.drain_timeout_s >= max(each.read_timeout_s for each in settings.upstreams)


def test_probes_ask_for_paths_that_are_served() -> None:
    asked = {name: container()[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    paths = {name: probe["path"] for name, probe in asked.items()}
    assert paths == {"startupProbe": "/readyz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert set(paths.values()) <= served_paths()
    assert {probe["port"] for probe in asked.values()} == {"http"}


def served_paths() -> set[str]:
    routes = operations(ProcessState(registry=CollectorRegistry(), is_ready=lambda: True, tiers=dict))
    return {route.path for route in routes if isinstance(route, Route)}


def test_nothing_runs_as_root_or_writes_outside_its_volumes() -> None:
    pod = manifest("StatefulSet")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
    assert "USER 10001:10001" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_secrets_are_referred_to_and_in_no_manifest() -> None:
    assert container()["envFrom"] == [{"secretRef": {"name": "cacheserver"}}]
    assert all(each["kind"] != "Secret" for each in rendered(ALL))


def test_a_journal_outlives_its_replica() -> None:
    spec = manifest("StatefulSet")["spec"]
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["metadata"]["name"] in {each["name"] for each in container()["volumeMounts"]}


@pytest.mark.parametrize("name", ["mine", "mine-headless"])
def test_a_service_leads_to_the_pods(name: str) -> None:
    spec = manifest("Service", name=name)["spec"]
    template = manifest("StatefulSet")["spec"]["template"]
    assert spec["selector"].items() <= template["metadata"]["labels"].items()
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    assert {each["targetPort"]: each["port"] for each in spec["ports"]} == ports


def test_envoy_and_the_set_have_a_headless_service() -> None:
    assert manifest("Service", name="mine-headless")["spec"]["clusterIP"] == "None"
    assert manifest("StatefulSet")["spec"]["serviceName"] == "mine-headless"


def test_replicas_are_the_autoscalers_affair_where_there_is_one() -> None:
    assert manifest("StatefulSet", LEAST)["spec"]["replicas"] == 3
    assert "replicas" not in manifest("StatefulSet", ALL)["spec"]
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", "mine")


def test_the_autoscaler_asks_for_what_the_adapter_makes_of_a_metric_that_is_served() -> None:
    (metric,) = manifest("HorizontalPodAutoscaler")["spec"]["metrics"]
    adapter = yaml.safe_load((DEPLOY / "prometheus" / "adapter.yaml").read_text(encoding="utf-8"))
    (rule,) = adapter["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    named = set(re.findall(r"cacheserver_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    assert named == {"cacheserver_queue_depth"}  # which tests/test_deploy.py sees served


def test_metrics_are_scraped_once_under_the_job_that_the_alerts_ask_for() -> None:
    monitor = manifest("ServiceMonitor")
    labels = [each["metadata"]["labels"] for each in rendered(ALL) if each["kind"] == "Service"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (found,) = [each for each in labels if wanted <= each.items()]
    assert found[monitor["spec"]["jobLabel"]] == "cacheserver"
    assert 'job="cacheserver"' in (DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    assert "/metrics" in served_paths()
