"""The bundles in a folder: find, load, hold, swap. A broken version is kept with its reason and never served."""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Lock

from bundle import BundleError, BundleInvalid, Categorical, Multi, Numeric, RuntimeRefused, store
from bundle.manifest import NAME_PATTERN, RESERVED_NAMES
from bundle.schema import FittedField
from service import runtime
from service.control import ChangeModel, Inventory, Versions
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
    unloaded: bool = False

    def version(self, version: str | None) -> Runtime:
        """The version asked for, or the highest good one. Raises NotReady or NotFound with what is there."""
        if self.unloaded:
            raise NotReady(f"{self.name} is unloaded")
        if not self.serving:
            raise NotReady(f"no version of {self.name} can serve: {self.reasons}")
        if version is None:
            return next(iter(self.serving.values()))
        if version in self.serving:
            return self.serving[version]
        if version in self.rejected:
            raise NotReady(f"version {version} of {self.name} was refused: {self.rejected[version]}")
        raise NotFound(f"{self.name} has the versions {', '.join(self.serving)}")

    @property
    def reasons(self) -> str:
        return "; ".join(f"version {version}: {reason}" for version, reason in self.rejected.items())


class Catalog:
    """Every model under `settings.bundles`. Empty until `load`.

    `models` may be read in any thread at any time: a change puts another dict in its place. A request that has
    found its version keeps it to the end, whatever becomes of it here.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.models: Mapping[str, Model] = {}
        self._change = Lock()
        self._is_leaving = False

    def load(self, inventory: Inventory | None = None) -> None:
        """Load the newest good versions of every model, or else exactly what serves in an inventory.

        What cannot be loaded is refused, logged and kept apart.
        """
        for name in _names(self._settings.bundles) if inventory is None else inventory:
            self._put(self._load_model(name, {}, inventory[name] if inventory else None))
        self._metrics.ready.set(not self.missing)
        if self.missing:
            log.error("not ready", extra={"facts": {"reason": self.missing}})

    def apply(self, command: ChangeModel) -> None:
        """Carry out a command, however long it takes, one at a time.

        Raises NotFound where there is no such model, and NotReady where its highest version was refused. Lower ones
        serve all the same; where none could be loaded, what served before goes on.
        """
        with self._change:
            if command.action == "unload":
                self._put(Model(self.find(command.model).name, unloaded=True))
                return
            if command.model not in _names(self._settings.bundles):
                raise NotFound("there is no bundle of that name in the folder")
            known = self.models.get(command.model, Model(command.model))
            model = self._load_model(known.name, {} if command.action == "reload" else known.serving)
            newest = max({**model.serving, **model.rejected}, key=int, default=None)
            if newest is None:
                raise NotFound("there is no bundle of that name in the folder")
            refused = model.rejected.get(newest)
            if known.serving and not model.serving:
                others = {version: why for version, why in model.rejected.items() if version not in known.serving}
                model = Model(known.name, known.serving, others)
            self._put(model)
        if refused is not None:
            raise NotReady(f"version {newest} of {model.name} was refused: {refused}")

    def leave(self) -> None:
        """Be ready no more, but go on serving: the process is about to end."""
        self._is_leaving = True
        self._metrics.ready.set(0)

    def unknown(self) -> list[str]:
        """The names of models that came into the folder after the last load, and were not loaded."""
        return [name for name in _names(self._settings.bundles) if name not in self.models]

    def _put(self, model: Model) -> None:
        """Let requests from now on find this, and metrics tell of it."""
        before = self.models.get(model.name)
        self.models = dict(sorted({**self.models, model.name: model}.items()))
        here, gone = _labels(model), _labels(before) if before else set()
        for labels in gone - here:
            self._metrics.model_info.remove(*labels)
        for labels in here:
            self._metrics.model_info.labels(*labels).set(1)
        self._metrics.rejected_bundles.labels(model.name).set(len(model.rejected))
        self._metrics.ready.set(not self.missing)

    def inventory(self) -> Inventory:
        """What is loaded, for another process to load the same."""
        return {
            model.name: Versions([int(version) for version in model.serving], dict(model.rejected), model.unloaded)
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
        if self._is_leaving:
            return "the service is stopping"
        if not self.models:
            return f"there is no bundle in {str(self._settings.bundles)!r} (<model>/<version>/manifest.json)"
        idle = [model for model in self.models.values() if not model.serving and not model.unloaded]
        return "; ".join(f"{model.name} has no version that serves ({model.reasons})" for model in idle)

    def _load_model(self, name: str, serving: Mapping[str, Runtime], known: Versions | None = None) -> Model:
        """The newest good versions of a model, or those `known` elsewhere; those that are among `serving`, and the same
        still, are taken over."""
        if known is None:
            model, versions = Model(name), store.versions(self._settings.bundles, name)[::-1]
        else:
            model, versions = Model(name, rejected=dict(known.rejected), unloaded=known.unloaded), known.serving
        for version in versions:
            if len(model.serving) == self._settings.versions:
                break
            self._load_version(model, version, serving.get(str(version)))
        return model

    def _load_version(self, model: Model, version: int, loaded: Runtime | None) -> None:
        facts: dict[str, object] = {"model": model.name, "version": version}
        started = time.perf_counter()
        path = self._settings.bundles / model.name / str(version)
        if loaded and _is_same(loaded, path):
            model.serving[str(version)] = loaded
            return
        try:
            loaded = runtime.load(
                path,
                provider=self._settings.provider,
                threads=self._settings.threads,
                metrics=self._metrics,
                trusted_keys=self._settings.trusted_keys or (),
                gpu=self._settings.gpu,
                longest=self._settings.max_value_length,
            )
            _check_place(loaded, model.name, version)
        except Exception as error:  # whatever a bundle does, the versions beside it have to serve
            model.rejected[str(version)] = _reason(error)
            unforeseen = not isinstance(error, BundleError)
            log.error("rejected", extra={"facts": facts | {"reason": str(error)}}, exc_info=unforeseen)
            return
        model.serving[str(version)] = loaded
        session = loaded.predictor.score
        facts |= {
            "digest": loaded.digest,
            "provider": session.chosen,
            "why": session.why,
            "nodes": loaded.predictor.nodes,
        }
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
            "nodes": dict(loaded.predictor.nodes),
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


def _is_same(loaded: Runtime, path: Path) -> bool:
    try:
        return sha256((path / store.MANIFEST).read_bytes()).hexdigest() == loaded.digest
    except OSError:
        return False


def _labels(model: Model) -> set[tuple[str, str, str, str]]:
    """What the metric `model_info` says of a model."""
    return {(model.name, version, loaded.digest, loaded.manifest.key) for version, loaded in model.serving.items()}


def _check_place(loaded: Runtime, name: str, version: int) -> None:
    manifest = loaded.manifest
    if (manifest.name, manifest.version) != (name, version):
        path = loaded.predictor.bundle.path
        raise BundleInvalid(path, f"its manifest says that it is {manifest.name} version {manifest.version}")
