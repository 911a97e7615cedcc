"""Prometheus, its alerts and the dashboard speak of metrics that the service has, and are valid."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker/prometheus"
GRAFANA = ROOT / "docker/grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards/factorlens.json").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SUFFIXES = {
    "counter": ["_total"],
    "histogram": ["_bucket", "_sum", "_count"],
    "summary": ["_sum", "_count"],
    "gauge": [""],
}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


def targets() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield from panel.get("targets", [])


def dashboard_expressions() -> list[str]:
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
    return [target["expr"] for target in targets()] + variables


def rules(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def rule_expressions() -> list[str]:
    return [rule["expr"] for file in ("records.yml", "alerts.yml") for rule in rules(file)]


def legends() -> list[str]:
    return [target["legendFormat"] for target in targets()]


def stored_series() -> set[str]:
    """The names under which Prometheus stores the metrics of the service."""
    families = metrics.Metrics().registry.collect()
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def series(expression: str) -> set[str]:
    """The metrics of the service and the records that an expression names."""
    return set(re.findall(r"\b(?:factorlens|process)[_:][\w:]+", expression))


def promtool(*arguments: str, cwd: Path = PROMETHEUS) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("expression", [*rule_expressions(), *dashboard_expressions()])
def test_every_metric_exists(expression: str) -> None:
    used = series(expression)
    assert used or expression.startswith("up{")
    assert used <= stored_series() | {rule["record"] for rule in rules("records.yml")}


def test_a_metric_that_does_not_exist_is_seen() -> None:
    expression = "rate(factorlens_row_total[5m]) / process_cpu_second_total > factorlens:error:ratio_rate5m"
    assert series(expression) == {"factorlens_row_total", "process_cpu_second_total", "factorlens:error:ratio_rate5m"}
    assert not series(expression) & (stored_series() | {rule["record"] for rule in rules("records.yml")})


def test_every_own_metric_is_shown() -> None:
    shown = set().union(*map(series, dashboard_expressions()))
    families = [family for family in metrics.Metrics().registry.collect() if family.name.startswith("factorlens_")]
    hidden = {family.name for family in families if not any(name.startswith(family.name) for name in shown)}
    assert hidden == set()


def test_every_label_exists() -> None:
    own = {label for metric in vars(metrics.Metrics()).values() for label in getattr(metric, "_labelnames", ())}
    text = "\n".join([*rule_expressions(), *dashboard_expressions(), *legends()])
    listed = {label for group in re.findall(r"\b(?:by|on) \(([^)]+)\)", text) for label in group.split(", ")}
    matched = set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", text))
    shown = set(re.findall(r"\{\{(\w+)\}\}", text))
    collected = {"device", "kind", "stage", "bin"}  # of metrics that have no sample, and so no label, without a source
    assert listed | matched | shown <= own | collected | {"le", "job", "instance"}
    assert {"model", "field", "graph", "status"} <= own & (listed | matched)


@needs_promtool
def test_prometheus_accepts_its_configuration_and_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "records.yml", "alerts.yml")


@needs_promtool
def test_alerts_fire_when_they_must_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_tested_and_in_the_runbook() -> None:
    alerts = {rule["alert"] for rule in rules("alerts.yml")}
    tested = (PROMETHEUS / "alerts_test.yml").read_text()
    assert alerts == set(re.findall(r"Factorlens\w+", tested))
    runbook = (ROOT / "docs/operations.md").read_text()
    assert alerts == set(re.findall(r"^### (Factorlens\w+)$", runbook, re.MULTILINE))


def test_every_record_is_used_or_tested() -> None:
    tested = (PROMETHEUS / "alerts_test.yml").read_text()
    used = "\n".join([*rule_expressions(), tested])
    assert all(rule["record"] in used for rule in rules("records.yml"))


@needs_promtool
def test_dashboard_expressions_are_promql(tmp_path: Path) -> None:
    filled = [target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*") for target in targets()]
    panels = [{"record": f"panel:{at}", "expr": expression} for at, expression in enumerate(filled)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    promtool("check", "rules", "panels.yml", cwd=tmp_path)


def test_every_panel_reads_the_provisioned_data_source() -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    users = [*panels, *targets(), *DASHBOARD["templating"]["list"]]
    assert {(user["datasource"]["type"], user["datasource"]["uid"]) for user in users} == {
        ("prometheus", source["uid"])
    }
    assert source["url"] == "http://prometheus:9090"


def test_every_panel_says_what_it_shows() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert all(panel["title"] and panel["description"] for panel in panels)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_grafana_finds_the_dashboard_where_compose_mounts_it() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/factorlens.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    grafana = COMPOSE["services"]["grafana"]
    assert f"./docker/grafana/dashboards:{folder}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/factorlens.json"


def test_prometheus_scrapes_the_services_of_compose() -> None:
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = next(job for job in jobs if job["job_name"] == "factorlens")["dns_sd_configs"]
    scraped = {name for name, service in COMPOSE["services"].items() if "8000" in str(service.get("ports"))}
    assert set(discovery["names"]) == scraped
    assert discovery["port"] == 8000
