"""One version of a model, loaded: its decoder, its encoder and its graphs, with a clock and counters on them."""

import logging
import time
import timeit
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Final, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

import bundle
from bundle import EncodedRows, Predictor, RuntimeRefused, buckets, explanation
from bundle.device import FIRST_GPU, Gpu, Provider
from bundle.explanation import RowExplanation
from bundle.manifest import GraphName
from bundle.rows import Row
from service import effort
from service.batcher import SHORT_SECONDS, Batcher, Scored
from service.decoder import Decoder
from service.drift import Scores
from service.effort import Effort
from service.errors import RunFailed
from service.messages import Instance
from service.metrics import Metrics
from service.pace import Pace
from service.signature import Signature
from service.statistics import Statistics
from service.tables import Rows, Table, joined
from service.texts import LONGEST

ROWS_PER_RUN: Final = (32, 64, 128, 256)  # to choose from: with more, the pairs of a batch leave the processor's cache
GPU_ROWS_PER_RUN: Final = (256, 1024, 4096, 16384)
GRAPH_SECONDS: Final = SHORT_SECONDS / 4  # a batch in the graph, warm: amid requests it takes twice as long
EXPLAINED_PER_RUN: Final = 128
CANDIDATES_PER_RUN: Final = 1024  # a candidate whose context is known needs a fraction of a row's memory
WARM_RUNS: Final = 3  # of each bucket of a GPU: the first ones allocate, a CUDA graph is recorded after them
CLOSE: Final = 1.05  # a cost of one row that is next to the least
REPEATS: Final = 5  # of each measurement; the quickest counts

T = TypeVar("T")

log = logging.getLogger(__name__)

Request = Table | Rows | EncodedRows
Verb = Literal["predict", "explain", "rank", "infer"]
VERBS: Final[tuple[Verb, ...]] = get_args(Verb)


class Runtime:
    """Answers for one version, in runs of at most `rows_per_run` rows. Safe to call from many threads.

    `batcher`, for the event loop, scores what several requests hold in one run. Where onnxruntime fails, which no row
    that was encoded can make it do, the request gets RunFailed; `has_failed` where it fails for a golden row, too.
    `short_pace` and `long_pace` are what requests took that came through the batcher, and in threads; `effort`
    says which rankings are short, None that none is.
    """

    def __init__(self, predictor: Predictor, metrics: Metrics, longest: int = LONGEST) -> None:
        self.predictor, self.schema, self.encoder = predictor, predictor.schema, predictor.encoder
        self.manifest, self.digest, self.report = predictor.manifest, predictor.bundle.digest, predictor.bundle.report
        self.decoder, self.signature = Decoder(predictor.encoder, longest=longest), Signature(predictor.encoder)
        self.longest = longest
        self.ranking, self.statistics = predictor.ranking, Statistics()
        self.scores = Scores(predictor.bundle.score_bins) if predictor.bundle.score_bins else None
        self.identity = {"model": self.manifest.name, "version": self.manifest.version, "digest": self.digest}
        self.has_failed = False
        self.short_pace, self.long_pace = ({verb: Pace() for verb in VERBS} for _ in range(2))
        self._metrics = metrics
        metrics.serves(self.manifest.name)
        self._rows = metrics.rows.labels(self.manifest.name)
        self._request_rows = {verb: metrics.batch_rows.labels(verb, self.manifest.name) for verb in VERBS}
        self._runs = {
            graph: (metrics.run_rows.labels(*labels), metrics.inference_seconds.labels(*labels))
            for graph in self.manifest.graphs
            for labels in [(self.manifest.name, graph)]
        }
        self._failed_runs = {graph: metrics.failed_runs.labels(self.manifest.name, graph) for graph in self._runs}
        on_gpu = predictor.score.chosen != "cpu"
        # On a processor that is shared with others only the thread's own time says how long a run is.
        clock = time.perf_counter if on_gpu else time.thread_time
        seconds = _measured(predictor, GPU_ROWS_PER_RUN if on_gpu else ROWS_PER_RUN, clock)
        self.rows_per_run = best_rows(seconds)
        self._candidates_per_run = self.rows_per_run if on_gpu else CANDIDATES_PER_RUN
        self.effort: Effort | None = None
        if self.ranking and not on_gpu:
            self.effort = effort.measured(self.ranking, _golden(predictor, CANDIDATES_PER_RUN), clock)
        if on_gpu:
            _warm(predictor, self.rows_per_run)
        share = 1 if on_gpu else GRAPH_SECONDS / seconds[self.rows_per_run]
        rows = max(1, int(self.rows_per_run * share))
        # The batcher must not hold what holds it, or an unloaded version would keep its memory.
        score = partial(_score_all, weakref.ref(self))
        metrics.versions.add(self)
        self.batcher = Batcher(
            score,
            rows=rows,
            seconds=seconds[min(seconds)],
            clock=clock,
            waits=on_gpu,
            dropped=partial(metrics.dropped, self.manifest.name),
        )

    @property
    def labels(self) -> tuple[str, str]:
        """Its model and its version, for metrics."""
        return self.manifest.name, str(self.manifest.version)

    @property
    def example(self) -> Instance:
        """An instance that can be sent as it is: drawn from the vocabulary, never a row of the data."""
        return self.predictor.bundle.golden_rows[0]

    def encode(self, table: Table) -> EncodedRows:
        """Raises InputError for a value that the schema refuses."""
        return self.encoder.encode(table.columns, table.length)

    def count_request(self, verb: Verb, rows: int) -> None:
        self._request_rows[verb].observe(rows)

    def count(self, rows: EncodedRows) -> NDArray[np.bool_]:
        """Count rows and the unknown values among them, and return which are unknown, [B, F]."""
        unknown = self.encoder.unknown(rows.ids)
        self._rows.inc(len(unknown))
        if unknown.any():
            self._count_unknown(dict(zip(self.schema.names, unknown.sum(axis=0).tolist(), strict=True)))
        return unknown

    def _count_unknown(self, unknown: Mapping[str, int]) -> None:
        """Count the rows, by field, that are unknown in it."""
        for field, rows in unknown.items():
            if rows:
                self._metrics.unknown_values.labels(self.manifest.name, field).inc(rows)

    def score(self, rows: EncodedRows) -> Scored:
        """Logits, predictions and the names of unknown fields, for every row."""
        started = time.perf_counter()
        logits = self.logits(rows)
        if self.scores:
            self.scores.add(logits)
        unknown = _named(self.count(rows), self.schema.names)  # only now: a batch whose run fails is done in halves
        predictions = self.manifest.predictions(logits).tolist()
        return Scored(predictions, logits.tolist(), unknown, time.perf_counter() - started)

    def score_all(self, requests: Sequence[Request]) -> Scored:
        """The same for the rows of several requests, in their order. Raises InputError as `encode`."""
        return self.score(self.encoded(requests))

    def encoded(self, requests: Sequence[Request]) -> EncodedRows:
        """The rows of several requests, in their order. Raises InputError as `encode`."""
        raw = [request for request in requests if not isinstance(request, EncodedRows)]
        if len(raw) == len(requests):
            return self.encode(joined(raw))
        encoded = [each if isinstance(each, EncodedRows) else self.encode(joined([each])) for each in requests]
        return encoded[0] if len(encoded) == 1 else EncodedRows(*map(np.concatenate, zip(*encoded, strict=True)))

    def logits(self, rows: EncodedRows) -> NDArray[np.float32]:
        """The score graph's logits [B]. Raises ArithmeticError where one is not finite."""
        return _joined([self._score(part) for part in _parts(rows, self.rows_per_run)])

    def logits_aside(self, rows: EncodedRows) -> NDArray[np.float32]:
        """The same logits, to be compared and not served: nothing is counted, and no failure is this version's.

        Raises RuntimeRefused where onnxruntime fails.
        """
        return _finite(np.concatenate([self.predictor.logits(part) for part in _parts(rows, self.rows_per_run)]))

    def rank(
        self, context: EncodedRows, candidates: EncodedRows, *, unknown: Mapping[str, int] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, int]]:
        """Count the candidates as `count` does, and give their logits [B], with the one context computed once, and how
        many of them are unknown, by field.

        `unknown` says how many of the candidates are unknown, by field, where that is known already.
        Only where there is a `ranking`, which has the encoders of the two sides. Raises ArithmeticError as `logits`.
        """
        ranking, rows = self.ranking, len(candidates.ids)
        assert ranking is not None
        self._rows.inc(rows)
        found = dict.fromkeys(ranking.of_context.count_unknown(context.ids), rows)
        found |= ranking.of_candidate.count_unknown(candidates.ids) if unknown is None else unknown
        self._count_unknown(found)
        of_candidates = partial(ranking.logits, self._run("rank_context", ranking.state, context))
        parts = _parts(candidates, self._candidates_per_run)
        return _finite(_joined([self._run("rank_candidates", of_candidates, part) for part in parts])), found

    def explain(self, raw: Sequence[Row], rows: EncodedRows, *, top_k: int) -> list[RowExplanation]:
        """One explanation a row, with its `top_k` strongest pairs; `raw` are the rows before they were encoded."""
        explanations: list[RowExplanation] = []
        for part in _parts(rows, EXPLAINED_PER_RUN):
            logits, arrays = self._score(part), self._run("explain", self.predictor.explanations.run, part)
            named = raw[len(explanations) : len(explanations) + len(part.ids)]
            explanations += explanation.explain(self.predictor.bundle, named, part, logits, arrays, top_k=top_k)
        for each in explanations:
            self._metrics.completeness_error.labels(self.manifest.name).observe(each.completeness_error)
        return explanations

    def _score(self, rows: EncodedRows) -> NDArray[np.float32]:
        started = time.perf_counter()
        logits = self._run("score", self.predictor.score.run, rows)["logit"]
        self.statistics.ran(len(rows.ids), time.perf_counter() - started)
        return _finite(logits)

    def _run(self, graph: GraphName, act: Callable[[EncodedRows], T], rows: EncodedRows) -> T:
        started = time.perf_counter()
        try:
            answers = act(rows)
        except RuntimeRefused as error:
            raise self._failed(graph, error) from error
        size, seconds = self._runs[graph]
        size.observe(len(rows.ids))
        seconds.observe(time.perf_counter() - started)
        return answers

    def _failed(self, graph: GraphName, error: RuntimeRefused) -> RunFailed:
        self._failed_runs[graph].inc()
        if not self.has_failed:  # else it is said, and each of many requests would say it again
            try:
                self.predictor.score.run(self.encoder.rows([self.example]))
            except RuntimeRefused:
                self.has_failed = True
                self._metrics.ready.set(0)
            log.error(
                "run failed",
                extra={"facts": {**self.identity, "graph": graph, "for_good": self.has_failed}},
                exc_info=error,
            )
        return RunFailed("the model could not be run: send the request again, to another instance if there is one")


def _score_all(alive: "weakref.ref[Runtime]", requests: Sequence[Request]) -> Scored:
    loaded = alive()
    assert loaded is not None  # whoever waits for the rows holds it
    return loaded.score_all(requests)


def count_of(request: Request) -> int:
    """How many rows a request holds."""
    return len(request.ids) if isinstance(request, EncodedRows) else request.length


def load(
    path: Path,
    *,
    provider: Provider,
    threads: int,
    metrics: Metrics,
    trusted_keys: Sequence[str] = (),
    gpu: Gpu = FIRST_GPU,
    longest: int = LONGEST,
) -> Runtime:
    """Verify the bundle in `path`, open its graphs, replay its golden rows and warm them. A value of a request may then
    have `longest` letters.

    Raises BundleError with the reason where any of it fails.
    """
    predictor = bundle.open(path, provider=provider, threads=threads, trusted_keys=trusted_keys, gpu=gpu)
    for rows in (1, EXPLAINED_PER_RUN):
        predictor.explain(_golden(predictor, rows))  # a ranking is warm: its golden rows were compared
    if predictor.score.chosen != "cpu":
        metrics.on_gpu(gpu.number)
    return Runtime(predictor, metrics, longest)


def best_rows(seconds: Mapping[int, float]) -> int:
    """Of {rows: seconds of a run}, the fewest rows whose cost of one row is next to the least."""
    least = min(taken / rows for rows, taken in seconds.items())
    return min(rows for rows, taken in seconds.items() if taken / rows <= CLOSE * least)


def _finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(logits).all():  # a link would hide it: a clip of infinity looks like a prediction
        raise ArithmeticError("a graph gave a logit that is not finite")
    return logits


def _measured(predictor: Predictor, sizes: Sequence[int], clock: Callable[[], float]) -> dict[int, float]:
    """The seconds that a run of the score graph takes here, for each size a run could have."""
    seconds: dict[int, float] = {}
    for rows in sizes:
        run = partial(predictor.score.run, predictor.encoder.rows(_golden(predictor, rows)))
        seconds[rows] = min(timeit.repeat(run, timer=clock, number=1, repeat=REPEATS))
    return seconds


def _warm(predictor: Predictor, most: int) -> None:
    """Run every bucket of the score graph up to `most` rows, so that no request waits for buffers or engines."""
    for rows in buckets.sizes(most):
        encoded = predictor.encoder.rows(_golden(predictor, rows))
        for _ in range(WARM_RUNS):
            predictor.score.run(encoded)


def _golden(predictor: Predictor, rows: int) -> Sequence[Row]:
    golden = predictor.bundle.golden_rows
    return (golden * (rows // len(golden) + 1))[:rows]


def _parts(rows: EncodedRows, size: int) -> list[EncodedRows]:
    """The rows in runs of at most `size`."""
    if len(rows.ids) <= size:
        return [rows]
    starts = range(0, len(rows.ids), size)
    return [EncodedRows(rows.ids[at : at + size], rows.values[at : at + size]) for at in starts]


def _joined(logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The logits of all runs."""
    return logits[0] if len(logits) == 1 else np.concatenate(logits)


def _named(unknown: NDArray[np.bool_], names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """For each row of [B, F] the fields that are unknown in it."""
    if not unknown.any():
        return [()] * len(unknown)
    return [tuple(compress(names, row)) for row in unknown.tolist()]
