"""An environment of its own for each server of other people, installed once and kept."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OURS = ("numpy", "pydantic", "onnxruntime")  # what our encoder and score graph need; the same onnxruntime everywhere
PATIENCE = 600.0  # seconds an installer may take
DONE = "installed"


class NotInstalled(Exception):
    """Why a peer is not here: the installer's own words."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """`script` is in benchmarks/servers; one that is `required` may not be skipped."""

    name: str
    package: str
    version: str
    script: str
    extra: str = ""
    required: bool = False

    @property
    def requirement(self) -> str:
        return f"{self.package}{self.extra}=={self.version}"


PEERS = (
    Peer(name="MLServer", package="mlserver", version="1.7.1", script="with_mlserver.py", required=True),
    Peer(name="LitServe", package="litserve", version="0.2.19", script="with_litserve.py", required=True),
    Peer(name="PyTriton", package="nvidia-pytriton", version="0.7.0", script="with_pytriton.py"),
    Peer(name="BentoML", package="bentoml", version="1.4.39", script="with_bentoml.py"),
    Peer(name="Ray Serve", package="ray", extra="[serve]", version="2.60.0", script="with_ray.py"),
)


def cache() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factorlens" / "peers"


def python(peer: Peer, root: Path) -> Path:
    """The interpreter of the peer's environment under `root`, installed if it is not there.

    Raises NotInstalled with what the installer said.
    """
    folder = root.absolute() / f"{peer.package}-{peer.version}"
    interpreter = folder / "bin" / "python"
    if (folder / DONE).exists():
        return interpreter
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", str(folder))
    ours = [f"onnxruntime=={_version('onnxruntime')}", *(name for name in OURS if name != "onnxruntime")]
    _run(str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", peer.requirement, *ours)
    (folder / DONE).touch()
    return interpreter


def _version(package: str) -> str:
    return metadata.version(package)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"the installer took more than {PATIENCE:.0f} s") from None
    if done.returncode:
        raise NotInstalled(" ".join((done.stderr or done.stdout).split())[-400:])
