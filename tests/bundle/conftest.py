import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def tiny(bundles: Path, tmp_path: Path) -> Path:
    """A copy of tiny-fm that a test may spoil."""
    return shutil.copytree(bundles / "tiny-fm" / "1", tmp_path / "spoilt")


@pytest.fixture
def reseal(tiny: Path) -> Callable[[], Path]:
    """Brings lengths and sha256 in the manifest of `tiny` in line with its files, as a forger would."""

    def rewrite() -> Path:
        manifest = json.loads((tiny / "manifest.json").read_bytes()) | {"checksum": None}
        for name, entry in manifest["files"].items():
            content = (tiny / name).read_bytes()
            entry |= {"sha256": hashlib.sha256(content).hexdigest(), "length": len(content)}
        (tiny / "manifest.json").write_text(json.dumps(manifest))
        return tiny

    return rewrite
