"""schemathesis against a service that runs."""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

PROGRAM = Path(sys.executable).with_name("schemathesis")
CONFIG = Path(__file__).with_name("schemathesis.toml")
FLAGS = ("--checks=all", "--mode=all", "--seed=1", "--no-shrink", "--continue-on-failure", "--warnings=off")


def log_of(process: "subprocess.Popen[str]") -> list[str]:
    """The lines that a service logs from now on, as they come; where nobody reads them a full pipe would hold it."""
    assert process.stderr
    lines, stream = list[str](), process.stderr

    def read() -> None:
        with suppress(ValueError):  # closed
            lines.extend(stream)

    threading.Thread(target=read, daemon=True).start()
    return lines


def document(url: str) -> dict[str, Any]:
    """What the service says of itself, but for headers: schemathesis adds some that nobody knows, and HTTP has it that
    these are ignored.
    """
    described: dict[str, Any] = httpx.get(f"{url}/openapi.json").raise_for_status().json()
    for operations in described["paths"].values():
        for operation in operations.values():
            operation["parameters"] = [each for each in operation.get("parameters", ()) if each["in"] != "header"]
    return described


def found(url: str, described: dict[str, Any], folder: Path, *flags: str) -> tuple[int, str]:
    """The exit status, 0 where the service does what the document says, and the report."""
    (folder / "openapi.json").write_text(json.dumps(described))
    command = [PROGRAM, "--config-file", CONFIG, "run", "openapi.json", "--url", url, *FLAGS, *flags]
    run = subprocess.run([*command, "--suppress-health-check=all"], cwd=folder, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr
