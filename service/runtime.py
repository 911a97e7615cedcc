"""One version of a model, loaded: its encoder and its graphs, with a clock and counters on them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import bundle
from bundle import EncodedRows, Predictor, explanation
from bundle.encoder import Row
from bundle.explanation import RowExplanation
from bundle.manifest import GraphName
from bundle.session import Provider
from service.messages import Batch, Instance, check_count, length
from service.metrics import Metrics

ROWS_PER_RUN = 128  # beyond it the pairs of a batch leave the processor's cache, and memory grows with the request
CANDIDATES_PER_RUN = 512  # a candidate whose context is known needs a fraction of a row's memory

Verb = Literal["predict", "explain", "rank"]


class Runtime:
    """Answers for one version, in runs of bounded length. Safe to call from many threads."""

    def __init__(self, predictor: Predictor, metrics: Metrics) -> None:
        self.predictor, self.schema, self.encoder = predictor, predictor.schema, predictor.encoder
        self.manifest, self.digest, self.report = predictor.manifest, predictor.bundle.digest, predictor.bundle.report
        self.ranking = predictor.ranking
        self._metrics = metrics

    @property
    def example(self) -> Instance:
        """An instance that can be sent as it is: drawn from the vocabulary, never a row of the data."""
        return self.predictor.bundle.golden_rows[0]

    def encode(self, batch: Batch, *, limit: int) -> EncodedRows:
        """The rows or columns of a request, at least one and at most `limit`. Raises BodyRefused and InputError."""
        if batch.instances is not None:
            check_count(len(batch.instances), limit=limit, key="instances")
            return self.encoder.rows(batch.instances)
        columns = batch.columns or {}
        check_count(length(columns), limit=limit, key="columns")
        return self.encoder.columns(columns)

    def count(self, encoded: EncodedRows, verb: Verb) -> NDArray[np.bool_]:
        """Count the rows of a request and the unknown values among them, and return which are unknown, [B, F]."""
        unknown = self.encoder.unknown(encoded.ids)
        self._count(verb, len(unknown), dict(zip(self.schema.names, unknown.sum(axis=0).tolist(), strict=True)))
        return unknown

    def _count(self, verb: Verb, rows: int, unknown: Mapping[str, int]) -> None:
        model = self.manifest.name
        self._metrics.batch_rows.labels(verb, model).observe(rows)
        self._metrics.rows.labels(model).inc(rows)
        for field, count in unknown.items():
            if count:
                self._metrics.unknown_values.labels(model, field).inc(count)

    def logits(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The score graph's logits [B]. Raises ArithmeticError where one is not finite."""
        return np.concatenate([self._score(_part(encoded, part)) for part in _parts(encoded)])

    def rank(self, context: EncodedRows, candidates: EncodedRows) -> NDArray[np.float32]:
        """Count the candidates as `count` does, and give their logits [B], with the one context computed once.

        Only where there is a `ranking`, which has the encoders of the two sides. Raises ArithmeticError as `logits`.
        """
        ranking, rows = self.ranking, len(candidates.ids)
        assert ranking is not None
        unknown = dict(zip(ranking.of_context.names, rows * ranking.of_context.unknown(context.ids)[0], strict=True))
        of_candidate = ranking.of_candidate.unknown(candidates.ids).sum(axis=0)
        unknown |= dict(zip(ranking.of_candidate.names, of_candidate, strict=True))
        self._count("rank", rows, unknown)
        with self._timed("rank_context"):
            state = ranking.state(context)
        logits = []
        for part in _parts(candidates, CANDIDATES_PER_RUN):
            with self._timed("rank_candidates"):
                logits.append(ranking.logits(state, _part(candidates, part)))
        return _finite(np.concatenate(logits))

    def explain(self, rows: Sequence[Row], encoded: EncodedRows, *, top_k: int) -> list[RowExplanation]:
        """One explanation a row, with its `top_k` strongest pairs."""
        explanations: list[RowExplanation] = []
        for part in _parts(encoded):
            within = _part(encoded, part)
            logits = self._score(within)
            with self._timed("explain"):
                arrays = self.predictor.explanations.run(within)
            explanations += explanation.explain(self.predictor.bundle, rows[part], within, logits, arrays, top_k=top_k)
        for each in explanations:
            self._metrics.completeness_error.labels(self.manifest.name).observe(each.completeness_error)
        return explanations

    def _score(self, encoded: EncodedRows) -> NDArray[np.float32]:
        with self._timed("score"):
            return _finite(self.predictor.score.run(encoded)["logit"])

    def _timed(self, graph: GraphName) -> AbstractContextManager[object]:
        return self._metrics.inference_seconds.labels(self.manifest.name, graph).time()


def load(path: Path, *, provider: Provider, threads: int, metrics: Metrics) -> Runtime:
    """Verify the bundle in `path`, open its graphs, replay its golden rows and warm both graphs.

    Raises BundleError with the reason where any of it fails.
    """
    predictor = bundle.open(path, provider=provider, threads=threads)
    golden = predictor.bundle.golden_rows
    for rows in (1, ROWS_PER_RUN):
        predictor.explain((golden * rows)[:rows])  # a ranking is warm: its golden rows were compared
    return Runtime(predictor, metrics)


def _finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(logits).all():  # a link would hide it: a clip of infinity looks like a prediction
        raise ArithmeticError("a graph gave a logit that is not finite")
    return logits


def _parts(encoded: EncodedRows, rows: int = ROWS_PER_RUN) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, len(encoded.ids), rows))


def _part(encoded: EncodedRows, part: slice) -> EncodedRows:
    return EncodedRows(encoded.ids[part], encoded.values[part])
