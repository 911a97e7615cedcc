"""The best trial of a search, and the recipe that it makes."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from training.errors import TrainingError
from training.recipe import PATHS, keys_of, load

WRITTEN = "# Best of "  # how a file that tune wrote begins, and may be replaced


class Tuned(NamedTuple):
    """The best trial: the metric that the recipe monitors, of its best epoch, what it set, and which of all it was."""

    monitor: str
    value: float
    chosen: dict[str, object]
    number: int
    trials: int


def refuse_overwriting(path: Path) -> None:
    """TrainingError where there is a file that tune did not write."""
    if path.exists() and not path.read_text(errors="replace").startswith(WRITTEN):
        raise TrainingError(f"{str(path)!r} exists, and tune did not write it: choose another name, or remove it first")


def write_best(path: Path, output: Path, tuned: Tuned) -> None:
    """The recipe with its comments, what was chosen, and no [tune] table; paths as they are seen from `output`.

    Where the recipe has its [tune] table from the recipe that it extends, the two are written as one.
    """
    import tomlkit

    document = _document(path, output)
    if "extends" in document:
        base = path.parent / document["extends"]
        beneath = _document(base, output)
        if "tune" in beneath:
            del document["extends"]
            document = _laid_over(beneath, document)
        else:
            document["extends"] = _seen(path, document["extends"], output)
    document.pop("tune", None)
    for key, value in tuned.chosen.items():
        *tables, name = keys_of(key)
        section = document
        for table in tables:
            section = section.setdefault(table, tomlkit.table())
        section[name] = value
    header = f"{WRITTEN}{tuned.trials} trials, by the validation {tuned.monitor}: {tuned.value:.6g}\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(header + tomlkit.dumps(document).lstrip())
    load(output)


def _document(path: Path, output: Path) -> Any:
    """A recipe with its comments; the files that it names as `output` must name them."""
    import tomlkit

    document: Any = tomlkit.parse(path.read_text())
    for table, names in PATHS.items():
        for name in names:
            if name in document.get(table, {}):
                document[table][name] = _seen(path, document[table][name], output)
    return document


def _laid_over(beneath: Any, document: Any) -> Any:
    for key, value in document.items():
        both = isinstance(value, dict) and isinstance(beneath.get(key), dict)
        beneath[key] = _laid_over(beneath[key], value) if both else value
    return beneath


def _seen(path: Path, name: str, output: Path) -> str:
    """A file that the recipe at `path` names, as `output` must name it."""
    return Path(os.path.relpath(path.parent / name, output.parent)).as_posix()
