"""The folder of bundles: which models and versions are in it, and their digests. Nothing here is verified."""

import logging
import re
from hashlib import sha256
from pathlib import Path
from typing import Final

from bundle import store
from bundle.manifest import NAME_PATTERN, RESERVED_NAMES

LONGEST_VERSION: Final = 18  # digits

log = logging.getLogger(__name__)


def names(root: Path) -> list[str]:
    """Folders that have a version; staged and foreign ones, and reserved names, are no models, nor is, but for a line
    of log, what cannot be read. None where there is no folder. Raises OSError where it cannot be read."""
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    return [name for name in found if is_name(name) and _has_version(root, name)]


def versions(root: Path, name: str) -> dict[str, str]:
    """The versions of a model, highest first, each with the sha256 of its manifest: empty where it cannot be read.

    None where the name is none of a model's. Raises OSError where the folder of the model cannot be read.
    """
    if not is_name(name):
        return {}
    return {str(version): digest(root / name / str(version)) for version in _numbers(root, name)[::-1]}


def _has_version(root: Path, name: str) -> bool:
    try:
        return bool(_numbers(root, name))
    except OSError as error:  # the other models are not to suffer
        log.error("model not read", extra={"facts": {"model": name, "reason": error.strerror}})
        return False


def _numbers(root: Path, name: str) -> list[int]:
    """The versions of a model, ascending. What has more digits is foreign."""
    return [version for version in store.versions(root, name) if len(str(version)) <= LONGEST_VERSION]


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
