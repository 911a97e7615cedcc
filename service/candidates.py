"""Candidate sets: candidates that rankings of one model ask for by name. Each is kept as the body it came in, and as
rows that are encoded once for every version of the model, before the version serves.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary

from bundle import EncodedRows, Encoder, InputError
from service.catalog import Catalog
from service.control import DropSet, PutSet
from service.errors import BodyRefused, NotFound, SetsFull
from service.messages import CandidateSetAnswer, Rejected
from service.metrics import Metrics
from service.runtime import Runtime
from service.settings import Settings
from service.tables import Table, present

Refusing = Callable[[], InputError | BodyRefused]  # makes the error anew


class Encoded(NamedTuple):
    """What one version makes of a set.

    `rows` hold the slots of the fields of `encoder`: those of a ranking's candidates where the set has no others, else
    those the set has. `unknown` counts, for the fields that have such rows, those whose value is not in the vocabulary.
    `fields` are the ones that the set has.
    """

    encoder: Encoder
    rows: EncodedRows
    unknown: Mapping[str, int]
    fields: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return self.rows.ids.nbytes + self.rows.values.nbytes


class CandidateSet:
    """One set. Safe to call from many threads."""

    def __init__(self, put: PutSet, *, limit: int) -> None:
        self.put = put
        self._limit = limit
        self._encoded: WeakKeyDictionary[Runtime, Encoded | Refusing] = WeakKeyDictionary()
        self._encoding, self._lock = Lock(), Lock()  # the first for as long as it takes, the second for a moment

    def of(self, loaded: Runtime) -> Encoded:
        """The set as this version has it: encoded the first time, and kept for as long as the version is loaded.

        Raises InputError or BodyRefused where the version cannot encode it.
        """
        with self._encoding:
            with self._lock:
                encoded = self._encoded.get(loaded)
            if encoded is None:
                encoded = self._encode(loaded)
                with self._lock:
                    self._encoded[loaded] = encoded
        if isinstance(encoded, Encoded):
            return encoded
        raise encoded()

    def _encode(self, loaded: Runtime) -> Encoded | Refusing:
        """The set, or why this version refuses it: then it need not read all of it again.

        An error that was raised once is not kept, for its traceback would keep the version.
        """
        try:
            return encode(loaded, self.raw(loaded))
        except InputError as error:
            return partial(
                InputError,
                expected=error.expected,
                received=error.received,
                field=error.field,
                instance=error.instance,
            )
        except BodyRefused as error:
            return partial(BodyRefused, *error.refusals)

    @property
    def bytes(self) -> int:
        """What the set takes, or was expected to take for as many versions as may be loaded, if that is more."""
        with self._lock:
            encoded = sum(each.bytes for each in self._encoded.values() if isinstance(each, Encoded))
        return max(self.put.cost, len(self.put.body) + encoded)

    def raw(self, loaded: Runtime) -> Table:
        """The candidates as they were put."""
        return loaded.decoder.candidates(self.put.body, limit=self._limit)


class CandidateSets:
    """The sets of all models. To be changed by one command at a time, and read from any thread meanwhile."""

    def __init__(self, catalog: Catalog, settings: Settings, metrics: Metrics) -> None:
        self._catalog, self._settings, self._metrics = catalog, settings, metrics
        self._sets: Mapping[tuple[str, str], CandidateSet] = {}
        metrics.candidate_set_bytes.set_function(lambda: sum(known.bytes for known in self._sets.values()))

    def command(self, model: str, name: str, body: bytes) -> PutSet:
        """The command that puts this body. Raises what a ranking with the same candidates would."""
        loaded = self._catalog.find(model).version(None)
        encoded = encode(loaded, loaded.decoder.candidates(body, limit=self._settings.max_candidates))
        cost = len(body) + self._settings.versions * encoded.bytes
        self._refuse_full(cost, [known.bytes for key, known in self._sets.items() if key != (model, name)])
        return PutSet(model, name, body, len(encoded.rows.ids), encoded.fields, cost)

    def put(self, put: PutSet) -> None:
        """Keep a set, in the place of one of its name. Raises SetsFull, and then keeps what was.

        Only what every process counts alike decides, whenever it came to know the sets.
        """
        others = {key: known for key, known in self._sets.items() if key != put.key}
        if len(others) >= self._settings.max_candidate_sets:
            raise SetsFull(f"{self._settings.max_candidate_sets} candidate sets may be kept: delete one")
        self._refuse_full(put.cost, [known.put.cost for known in others.values()])
        added = CandidateSet(put, limit=self._settings.max_candidates)
        for loaded in self._versions(put.model):
            with suppress(InputError, BodyRefused):
                added.of(loaded)
        self._replace({**others, put.key: added})

    def prepare(self, loaded: Runtime) -> None:
        """Encode the sets of a model for a version that is about to serve, so that no ranking waits for it."""
        for known in [known for (model, _), known in self._sets.items() if model == loaded.manifest.name]:
            with suppress(InputError, BodyRefused):
                known.of(loaded)

    def drop(self, drop: DropSet) -> None:
        """Raises NotFound where there is no such set."""
        self.find(drop.model, drop.name)
        self._replace({key: known for key, known in self._sets.items() if key != drop.key})

    def find(self, model: str, name: str) -> CandidateSet:
        """Raises NotFound, which says what sets there are."""
        found = self._sets.get((model, name))
        if found is None:
            names = ", ".join(self._names(model)) or "none"
            raise NotFound(f"the candidate sets of {model} are: {names}")
        return found

    def of_model(self, model: str) -> list[CandidateSetAnswer]:
        return [self.describe(model, name) for name in self._names(model)]

    def describe(self, model: str, name: str) -> CandidateSetAnswer:
        known = self.find(model, name)
        rejected: list[Rejected] = []
        for loaded in self._versions(model):
            try:
                known.of(loaded)
            except (InputError, BodyRefused) as error:
                rejected.append(Rejected(version=loaded.manifest.version, reason=str(error)))
        return CandidateSetAnswer(
            model=model,
            name=name,
            candidates=known.put.candidates,
            fields=list(known.put.fields),
            bytes=known.bytes,
            rejected=rejected,
        )

    def _refuse_full(self, cost: int, others: list[int]) -> None:
        free = self._settings.max_candidate_set_bytes - sum(others)
        if cost > free:
            raise SetsFull(f"the candidate set takes {cost} bytes, and {free} are free: delete another one")

    def _names(self, model: str) -> list[str]:
        return sorted(name for owner, name in self._sets if owner == model)

    def _versions(self, model: str) -> list[Runtime]:
        return list(self._catalog.find(model).serving.values())

    def _replace(self, sets: Mapping[tuple[str, str], CandidateSet]) -> None:
        self._sets = sets
        self._metrics.candidate_sets.set(len(sets))


def encode(loaded: Runtime, table: Table) -> Encoded:
    """Raises InputError for a value that the schema refuses."""
    fields = present(loaded.schema.names, table)
    of_candidate = loaded.ranking.of_candidate if loaded.ranking else None
    if of_candidate and set(fields) <= set(of_candidate.names):
        encoder = of_candidate
    else:
        encoder = loaded.encoder.only(fields) if fields else loaded.encoder
    rows = encoder.encode([table.columns[position] for position in encoder.positions], table.length)
    return Encoded(encoder, rows, encoder.count_unknown(rows.ids), fields)
