"""Scrape configurations, alerts and the dashboard: by Prometheus' own tools and Grafana's schema, and by our names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from embedding_relay import metrics
from embedding_relay.protocol.counts import Event
from support import deployment
from support.command_lines import check_command, check_environment
from support.deployment import DEPLOY, INSTANCES
from support.repo import REPO

PROMETHEUS = DEPLOY / "prometheus"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
ADAPTER = yaml.safe_load((PROMETHEUS / "adapter-values.yaml").read_text())["rules"]["custom"]
NAMING = [PROMETHEUS / "alerts.yml", PROMETHEUS / "alerts_test.yml", PROMETHEUS / "adapter-values.yaml"]
NAMING += [DEPLOY / "grafana/dashboard.json"]


def program(name: str) -> str:
    """Where `scripts/setup --tests` puts it, or where the machine has it."""
    found = shutil.which(name, path=f"{sys.prefix}/bin:{REPO}/.venv/bin:{os.environ['PATH']}")
    assert found, "run scripts/setup --tests"
    return found


def promtool(*arguments: str | Path) -> str:
    """What it says if it is not content."""
    ended = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True)
    return "" if ended.returncode == 0 else f"{ended.stdout}{ended.stderr}"


# ---- Prometheus


def test_prometheus_takes_the_configuration_of_compose() -> None:
    assert promtool("check", "config", PROMETHEUS / "prometheus.yml") == ""


def test_prometheus_takes_that_of_kubernetes_and_finds_the_pods(tmp_path: Path) -> None:
    """Debian's Prometheus cannot ask Kubernetes: it is told of the pods as if it had."""
    loaded = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text())
    namespace = deployment.kustomization()["namespace"]
    for job in loaded["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"names": [namespace]}}]
        job["static_configs"] = [{"targets": ["pod"], "labels": labels} for labels in discovered(namespace)]
    (tmp_path / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text())
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(loaded))
    assert promtool("check", "config", tmp_path / "prometheus.yml") == ""
    found = {job["job_name"]: scraped(tmp_path / "prometheus.yml", job["job_name"]) for job in loaded["scrape_configs"]}
    ports = {name: port_of(name) for name in (*INSTANCES, "router")}
    addresses = {name: {"namespace": namespace, "pod": name, "instance": f"10.1.2.3:{ports[name]}"} for name in ports}
    assert found == {
        "embedding-relay": [addresses["encode"], addresses["language"]],
        "embedding-relay-router": [addresses["router"]],
    }


def port_of(name: str) -> int:
    """Where the pod answers with its metrics."""
    (part,) = (part for part in deployment.kubernetes_parts() if part.name == name)
    arguments = check_command(part.words)
    return int(arguments.prometheus_port if name == "router" else arguments.port)


def discovered(namespace: str) -> list[dict[str, str]]:
    """A pod of each deployment, with the labels that Prometheus gives to what it hears of Kubernetes."""
    found = []
    for name, one in sorted(deployment.deployments().items()):
        metadata = one["spec"]["template"]["metadata"]
        labels = {"namespace": namespace, "pod_name": name, "pod_ip": "10.1.2.3"}
        for kind in ("labels", "annotations"):
            labels |= {
                f"pod_{kind[:-1]}_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}": each for key, each in metadata[kind].items()
            }
        found.append({f"__meta_kubernetes_{key}": each for key, each in labels.items()})
    return found


def scraped(config: Path, job: str) -> list[dict[str, str]]:
    """The labels of each target that is left, without those that all have. promtool names them in any order."""
    command = [program("promtool"), "check", "service-discovery", "--timeout=1s", config, job]
    targets = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kept = [target["labels"] for target in targets if target["labels"]]
    chosen = [{name: labels[name] for name in ("namespace", "pod", "instance")} for labels in kept]
    return sorted(chosen, key=lambda labels: labels["pod"])


def test_each_alert_fires_for_what_it_is_for_and_for_nothing_else() -> None:
    assert promtool("test", "rules", PROMETHEUS / "alerts_test.yml") == ""


def test_no_alert_is_without_a_test() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    samples = [sample for test in tests for query in test["promql_expr_test"] for sample in query["exp_samples"]]
    fired = {re.fullmatch(r'\{alertname="(\w+)"\}', sample["labels"])[1] for sample in samples}  # type: ignore[index]
    assert fired == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_read(rule: dict[str, Any]) -> None:
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (REPO / page).read_text(), re.MULTILINE)
    assert not anchor or anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
    check_environment(re.findall(r"SGLANG_\w+", str(rule["annotations"])))


def test_the_targets_are_those_that_compose_starts() -> None:
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    parts = {part.name: part for part in deployment.compose_parts()}
    router = check_command(parts["router"].words)
    instances = [f"{parts[name].flag('--host')}:{parts[name].flag('--port')}" for name in INSTANCES]
    assert targets == {
        "embedding-relay": instances,
        "embedding-relay-router": [f"{router.prometheus_host}:{router.prometheus_port}"],
    }
    in_kubernetes = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in in_kubernetes] == list(targets)
    for job in re.findall(r'job="([^"]+)"', (PROMETHEUS / "alerts.yml").read_text()):
        assert job in targets


def test_prometheus_has_the_flags_that_compose_gives_it() -> None:
    (part,) = (part for part in deployment.compose_parts() if part.name == "prometheus")
    known = subprocess.run([program("prometheus"), "--help"], capture_output=True, text=True)
    flags = {word.split("=")[0] for word in part.words}
    assert flags <= set(re.findall(r"--[\w.-]+", known.stdout + known.stderr))


# ---- names of metrics


@pytest.mark.parametrize("path", NAMING, ids=lambda path: path.name)
def test_every_metric_is_one_of_ours_or_of_sglangs(path: Path) -> None:
    named = set(re.findall(r"sglang:\w+", path.read_text()))
    assert named
    unknown = {name for name in named if not modes_of(name)}
    source = Path(sys.modules["sglang.srt.server_args"].__file__ or "").parent / "observability/metrics_collector.py"
    assert unknown <= set(re.findall(r'name="(sglang:\w+)"', source.read_text()))


@pytest.mark.parametrize("path", NAMING, ids=lambda path: path.name)
def test_every_metric_is_there_in_the_mode_that_is_asked_for(path: Path) -> None:
    text = path.read_text().replace('\\"', '"')
    for name, selector in re.findall(r"(sglang:embedding_relay_\w+)\{([^}]*)\}", text):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', selector))
        assert labels.get("mode", modes_of(name)[0]) in modes_of(name), (name, selector)
        if "event" in labels:
            assert labels["event"] in {event.value for event in Event}


def modes_of(name: str) -> tuple[str, ...]:
    """The modes that have this metric, or a series of it; none if it is not ours."""
    modes: set[str] = set()
    for metric in metrics.METRICS:
        series = {"", "_bucket", "_count", "_sum"} if metric.kind == "histogram" else {""}
        if name in {f"{metrics.PREFIX}{metric.name}{part}" for part in series}:
            modes |= set(metric.modes)
    return tuple(sorted(modes))


def test_the_autoscaler_asks_for_what_the_adapter_offers() -> None:
    offered = {rule["name"]["as"]: rule["seriesQuery"].partition("{")[0] for rule in ADAPTER}
    for name, series in offered.items():
        assert series in (f"sglang:{name}", name.replace("sglang_", "sglang:"))
    scalers = deployment.objects()["HorizontalPodAutoscaler"]
    assert {metric["pods"]["metric"]["name"] for it in scalers for metric in it["spec"]["metrics"]} == set(offered)


# ---- Grafana


def test_grafana_knows_everything_in_the_dashboard() -> None:
    assert unknown_to_grafana(DASHBOARD) == []


def test_it_would_notice_a_field_that_grafana_does_not_know() -> None:
    wrong = json.loads(json.dumps(DASHBOARD).replace('"legendFormat"', '"legendFormt"'))
    assert "/panels/0/targets/0/legendFormt" in unknown_to_grafana(wrong)


def unknown_to_grafana(dashboard: dict[str, Any]) -> list[str]:
    """What is lost on the way through Grafana's own types."""
    register_default_plugins()
    known = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    return list(lost(dashboard, known))


def lost(given: Any, known: Any, where: str = "") -> list[str]:
    if isinstance(given, dict) and isinstance(known, dict):
        return [path for key, value in given.items() for path in lost(value, known.get(key), f"{where}/{key}")]
    if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        return [path for at, value in enumerate(given) for path in lost(value, known[at], f"{where}/{at}")]
    return [] if given == known else [where]


def test_prometheus_can_compute_every_panel_and_every_number_of_the_autoscaler(tmp_path: Path) -> None:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    expressions = [each.replace("$model", ".*").replace("$__rate_interval", "5m") for each in expressions]
    for rule in ADAPTER:
        series, _, matchers = rule["seriesQuery"].rstrip("}").partition("{")
        query = rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.LabelMatchers>>", matchers)
        expressions.append(query.replace("<<.GroupBy>>", "namespace, pod"))
    rules = [{"record": f"a:{at}", "expr": expression} for at, expression in enumerate(expressions)]
    assert not any("$" in each or "<" in each.replace("<=", "") for each in expressions)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    assert promtool("check", "rules", tmp_path / "rules.yml") == ""


def test_grafana_is_given_its_data_and_its_dashboard() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/embedding-relay.yaml").read_text())["providers"]
    services = deployment.compose()["services"]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in services["prometheus"]["command"]
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert Path(mounted["./grafana/dashboard.json"]).parent == Path(provider["options"]["path"])
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"
    (variable,) = (each for each in DASHBOARD["templating"]["list"] if each["type"] == "datasource")
    assert variable["query"] == source["type"]
