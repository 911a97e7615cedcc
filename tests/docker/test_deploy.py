"""What deploy/ holds is what Kubernetes, Prometheus and systemd accept, and speaks of the service as it is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import metrics, state
from service.server import DRAIN_SECONDS
from service.settings import PREFIX, Settings
from service.supervisor import END_SECONDS

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
UNIT = ROOT / "deploy/systemd/factorlens.service"
MANIFESTS: dict[str, dict[str, Any]] = {
    each["kind"]: each for each in yaml.safe_load_all((KUBERNETES / "factorlens.yaml").read_text())
}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
KUBERNETES_VERSION = "1.31"  # the oldest that the manifests are for


def validate(manifest: dict[str, Any]) -> None:
    """Raise where the schema of Kubernetes itself does not know a key or a type."""
    pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate(
        manifest, KUBERNETES_VERSION, strict=True
    )


def test_the_kinds() -> None:
    kinds = ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"]
    assert list(MANIFESTS) == kinds


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_follow_the_schema(kind: str) -> None:
    validate(MANIFESTS[kind])


def test_the_schema_sees_a_slip() -> None:
    spec = MANIFESTS["PodDisruptionBudget"]["spec"]
    with pytest.raises(Exception, match="maxUnavailible"):
        validate(MANIFESTS["PodDisruptionBudget"] | {"spec": spec | {"maxUnavailible": 1}})


def test_everything_means_the_same_pods() -> None:
    labels = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["Service"]["spec"]["selector"] == labels
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    target = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", MANIFESTS["Deployment"]["metadata"]["name"])
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": 8000}]
    assert MANIFESTS["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    scrape = yaml.safe_load((KUBERNETES / "scrape.yml").read_text())["scrape_configs"][0]
    assert scrape["relabel_configs"][0]["regex"] == f"{labels['app.kubernetes.io/name']};http"


def test_probes_ask_what_they_mean() -> None:
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/livez", "readiness": "/readyz", "liveness": "/livez"}


def test_pods_are_given_the_time_to_end() -> None:
    given = {each["name"]: each["value"] for each in CONTAINER["env"]}
    chosen = {name.removeprefix(PREFIX).lower(): value for name, value in given.items()}
    settings = Settings.model_validate(chosen)
    assert END_SECONDS > DRAIN_SECONDS
    assert POD["terminationGracePeriodSeconds"] > settings.lame_duck + END_SECONDS
    probe = CONTAINER["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < settings.lame_duck


def test_containers_of_compose_are_given_the_time_to_end() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    given = {name: int(services[name]["stop_grace_period"].removesuffix("s")) for name in ("service", "service-gpu")}
    assert min(given.values()) > Settings().lame_duck + END_SECONDS


def test_pods_are_confined() -> None:
    image = (ROOT / "docker/service.Dockerfile").read_text()
    user = POD["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in image
    assert user["runAsNonRoot"] is True
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"name": "FACTORLENS_HARDENED", "value": "true"} in CONTAINER["env"]
    assert POD["automountServiceAccountToken"] is False
    assert POD["enableServiceLinks"] is False
    mounts = {each["name"]: each.get("readOnly") for each in CONTAINER["volumeMounts"]}
    assert mounts == {"bundles": True, "tmp": None, "state": None}


def test_each_pod_has_a_folder_of_its_own_for_its_state() -> None:
    (folder,) = (each["value"] for each in CONTAINER["env"] if each["name"] == "FACTORLENS_STATE")
    (name,) = (each["name"] for each in CONTAINER["volumeMounts"] if each["mountPath"] == folder)
    (volume,) = (each for each in POD["volumes"] if each["name"] == name)
    assert volume == {"name": name, "emptyDir": {"sizeLimit": "64Mi"}}  # on disk: memory would count towards the limit
    assert 2 * state.LONGEST < 64 * 2**20  # a file, and the one that takes its place


def test_the_autoscaler_asks_for_a_metric_that_there_is() -> None:
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (asked,) = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert asked["pods"]["metric"]["name"] == rule["name"]["as"]
    assert re.match(rule["name"]["matches"], rule["seriesQuery"].partition("{")[0])
    families = {family.name + "_total" * (family.type == "counter") for family in metrics.Metrics().registry.collect()}
    used = set(re.findall(r"\b(?:factorlens|process)_\w+", rule["metricsQuery"] + rule["seriesQuery"]))
    assert used == {"factorlens_workers", "process_cpu_seconds_total"}
    assert used <= families


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_what_the_cluster_adds(tmp_path: Path) -> None:
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"][0]
    filled = adapter["metricsQuery"].replace("<<.GroupBy>>", "namespace, pod").replace("<<.LabelMatchers>>", 'pod="a"')
    rules = {"groups": [{"name": "adapter", "rules": [{"record": "adapter:busy", "expr": filled}]}]}
    (tmp_path / "adapter.yml").write_text(yaml.safe_dump(rules))
    scrape = yaml.safe_load((KUBERNETES / "scrape.yml").read_text())
    assert scrape["scrape_configs"][0].pop("kubernetes_sd_configs") == [{"role": "pod"}]  # Debian's promtool has none
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({**scrape, "rule_files": ["adapter.yml"]}))
    command = ["promtool", "check", "config", "prometheus.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def unit() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_is_given_the_time_to_end() -> None:
    said = unit()
    assert said["KillMode"] == "mixed"
    assert int(said["TimeoutStopSec"]) > Settings().lame_duck + END_SECONDS
    variables = [each.partition("=")[0] for each in said["Environment"].split()]
    own = {name.removeprefix(PREFIX).lower() for name in variables if name.startswith(PREFIX)}
    assert own == {"bundles", "workers", "hardened", "state"}
    assert said["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert own <= set(Settings.model_fields)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(("slip", "complaint"), [("KillMode", ""), ("KillMood", "Unknown key 'KillMood'")])
def test_systemd_accepts_the_unit(tmp_path: Path, slip: str, complaint: str) -> None:
    text = UNIT.read_text().replace("/opt/factorlens/bin/python", sys.executable).replace("KillMode", slip)
    (tmp_path / UNIT.name).write_text(text)
    command = ["systemd-analyze", "verify", str(tmp_path / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    about_it = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (complaint in done.stderr) if complaint else about_it == []
    assert done.returncode == 0, done.stderr
