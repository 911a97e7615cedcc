"""A bundle that answers: encoder, score graph and explain graph together, in process, without the service."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle import explanation
from bundle.device import FIRST_GPU, Gpu, Provider
from bundle.errors import BundleInvalid, InputError, RuntimeRefused
from bundle.explanation import RowExplanation
from bundle.ranking import Ranking, magnitude
from bundle.rows import EncodedRows, Row
from bundle.session import Session
from bundle.signature import public_keys
from bundle.store import Bundle, open_verified

REPLAY_TOLERANCE = 1e-6  # the same bundle later, in any batch, on the same provider
FOREIGN_TOLERANCE = 1e-5  # another provider than the CPU that gave the golden answers
TF32_TOLERANCE = 2e-3  # products of 10 bits, where they are allowed


class Predictor:
    """An opened bundle. Golden rows are replayed before it answers anything; BundleInvalid if they differ."""

    def __init__(self, bundle: Bundle, *, provider: Provider = "cpu", threads: int = 1, gpu: Gpu = FIRST_GPU) -> None:
        self.bundle, self.manifest, self.schema, self.encoder = bundle, bundle.manifest, bundle.schema, bundle.encoder
        graphs, load = self.manifest.graphs, partial(Session, bundle.path, provider=provider, threads=threads, gpu=gpu)
        self.score = load(graphs["score"], features=self.schema.size)
        self.explanations = load(graphs["explain"], features=self.schema.size)
        self.nodes, self.ranking = self.score.nodes + self.explanations.nodes, None
        if "rank_context" in graphs:
            self.ranking = Ranking(bundle.path, graphs, self.encoder, provider=provider, threads=threads, gpu=gpu)
            self.nodes += self.ranking.nodes
        self._tolerance = FOREIGN_TOLERANCE if self.score.chosen != "cpu" else REPLAY_TOLERANCE
        if self.score.chosen != "cpu" and gpu.tf32:
            self._tolerance = TF32_TOLERANCE
        self.replay()

    def __repr__(self) -> str:
        manifest = self.manifest
        return f"<{manifest.name} version {manifest.version}: {manifest.key}, {manifest.task}, {self.score.chosen}>"

    def predict(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        """Predictions [B] for B raw rows: probabilities for binary, values for regression, logits for ranking."""
        return self.manifest.predictions(self.logits(self.encoder.rows(rows)))

    def logits(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The score graph's logits [B]."""
        if not len(encoded.ids):  # onnxruntime cannot multiply matrices of no rows
            return np.empty(0, np.float32)
        return self.score.run(encoded)["logit"]

    def explain(self, rows: Sequence[Row], *, top_k: int = 10) -> list[RowExplanation]:
        """One explanation a row, with its `top_k` strongest pairs. Raises InputError for a negative `top_k`."""
        if top_k < 0:
            raise InputError(expected="top_k of 0 or more", received=str(top_k))
        return self.explain_encoded(rows, self.encoder.rows(rows), top_k=top_k)

    def explain_encoded(self, rows: Sequence[Row], encoded: EncodedRows, *, top_k: int) -> list[RowExplanation]:
        """The same for rows that are encoded already."""
        if not rows:
            return []
        logits, arrays = self.logits(encoded), self.explanations.run(encoded)
        return explanation.explain(self.bundle, rows, encoded, logits, arrays, top_k=top_k)

    def replay(self) -> None:
        """Raise BundleInvalid where the golden rows do not get the stored answers, because of RuntimeRefused where
        onnxruntime fails."""
        encoded, golden = self.encoder.rows(self.bundle.golden_rows), self.bundle.golden_answers
        try:
            answers = {"logit": self.logits(encoded), **self.explanations.run(encoded)}
        except RuntimeRefused as error:
            raise BundleInvalid(self.bundle.path, str(error)) from error
        scale = magnitude(answers)
        limit = self._tolerance
        for name, expected in golden.items():
            found = answers[name]
            if found.shape != expected.shape or not np.all(np.isfinite(found)):
                raise BundleInvalid(self.bundle.path, f"the golden rows' {name} is not finite or has another shape")
            allowed = limit * scale.reshape(-1, *[1] * (expected.ndim - 1))
            if not np.all(np.abs(found - expected) <= allowed):  # so written, NaN is refused
                raise BundleInvalid(self.bundle.path, f"replaying the golden rows gave another {name}")
        self._compare_ranking(encoded, limit)

    def _compare_ranking(self, golden: EncodedRows, limit: float) -> None:
        try:
            error = self.ranking.disagreement(golden, self.score, self.explanations) if self.ranking else 0.0
        except RuntimeRefused as refused:
            raise BundleInvalid(self.bundle.path, str(refused)) from refused
        if not error <= limit:
            reason = f"ranking the golden rows gave other logits than scoring them, by {error:.1e} of a row's terms"
            raise BundleInvalid(self.bundle.path, reason)


def open(
    path: Path | str,
    *,
    provider: Provider = "cpu",
    threads: int = 1,
    trusted_keys: Sequence[str] = (),
    gpu: Gpu = FIRST_GPU,
) -> Predictor:
    """Verify the bundle in folder `path`, load its graphs and replay its golden rows.

    Where there are `trusted_keys`, public Ed25519 keys in hexadecimal or files of them, one has to have signed it.

    Raises BundleInvalid where anything differs from its manifest, RuntimeRefused where onnxruntime cannot run.
    """
    verified = open_verified(Path(path), trusted_keys=public_keys(trusted_keys))
    return Predictor(verified, provider=provider, threads=threads, gpu=gpu)
