"""The bundles in a folder: find, load, hold, swap. A broken version is kept with its reason and never served."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock

from msgspec import structs

from bundle import BundleError, BundleInvalid, BundleUntrusted, Categorical, Multi, Numeric, RuntimeRefused
from bundle.device import Provider
from bundle.schema import FittedField
from service import folder, runtime
from service.control import Inventory, Prepare, Refused, Routes, Serve, SetRoutes, Versions
from service.errors import NotFound, NotReady
from service.messages import FieldInfo, ModelAnswer, Rejected, SizeInfo
from service.metrics import Metrics
from service.runtime import Runtime
from service.settings import Settings
from service.traffic import ROUTE_NAMES, RouteName, Traffic, check_routes, passed_over, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """One name: its versions that serve, highest first, and those that were refused, each with the reason."""

    name: str
    serving: dict[str, Runtime] = field(default_factory=dict)
    rejected: dict[str, Refused] = field(default_factory=dict)
    unloaded: bool = False
    routes: Routes = field(default_factory=Routes)
    is_new: bool = False  # it came after the start, and has not served yet

    @cached_property
    def traffic(self) -> Traffic:
        """What the routes come to; to be asked for once all versions are there."""
        return resolve(self.name, self.routes, self.serving)

    def version(self, version: str | None, key: bytes | None = None) -> Runtime:
        """The version asked for, by number or by the name of a route, or else the stable one, or the canary where the
        key of a request is among those it answers. Raises NotReady or NotFound with what is there."""
        if self.unloaded:
            raise NotReady(f"{self.name} is unloaded")
        if not self.serving:
            raise NotReady(f"no version of {self.name} can serve: {self.reasons}")
        if version is None and (loaded := self.traffic.of(key)):
            return loaded
        if version in self.serving:
            return self.serving[version]
        if version in ROUTE_NAMES:
            return self._named(version)
        if version in self.rejected:
            raise NotReady(f"version {version} of {self.name} was refused: {self.rejected[version].reason}")
        raise NotFound(f"{self.name} has the versions {', '.join(self.serving)}")

    def _named(self, route: RouteName) -> Runtime:
        loaded: Runtime | None = getattr(self.traffic, route)
        if loaded is not None:
            return loaded
        version: int | None = getattr(self.routes, route)
        if version is None:
            raise NotFound(f"{self.name} has no {route}; it has the versions {', '.join(self.serving)}")
        raise NotReady(f"the {route} of {self.name}, version {version}, does not serve")

    @property
    def reasons(self) -> str:
        return "; ".join(f"version {version}: {refused.reason}" for version, refused in self.rejected.items())


class Catalog:
    """Every model under `settings.bundles`. Empty until `load`.

    `models` may be read in any thread at any time: a change puts another dict in its place. A request that has
    found its version keeps it to the end, whatever becomes of it here.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.models: Mapping[str, Model] = {}
        self.prepare: Callable[[Runtime], None] = lambda _: None  # called with each version before it serves
        self._change = Lock()
        self._hold = Lock()
        self._newest: dict[str, int] = {}  # Prepare, by model
        self._opened: dict[str, Model] = {}  # what is held for a command to come, and what was refused, by model
        self._is_leaving = False
        self._why = ""  # the last version was loaded where it was, as the log says already

    def load(self, inventory: Inventory) -> None:
        """Load what an inventory names. What cannot be loaded is refused, logged and kept apart."""
        for name, versions in inventory.items():
            self._put(self._load_model(name, versions))
        self._metrics.ready.set(not self.missing)
        if self.missing:
            log.error("not ready", extra={"facts": {"reason": self.missing}})

    def open(self, prepare: Prepare) -> None:
        """Open what a command would have to, and hold it, in the place of what was held for its model, unless a later
        one has come by then. May run beside any change, and beside this."""
        command, name = prepare.serve, prepare.serve.model
        with self._hold:
            if prepare.number < self._newest.get(name, prepare.number):
                return
            self._newest[name] = prepare.number
            self._opened.pop(name, None)
        kept = {} if command.anew else self.models.get(name, Model(name)).serving
        opened = self._load_model(name, command.versions, kept)
        with self._hold:
            if self._newest[name] == prepare.number and (opened.serving or opened.rejected):
                self._opened[name] = opened

    def apply(self, command: Serve) -> None:
        """Carry out a command, one at a time, and however long it takes where nothing is held for it.

        Raises NotReady where none of its versions can be loaded, and something served before: that goes on.
        """
        with self._change:
            known = self.models.get(command.model, Model(command.model))
            opened = self._opened.get(known.name, Model(known.name))
            kept = {} if command.anew else known.serving
            model = self._load_model(known.name, command.versions, kept, opened.serving, opened.rejected)
            for version, loaded in model.serving.items():
                if loaded is opened.serving.get(version):  # for what was put since it was opened
                    self.prepare(loaded)
            newest = next((version for version in command.versions.serving if not model.serving), None)
            refused = model.rejected.get(newest) if newest and known.serving else None
            if known.unloaded and not model.serving:  # as ready as before
                model = replace(model, unloaded=True)
            if refused:
                digests = {version: loaded.digest for version, loaded in known.serving.items()}
                others = {version: why for version, why in model.rejected.items() if digests.get(version) != why.digest}
                model = replace(model, serving=known.serving, rejected=others)
            self._put(model)
        if refused:
            raise NotReady(f"version {newest} of {model.name} was refused: {refused.reason}")

    def route(self, command: SetRoutes) -> None:
        """Set the routes of a model, and let go of versions that only the ones before had kept.

        Raises NotFound where there is no such model, and Conflict where a version does not serve.
        """
        with self._change:
            model = self.find(command.model)
            check_routes(model.name, command.routes, model.serving, model.rejected)
            versions = structs.replace(self.inventory()[model.name], routes=command.routes)
            self._put(self._load_model(model.name, versions, model.serving))
        log.info("routes", extra={"facts": {"model": model.name, **structs.asdict(command.routes)}})

    def leave(self) -> None:
        """Be ready no more, but go on serving: the process is about to end."""
        self._is_leaving = True
        self._metrics.ready.set(0)

    def unknown(self) -> list[str]:
        """The names of models that came into the folder after the last load, and were not loaded. None where it cannot
        be read."""
        try:
            return [name for name in folder.names(self._settings.bundles) if name not in self.models]
        except OSError as error:
            log.error("look failed", extra={"facts": {"reason": error.strerror}})
            return []

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
        for version in passed_over(model.routes, model.serving):
            if before is None or version not in passed_over(before.routes, before.serving):
                stable = model.traffic.stable
                facts = {"model": model.name, "version": int(version), "stable": stable and stable.manifest.version}
                log.warning("passed over", extra={"facts": facts})

    def inventory(self) -> Inventory:
        """What is loaded, for another process to load the same."""
        return {
            model.name: Versions(
                {version: loaded.digest for version, loaded in model.serving.items()},
                dict(model.rejected),
                model.unloaded,
                model.routes,
                model.is_new,
            )
            for model in self.models.values()
        }

    def find(self, name: str) -> Model:
        """Raises NotFound, which says what models there are."""
        if name not in self.models:
            raise NotFound(f"the models here are {', '.join(self.models)}" if self.models else self.missing)
        return self.models[name]

    @property
    def missing(self) -> str:
        """Why the service is not ready; empty where every model but new ones has a version that serves."""
        if self._is_leaving:
            return "the service is stopping"
        if not self.models:
            return f"there is no bundle in {str(self._settings.bundles)!r} (<model>/<version>/manifest.json)"
        idle = [model for model in self.models.values() if not model.serving and not (model.unloaded or model.is_new)]
        said = [f"{model.name} has no version that serves ({model.reasons})" for model in idle]
        return "; ".join(said + self.failures)

    @property
    def failures(self) -> list[str]:
        """What cannot run any more, though it could when it was loaded: only another process may help."""
        return [
            f"version {version} of {model.name} cannot run any more"
            for model in self.models.values()
            for version, loaded in model.serving.items()
            if loaded.has_failed
        ]

    def _load_model(self, name: str, versions: Versions, *held: Mapping[str, Runtime | Refused]) -> Model:
        """The first good ones of these versions, and those that the routes name; what is `held`, with the same digest,
        is taken over, the first one where there are several."""
        model, routes = Model(name, {}, dict(versions.rejected), versions.unloaded, versions.routes), versions.routes
        room = routes.room(versions.serving, self._settings.versions)
        for version, digest in versions.serving.items():
            others = sum(int(each) not in routes.named for each in model.serving)
            if int(version) in routes.named or others < room:
                known = (each[version] for each in held if version in each)
                self._load_version(
                    model, version, digest, next((each for each in known if each.digest == digest), None)
                )
        highest_first = dict(sorted(model.serving.items(), key=lambda item: -int(item[0])))
        return replace(model, serving=highest_first, is_new=versions.is_new and not highest_first)

    def _load_version(self, model: Model, version: str, digest: str, held: Runtime | Refused | None) -> None:
        if isinstance(held, Refused):
            model.rejected[version] = held
            return
        if held:
            model.serving[version] = held
            return
        facts: dict[str, object] = {"model": model.name, "version": int(version)}
        started = time.perf_counter()
        path = self._settings.bundles / model.name / version
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
            check_place(loaded, path, digest)
            self.prepare(loaded)
        except Exception as error:  # whatever a bundle does, the versions beside it have to serve
            model.rejected[version] = refused(error, digest, self._settings.provider)
            unforeseen = not isinstance(error, BundleError)
            log.error("rejected", extra={"facts": facts | {"reason": str(error)}}, exc_info=unforeseen)
            return
        model.serving[version] = loaded
        session = loaded.predictor.score
        facts |= {
            "digest": loaded.digest,
            "provider": session.chosen,
            **({} if session.why == self._why else {"why": session.why}),
            "nodes": loaded.predictor.nodes,
        }
        self._why = session.why
        log.info("loaded", extra={"facts": facts | {"seconds": round(time.perf_counter() - started, 3)}})


def describe(model: Model, version: str | None) -> ModelAnswer:
    """What GET says of a model that may have no version to serve; a version that is asked for has to be there."""
    known = ModelAnswer(
        name=model.name,
        ready=bool(model.serving),
        versions=[int(serving) for serving in model.serving],
        rejected=[Rejected(version=int(bad), reason=refused.reason) for bad, refused in model.rejected.items()],
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


def refused(error: Exception, digest: str, provider: Provider) -> Refused:
    """Why a version was refused, for clients to read. What onnxruntime said may hold paths: only the log has it."""
    match error:
        case MemoryError() | BundleInvalid(__cause__=MemoryError()):
            return Refused("memory ran short while it was opened", digest, passing=True)
        case (RuntimeRefused() as said) | BundleInvalid(__cause__=RuntimeRefused() as said):
            machine = said.__cause__ is None or provider in {"cuda", "tensorrt"}
            return Refused(str(said).removesuffix(f": {said.__cause__}"), digest, passing=machine)
        case BundleInvalid():
            return Refused(error.reason, digest, passing=isinstance(error, BundleUntrusted))
        case _:
            return Refused("it could not be loaded; the log says why", digest, passing=True)


def _labels(model: Model) -> set[tuple[str, str, str, str]]:
    """What the metric `model_info` says of a model."""
    return {(model.name, version, loaded.digest, loaded.manifest.key) for version, loaded in model.serving.items()}


def check_place(loaded: Runtime, path: Path, digest: str) -> None:
    """Raise BundleInvalid where a bundle lies in another model's or version's folder, or is not the one expected."""
    manifest = loaded.manifest
    if (manifest.name, str(manifest.version)) != (path.parent.name, path.name):
        raise BundleInvalid(path, f"its manifest says that it is {manifest.name} version {manifest.version}")
    if loaded.digest != digest:
        raise BundleInvalid(path, "it was replaced while it was loaded")
