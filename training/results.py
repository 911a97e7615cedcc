"""What a finished training run came to: taken from its bundle, and kept as one JSON file."""

import json
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bundle import store
from training.errors import TrainingError
from training.recipe import METRICS

Metrics = dict[str, float | None]  # None: the AUC of one class, for one


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run. `metrics` are of its validation rows, `monitor` the one that chose the epoch.

    `parameters` is None where the bundle is too old to say; `first_step_seconds` are those of [pretrain].
    """

    model: str
    task: str
    seed: int
    monitor: str
    metrics: Metrics
    parameters: int | None
    first_step_seconds: float
    rows: int
    bundle: str
    digest: str
    bundle_bytes: int
    data_sha256: str
    best_epoch: int
    curve: list[dict[str, Any]]

    @property
    def rows_per_second(self) -> float:
        """Of the median epoch."""
        return float(statistics.median(epoch["rows_per_second"] for epoch in self.curve))

    @property
    def epoch_seconds(self) -> list[float]:
        """Of each epoch's steps, without validation."""
        return [self.rows / epoch["rows_per_second"] for epoch in self.curve]

    @property
    def seconds(self) -> float:
        """All steps, without reading, validation and export."""
        return self.first_step_seconds + sum(self.epoch_seconds)


def of_bundle(path: Path) -> Result:
    """The result of the run that made this bundle. Raises BundleInvalid where it is not whole."""
    found = store.open_verified(path)
    manifest, report = found.manifest, found.report
    fit: Any = manifest.hyper_parameters["fit"]
    return Result(
        model=manifest.key,
        task=manifest.task,
        seed=manifest.provenance.seed,
        monitor=fit.get("monitor") or METRICS[manifest.task][0],
        metrics=report["metrics"],
        parameters=report.get("parameters"),
        first_step_seconds=report.get("pretrain", {}).get("training_seconds", 0.0),
        rows=report["rows"]["train"],
        bundle=str(path),
        digest=found.digest,
        bundle_bytes=sum(file.length for file in manifest.files.values()),
        data_sha256=report["data_sha256"],
        best_epoch=report["best_epoch"],
        curve=report["curve"],
    )


def save(result: Result, path: Path) -> None:
    """Whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.part")
    store.write_synced(staged, json.dumps(asdict(result), indent=1, allow_nan=False).encode())
    os.replace(staged, path)


def load(path: Path) -> Result | None:
    """The saved result, or None where there is none."""
    try:
        return Result(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise TrainingError(
            f"{str(path)!r} is no result of a run ({error}): remove it, and the run is done again"
        ) from None
