"""schemathesis against a service that runs."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(sys.executable).with_name("schemathesis")
CONFIG = Path(__file__).with_name("schemathesis.toml")
FLAGS = ("--checks=all", "--mode=all", "--seed=1", "--no-shrink", "--continue-on-failure", "--warnings=off")


def found(document: str, folder: Path, *flags: str) -> tuple[int, str]:
    """The exit status, 0 where the service does what its OpenAPI document says, and the report."""
    command = [PROGRAM, "--config-file", CONFIG, "run", document, *FLAGS, "--suppress-health-check=all", *flags]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr
