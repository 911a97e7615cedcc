"""A real Prometheus scrapes a real service, with the rules that are shipped."""

import hashlib
import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker/prometheus"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docker/grafana/dashboards/factorlens.json").read_text())
TROUBLE = {("Requests turned away", "A"), ("Errors by version", "A")}  # what is empty while nothing goes wrong
OF_A_GPU = {("Memory", "C")}
EXPECTED = (0.1, 0.5, 0.4)  # shares of scores, by bin
Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: apt-get install prometheus)"
)


def configuration(target: str) -> dict[str, Any]:
    """The shipped one, quicker, and with the one target."""
    found: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    job = next(job for job in found["scrape_configs"] if job["job_name"] == "factorlens")
    del job["dns_sd_configs"], job["relabel_configs"]
    return {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(PROMETHEUS / file) for file in found["rule_files"]],
        "scrape_configs": [job | {"static_configs": [{"targets": [target]}]}],
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def asked(url: str, expression: str) -> list[dict[str, Any]]:
    response = httpx.get(f"{url}/api/v1/query", params={"query": expression})
    response.raise_for_status()
    found: list[dict[str, Any]] = response.json()["data"]["result"]
    return found


def eventually(url: str, expression: str, *, seconds: float = 20) -> list[dict[str, Any]]:
    """What an expression gives, once it gives anything."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := asked(url, expression):
                return found
        except (httpx.TransportError, httpx.HTTPStatusError):  # it starts, and says 503 meanwhile
            pass
        time.sleep(0.2)
    raise AssertionError(expression)


def publish(bundle: Path, path: Path) -> None:
    """Copy a bundle to be another version, whose report says how scores are to be spread."""
    shutil.copytree(bundle, path)
    report = json.loads((path / "report.json").read_text())
    content = json.dumps(report | {"scores": {"edges": [-0.5, 0.5], "shares": EXPECTED}}).encode()
    (path / "report.json").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text()) | {"checksum": None, "version": int(path.name)}
    manifest["files"]["report.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "length": len(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def empty(url: str) -> set[tuple[str, str]]:
    """What the dashboard asks for and Prometheus has nothing of: panels and their targets."""
    return {
        (panel["title"], target["refId"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
        if not asked(url, target["expr"].replace("$__rate_interval", "30s").replace("$model", ".*"))
    }


def index_of(service: str) -> float:
    """By hand, from what the service has counted."""
    told = httpx.get(f"{service}/metrics").text
    pattern = r'^factorlens_score_bin_total{bin="(\d)",model="tiny-fm",version="1"} (\S+)$'
    counts = [float(count) for _, count in sorted(re.findall(pattern, told, re.MULTILINE))]
    shares = [max(count / sum(counts), 1e-4) for count in counts]
    return sum((q - p) * math.log(q / p) for q, p in zip(shares, EXPECTED, strict=True))


@needs_prometheus
def test_prometheus_sees_the_service(bundles: Path, tmp_path: Path, started: Started) -> None:
    for version in ("1", "2"):
        publish(bundles / "tiny-fm/1", tmp_path / "bundles/tiny-fm" / version)
    rows = [{"user": f"u{n % 20}", "app": f"a{n % 12}", "age": 20 + n % 50} for n in range(600)]
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    command.append(f"--web.listen-address={url.removeprefix('http://')}")
    with started("--bundles", str(tmp_path / "bundles"), "--workers", "2", "--admin", "true") as (_, service):
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration(service.removeprefix("http://"))))
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as prometheus, httpx.Client() as client:
            try:
                eventually(url, 'up{job="factorlens"} == 1')
                routes = {"stable": 1, "shadow": 2}
                client.put(f"{service}/v1/admin/models/tiny-fm/routes", json=routes).raise_for_status()
                for _ in range(60):
                    client.post(f"{service}/v1/models/tiny-fm:predict", json={"instances": [{}]}).raise_for_status()
                    client.post(f"{service}/v1/models/tiny-fm:explain", json={"instances": [{}]}).raise_for_status()
                    time.sleep(0.05)
                for _ in range(6):
                    body = {"instances": [*rows, {"user": "new"}]}
                    client.post(f"{service}/v1/models/tiny-fm:predict", json=body).raise_for_status()
                asked_for = "factorlens:requests:rate5m > 0"
                assert {each["metric"]["endpoint"] for each in eventually(url, asked_for)} == {"predict", "explain"}
                (busy,) = eventually(url, "factorlens:busy_cores:per_worker_rate5m > 0")
                assert float(busy["value"][1]) < 2
                (errors,) = eventually(url, "factorlens:errors:ratio_rate5m == 0")
                assert errors["metric"] == {"__name__": "factorlens:errors:ratio_rate5m", "model": "tiny-fm"}
                assert float(asked(url, "factorlens_workers")[0]["value"][1]) == 2
                assert asked(url, 'ALERTS{alertstate="firing"}') == []
                rules = httpx.get(f"{url}/api/v1/rules").json()["data"]["groups"]
                assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}
                by_hand = index_of(service)
                assert by_hand > 0.1
                stable = 'factorlens:score_psi:increase1h{version="1"}'
                (drift,) = eventually(url, f"{stable} > {by_hand - 1e-6} and {stable} < {by_hand + 1e-6}")
                assert drift["metric"]["model"] == "tiny-fm"
                eventually(url, "factorlens_shadow_difference_count > 0")
                for grown in ("factorlens_requests_total", "rate(factorlens_requests_total[30s])"):
                    client.post(f"{service}/v1/models/tiny-fm:predict", content=b"no json")
                    eventually(url, f'{grown.replace("_total", """_total{status="400"}""")} > 0')
                assert empty(url) == TROUBLE | OF_A_GPU
            finally:
                prometheus.terminate()
