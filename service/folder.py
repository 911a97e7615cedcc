"""The folder of bundles: which models and versions are in it, and their digests. Nothing here is verified."""

import re
from hashlib import sha256
from pathlib import Path

from bundle import store
from bundle.manifest import NAME_PATTERN, RESERVED_NAMES


def names(root: Path) -> list[str]:
    """Folders that have a version; staged and foreign ones, and reserved names, are no models. None where there is no
    folder. Raises OSError where it cannot be read."""
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    return [name for name in found if is_name(name) and store.versions(root, name)]


def versions(root: Path, name: str) -> dict[str, str]:
    """The versions of a model, highest first, each with the sha256 of its manifest: empty where it cannot be read.

    None where the name is none of a model's. Raises OSError where the folder of the model cannot be read.
    """
    if not is_name(name):
        return {}
    return {str(version): digest(root / name / str(version)) for version in store.versions(root, name)[::-1]}


def digest(path: Path) -> str:
    try:
        return sha256((path / store.MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def size(path: Path) -> int:
    """Bytes of the files of a version."""
    try:
        return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
    except OSError:
        return 0


def is_name(name: str) -> bool:
    return re.fullmatch(NAME_PATTERN, name) is not None and name not in RESERVED_NAMES
