"""What a wish comes to: which versions of a model are to serve, of those that do and those in the folder."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from service import folder
from service.control import ChangeModel, Refused, Serve, Versions
from service.errors import Conflict, NotFound, NotReady
from service.trials import Candidate
from service.vetting import Tried

ROLLED_BACK: Final = "rolled back"
LOADING: Final = {"load", "look", "retry", "reload"}
LOOKING: Final = {"look", "retry"}
TAKING: Final = {"rollback", "quarantine"}


@dataclass(eq=False)
class Since:
    """What was decided about a model since a load of it was asked for, and the load has to heed."""

    refused: dict[str, Refused] = field(default_factory=dict)
    unloaded: bool = False


@dataclass(frozen=True)
class Case:
    """A wish, and what there is to judge it by: what is `known` of its model, the folder of `bundles`, how many
    versions may be loaded at `most`, and what was `tried`; where that is None versions are taken on trust.
    """

    wish: ChangeModel
    known: Versions
    bundles: Path
    most: int
    tried: Tried | None
    since: Since = field(default_factory=Since)

    def load(self, *, is_new: bool) -> Serve:
        """Raises NotFound where there is nothing to load, and Conflict where the model was unloaded meanwhile."""
        wish, known = self.wish, self.known
        if not self.found:
            raise NotFound("there is no bundle of that name in the folder")
        if self._is_void:
            return Serve(wish.model, known)
        if self.since.unloaded:
            raise Conflict(f"{wish.model} was unloaded while it was loaded")
        serving = self._serving
        rejected = self._refused | self._refusals
        if known.serving and not serving:  # what is in memory is good
            kept = {version: why for version, why in rejected.items() if known.serving.get(version) != why.digest}
            return Serve(wish.model, replace(known, rejected=kept))
        unloaded = known.unloaded and not serving
        versions = replace(known, serving=serving, rejected=rejected, unloaded=unloaded, is_new=is_new)
        return Serve(wish.model, versions, anew=wish.action == "reload")

    def without(self) -> Serve:
        """Refuse a version that serves. The others go on, or where there is none before it, what the folder has yet.

        Raises Conflict.
        """
        bad, after = self.bad, self._after
        if self.needs_folder:
            after = replace(after, serving=after.serving | self._serving, rejected=after.rejected | self._refusals)
        before = _before(after, bad)
        if self.wish.action == "rollback" and not before:
            raise Conflict(f"{self.wish.model} has no good version before {bad} to go back to")
        if before and self.known.routes.stable == int(bad):
            after = replace(after, routes=replace(after.routes, stable=max(before)))
        return Serve(self.wish.model, after)

    def default(self) -> Serve:
        """Raises NotReady or NotFound where the version does not serve."""
        wish, known = self.wish, self.known
        if wish.version is not None and str(wish.version) not in known.serving:
            if refused := known.rejected.get(str(wish.version)):
                raise NotReady(f"version {wish.version} of {wish.model} was refused: {refused.reason}")
            raise NotFound(f"{wish.model} has the versions {', '.join(known.serving) or '(none)'}")
        return Serve(wish.model, replace(known, routes=replace(known.routes, stable=wish.version)))

    def complain(self) -> None:
        """Raise NotReady where the highest version that a load found was refused."""
        rejected = self.known.rejected | self._refusals
        newest = max({**self.known.serving, **rejected}, key=int, default="")
        refused = rejected.get(newest)
        if refused and refused.reason != ROLLED_BACK:
            raise NotReady(f"version {newest} of {self.wish.model} was refused: {refused.reason}")

    @property
    def bad(self) -> str:
        """The version that is to be refused. Raises Conflict where it does not serve."""
        wish, known = self.wish, self.known
        bad = known.default if wish.action == "rollback" else str(wish.version)
        if bad not in known.serving:
            raise Conflict(f"{wish.model} serves no such version")
        if wish.action == "rollback" and wish.version is not None and str(wish.version) != bad:
            raise Conflict(f"the default of {wish.model} is version {bad}, not the one to go back from")
        return bad

    @property
    def needs_folder(self) -> bool:
        """Whether what serves is not enough for it, so that it may take long. Raises Conflict."""
        if self.wish.action in TAKING:
            after = self._after
            return not (_before(after, self.bad) if self.wish.action == "rollback" else after.serving)
        return self.wish.action in LOADING

    @property
    def wanted(self) -> list[Candidate]:
        """The versions in the folder that are to serve, unless they turn out to be refused: those that the routes name,
        and the highest others, as many as there is room for; on trust all of these, for some may not be good."""
        if self._is_void or self.since.unloaded:
            return []
        known, refused = self.known, self._refused | self._refusals
        if self.wish.action in TAKING:
            refused[self.bad] = Refused("", "")
        free = [version for version in self.found if version not in refused]
        named = [version for version in free if int(version) in known.routes.named]
        others = [version for version in free if version not in named]
        room = None if self.tried is None else known.routes.room(free, self.most)
        return [Candidate(self.wish.model, version, self.found[version]) for version in (*named, *others[:room])]

    @property
    def untried(self) -> list[Candidate]:
        return [each for each in self.wanted if not self._may(each)]

    @cached_property
    def found(self) -> dict[str, str]:
        """The versions in the folder, highest first, with their digests. Raises NotReady where it cannot be read."""
        try:
            return folder.versions(self.bundles, self.wish.model)
        except OSError as error:
            raise NotReady(f"the folder of bundles cannot be read: {error.strerror}") from None

    @property
    def _is_void(self) -> bool:
        """A look comes to nothing where the model was unloaded, be it since: only a load brings that back."""
        return self.known.unloaded and self.wish.action in LOOKING

    @property
    def _serving(self) -> dict[str, str]:
        return digests(each for each in self.wanted if self._may(each))

    @property
    def _after(self) -> Versions:
        """What is left, before a look into the folder, once a version is refused."""
        known, bad = self.known, self.bad
        reason = ROLLED_BACK if self.wish.action == "rollback" else self.wish.reason
        left = {version: digest for version, digest in known.serving.items() if version != bad}
        return replace(known, serving=left, rejected=known.rejected | {bad: Refused(reason, known.serving[bad])})

    def _may(self, candidate: Candidate) -> bool:
        """Whether a version may serve: it was tried, or serves already."""
        if self.tried is None:
            return True
        if candidate in self.tried:
            return self.tried[candidate] is None
        return self.wish.action != "reload" and self.known.serving.get(candidate.version) == candidate.digest

    @property
    def _refused(self) -> dict[str, Refused]:
        """The versions in the folder that are still the ones that were refused."""
        rejected = self.since.refused if self.wish.action == "reload" else self.known.rejected
        return {
            version: refused
            for version, refused in rejected.items()
            if self.found.get(version) == refused.digest
            and not (refused.passing and self.wish.action in {"load", "retry"})
        }

    @property
    def _refusals(self) -> dict[str, Refused]:
        """Of this model, what was tried and is not good."""
        return {each.version: why for each, why in (self.tried or {}).items() if why and each.model == self.wish.model}


def digests(candidates: Iterable[Candidate]) -> dict[str, str]:
    return {each.version: each.digest for each in candidates}


def _before(versions: Versions, bad: str) -> list[int]:
    """The versions that could answer in the place of a bad one: those before it, but no canary and no shadow."""
    aside = {versions.routes.canary, versions.routes.shadow}
    return [version for version in map(int, versions.serving) if version < int(bad) and version not in aside]
