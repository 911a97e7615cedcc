"""The bundles in a folder: find, load, hold. A broken version is kept with its reason and never served."""

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bundle import BundleError, BundleInvalid, Categorical, Multi, Numeric, RuntimeRefused, store
from bundle.manifest import NAME_PATTERN, RESERVED_NAMES
from bundle.schema import FittedField
from service import runtime
from service.control import Inventory, Versions
from service.errors import NotFound, NotReady
from service.messages import FieldInfo, ModelAnswer, Rejected, SizeInfo
from service.metrics import Metrics
from service.runtime import Runtime
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """One name: its versions that serve, highest first, and those that were refused, each with the reason."""

    name: str
    serving: dict[str, Runtime] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def version(self, version: str | None) -> Runtime:
        """The version asked for, or the highest good one. Raises NotReady or NotFound with what is there."""
        if not self.serving:
            raise NotReady(f"no version of {self.name} can serve: {self.reasons}")
        if version is None:
            return next(iter(self.serving.values()))
        if version in self.rejected:
            raise NotReady(f"version {version} of {self.name} was refused: {self.rejected[version]}")
        if version not in self.serving:
            raise NotFound(f"{self.name} has the versions {', '.join(self.serving)}")
        return self.serving[version]

    @property
    def reasons(self) -> str:
        return "; ".join(f"version {version}: {reason}" for version, reason in self.rejected.items())


class Catalog:
    """Every model under `settings.bundles`. Empty until `load`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.models: dict[str, Model] = {}

    def load(self, inventory: Inventory | None = None) -> None:
        """Load the newest good versions of every model, or else exactly what serves in an inventory.

        What cannot be loaded is refused, logged and kept apart.
        """
        for name in _names(self._settings.bundles) if inventory is None else inventory:
            self.models[name] = self._load_model(name, inventory[name] if inventory else None)
        self._metrics.ready.set(not self.missing)
        if self.missing:
            log.error("not ready", extra={"facts": {"reason": self.missing}})

    def inventory(self) -> Inventory:
        """What is loaded, for another process to load the same."""
        return {
            model.name: Versions([int(version) for version in model.serving], dict(model.rejected))
            for model in self.models.values()
        }

    def find(self, name: str) -> Model:
        """Raises NotFound, which says what models there are."""
        if name not in self.models:
            raise NotFound(f"the models here are {', '.join(self.models)}" if self.models else self.missing)
        return self.models[name]

    @property
    def missing(self) -> str:
        """Why the service is not ready; empty where every model has a version that serves."""
        if not self.models:
            return f"there is no bundle in {str(self._settings.bundles)!r} (<model>/<version>/manifest.json)"
        idle = [model for model in self.models.values() if not model.serving]
        return "; ".join(f"{model.name} has no version that serves ({model.reasons})" for model in idle)

    def _load_model(self, name: str, known: Versions | None) -> Model:
        model = Model(name, rejected=dict(known.rejected) if known else {})
        for version in known.serving if known else reversed(store.versions(self._settings.bundles, name)):
            if len(model.serving) == self._settings.versions:
                break
            self._load_version(model, version)
        self._metrics.rejected_bundles.labels(name).set(len(model.rejected))
        return model

    def _load_version(self, model: Model, version: int) -> None:
        facts: dict[str, object] = {"model": model.name, "version": version}
        started = time.perf_counter()
        path = self._settings.bundles / model.name / str(version)
        try:
            loaded = runtime.load(
                path, provider=self._settings.provider, threads=self._settings.threads, metrics=self._metrics
            )
            _check_place(loaded, model.name, version)
        except Exception as error:  # whatever a bundle does, the versions beside it have to serve
            model.rejected[str(version)] = _reason(error)
            unforeseen = not isinstance(error, BundleError)
            log.error("rejected", extra={"facts": facts | {"reason": str(error)}}, exc_info=unforeseen)
            return
        model.serving[str(version)] = loaded
        self._metrics.model_info.labels(model.name, str(version), loaded.digest, loaded.manifest.key).set(1)
        session = loaded.predictor.score
        facts |= {"digest": loaded.digest, "provider": session.chosen, "why": session.why}
        log.info("loaded", extra={"facts": facts | {"seconds": round(time.perf_counter() - started, 3)}})


def describe(model: Model, version: str | None) -> ModelAnswer:
    """What GET says of a model that may have no version to serve; a version that is asked for has to be there."""
    known = ModelAnswer(
        name=model.name,
        ready=bool(model.serving),
        versions=[int(serving) for serving in model.serving],
        rejected=[Rejected(version=int(bad), reason=reason) for bad, reason in model.rejected.items()],
    )
    if version is None and not model.serving:
        return known
    loaded = model.version(version)
    manifest = loaded.manifest
    return known.model_copy(
        update={
            "version": manifest.version,
            "digest": loaded.digest,
            "key": manifest.key,
            "task": manifest.task,
            "link": manifest.link,
            "exact": manifest.exact,
            "provider": loaded.predictor.score.chosen,
            "fields": [_describe_field(each) for each in loaded.schema.fields],
            "sizes": [SizeInfo(name=size.name, axis=size.axis) for size in manifest.sizes],
            "metrics": loaded.report.get("metrics", {}),
            "example": loaded.example,
        }
    )


def _describe_field(field: FittedField) -> FieldInfo:
    known: dict[str, int | str] = {"vocabulary": field.size - 2} if field.has_vocabulary else {}
    match field.kind:
        case Numeric(transform=transform):
            known["transform"] = transform
            known |= {"buckets": field.size - 1} if transform == "quantile" else {}
        case Multi() | Categorical() as kind:
            known |= {"buckets": kind.hash.buckets} if kind.hash else {}
            known |= {"max_len": kind.max_len} if isinstance(kind, Multi) else {}
    return FieldInfo.model_validate({"name": field.name, "kind": field.kind.kind, "source": field.kind.source, **known})


def _names(root: Path) -> Iterator[str]:
    """Folders that have a version; staged and foreign ones, and reserved names, are no models."""
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    return (
        name
        for name in found
        if re.fullmatch(NAME_PATTERN, name) and name not in RESERVED_NAMES and store.versions(root, name)
    )


def _reason(error: Exception) -> str:
    """Why a version was refused, for clients to read. What onnxruntime said may hold paths: only the log has it."""
    match error:
        case (RuntimeRefused() as refused) | BundleInvalid(__cause__=RuntimeRefused() as refused):
            return str(refused).removesuffix(f": {refused.__cause__}")
        case BundleInvalid():
            return error.reason
        case _:
            return "it could not be loaded; the log says why"


def _check_place(loaded: Runtime, name: str, version: int) -> None:
    manifest = loaded.manifest
    if (manifest.name, manifest.version) != (name, version):
        path = loaded.predictor.bundle.path
        raise BundleInvalid(path, f"its manifest says that it is {manifest.name} version {manifest.version}")
