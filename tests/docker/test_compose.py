"""What docker-compose.yml promises: nothing public, nothing writable without need, no password, no root."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def mounts(service: dict[str, Any]) -> list[dict[str, Any]]:
    """The volumes in their long form."""
    return [mount if isinstance(mount, dict) else long_form(mount) for mount in service.get("volumes", [])]


def long_form(mount: str) -> dict[str, Any]:
    source, target, *options = mount.split(":")
    kind = "bind" if source.startswith(".") else "volume"
    return {"type": kind, "source": source, "target": target, "read_only": options == ["ro"]}


def test_profiles() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles == {
        "service": None,
        "prometheus": None,
        "grafana": None,
        "service-gpu": ["gpu"],
        "train": ["train"],
    }


@pytest.mark.parametrize("name", SERVICES)
class TestService:
    def test_is_published_on_the_loopback_only(self, name: str) -> None:
        service = SERVICES[name]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service.get("network_mode") is None

    def test_is_confined(self, name: str) -> None:
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)

    def test_writes_to_the_host_only_where_it_must(self, name: str) -> None:
        binds = [mount for mount in mounts(SERVICES[name]) if mount["type"] == "bind"]
        writable = [mount["source"] for mount in binds if not mount.get("read_only")]
        assert writable == (["./artifacts", "./checkpoints"] if name == "train" else [])

    def test_mounts_what_exists(self, name: str) -> None:
        for mount in mounts(SERVICES[name]):
            if mount["type"] == "volume":
                assert mount["source"] in COMPOSE["volumes"]
            elif mount["source"] in {"./artifacts", "./checkpoints"}:  # never made by the Docker daemon, as root
                assert mount["bind"] == {"create_host_path": False}
            else:
                assert (ROOT / mount["source"]).is_dir()

    def test_image_is_pinned_or_built_here(self, name: str) -> None:
        service = SERVICES[name]
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        else:
            _, tag = service["image"].split(":")
            assert tag.lstrip("v").count(".") == 2

    def test_carries_no_secret(self, name: str) -> None:
        names = SERVICES[name].get("environment", {})
        assert not [key for key in names if any(word in key for word in ("PASSWORD", "SECRET", "TOKEN"))]
        assert "env_file" not in SERVICES[name]


def test_settings_of_the_service_exist() -> None:
    dockerfile = (ROOT / "docker/service.Dockerfile").read_text()
    used = re.findall(r"\bFACTORLENS_(\w+)[=:]", dockerfile + (ROOT / "docker-compose.yml").read_text())
    assert {"PROVIDER", "BUNDLES", "HOST", "PORT", "HARDENED", "STATE"} == set(used)
    assert {name.lower() for name in used} <= set(Settings.model_fields)


def test_each_service_has_a_volume_of_its_own_for_its_state() -> None:
    owner = (ROOT / "docker/service.Dockerfile").read_text().partition("\nUSER ")[2].split()[0]
    folders = {}
    for name in ("service", "service-gpu"):
        folder = SERVICES[name]["environment"]["FACTORLENS_STATE"]
        (folders[name],) = (mount for mount in mounts(SERVICES[name]) if mount["target"] == folder)
        assert (folders[name]["type"], folders[name]["read_only"]) == ("volume", False)
        # A new volume is the image's user's only if the folder is, in the image.
        made, copied = f"RUN install -d -m 700 {folder}", f"--chown={owner} {Path(folder).parent} {Path(folder).parent}"
        dockerfile = (ROOT / "docker/service.Dockerfile").read_text()
        assert made in dockerfile
        assert f"COPY --from=build {copied}" in dockerfile
    assert folders["service"]["source"] != folders["service-gpu"]["source"]


def test_grafana_shows_everything_to_everybody_and_lets_nobody_in() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


def test_the_gpu_service_asks_for_cuda_and_a_device() -> None:
    service = SERVICES["service-gpu"]
    assert service["build"]["args"] == {"RUNTIME": "gpu"}
    assert service["environment"]["FACTORLENS_PROVIDER"] == "cuda"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert "gpu" in device["capabilities"]
