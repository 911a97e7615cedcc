"""One version of a model, loaded: its encoder and its two graphs, with a clock and counters on them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import bundle
from bundle import EncodedRows, Predictor, explanation
from bundle.encoder import Row
from bundle.explanation import Arrays, RowExplanation
from bundle.session import Provider, Session
from service.messages import Batch, Instance, check_count, length
from service.metrics import Metrics

ROWS_PER_RUN = 128  # beyond it the pairs of a batch leave the processor's cache, and memory grows with the request

Verb = Literal["predict", "explain", "rank"]


class Runtime:
    """Answers for one version, in runs of at most ROWS_PER_RUN rows. Safe to call from many threads."""

    def __init__(self, predictor: Predictor, metrics: Metrics) -> None:
        self.predictor, self.schema, self.encoder = predictor, predictor.schema, predictor.encoder
        self.manifest, self.digest, self.report = predictor.manifest, predictor.bundle.digest, predictor.bundle.report
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
        unknown, model = self.encoder.unknown(encoded.ids), self.manifest.name
        self._metrics.batch_rows.labels(verb, model).observe(len(unknown))
        self._metrics.rows.labels(model).inc(len(unknown))
        for field, rows in zip(self.schema.names, unknown.sum(axis=0).tolist(), strict=True):
            if rows:
                self._metrics.unknown_values.labels(model, field).inc(rows)
        return unknown

    def logits(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The score graph's logits [B]. Raises ArithmeticError where one is not finite."""
        return np.concatenate([self._score(_part(encoded, part)) for part in _parts(encoded)])

    def explain(self, rows: Sequence[Row], encoded: EncodedRows, *, top_k: int) -> list[RowExplanation]:
        """One explanation a row, with its `top_k` strongest pairs."""
        explanations: list[RowExplanation] = []
        for part in _parts(encoded):
            within = _part(encoded, part)
            logits, arrays = self._score(within), self._run("explain", self.predictor.explanations, within)
            explanations += explanation.explain(self.predictor.bundle, rows[part], within, logits, arrays, top_k=top_k)
        for each in explanations:
            self._metrics.completeness_error.labels(self.manifest.name).observe(each.completeness_error)
        return explanations

    def _score(self, encoded: EncodedRows) -> NDArray[np.float32]:
        logits = self._run("score", self.predictor.score, encoded)["logit"]
        if not np.isfinite(logits).all():  # a link would hide it: a clip of infinity looks like a prediction
            raise ArithmeticError("the score graph gave a logit that is not finite")
        return logits

    def _run(self, graph: Literal["score", "explain"], session: Session, encoded: EncodedRows) -> Arrays:
        with self._metrics.inference_seconds.labels(self.manifest.name, graph).time():
            return session.run(encoded)


def load(path: Path, *, provider: Provider, threads: int, metrics: Metrics) -> Runtime:
    """Verify the bundle in `path`, open its graphs, replay its golden rows and warm both graphs.

    Raises BundleError with the reason where any of it fails.
    """
    predictor = bundle.open(path, provider=provider, threads=threads)
    golden = predictor.bundle.golden_rows
    for rows in (1, ROWS_PER_RUN):
        predictor.explain((golden * rows)[:rows])
    return Runtime(predictor, metrics)


def _parts(encoded: EncodedRows) -> Iterator[slice]:
    return (slice(start, start + ROWS_PER_RUN) for start in range(0, len(encoded.ids), ROWS_PER_RUN))


def _part(encoded: EncodedRows, part: slice) -> EncodedRows:
    return EncodedRows(encoded.ids[part], encoded.values[part])
