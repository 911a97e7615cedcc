"""A ranking that computes its context once: two graphs, and the encoder of each side."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.device import FIRST_GPU, Gpu, Provider
from bundle.encoder import Encoder
from bundle.manifest import Graph, GraphName
from bundle.rows import EncodedRows
from bundle.session import Arrays, Session

CONTEXTS = 8  # of the golden rows, to compare split with flat: half of them the first ones, half the last


class Ranking:
    """What the fields of a context make of a request, once (`state`), and the logits of candidates from that."""

    def __init__(
        self,
        folder: Path,
        graphs: Mapping[GraphName, Graph],
        encoder: Encoder,
        *,
        provider: Provider = "cpu",
        threads: int = 1,
        gpu: Gpu = FIRST_GPU,
    ) -> None:
        load = partial(Session, folder, provider=provider, threads=threads, gpu=gpu, features=encoder.schema.size)
        self._context, self._candidates = load(graphs["rank_context"]), load(graphs["rank_candidates"])
        self.nodes = self._context.nodes + self._candidates.nodes
        sides = [[field.name for field in encoder.schema.side(candidate=side)] for side in (False, True)]
        self.of_context, self.of_candidate = (encoder.only(names) for names in sides)

    def state(self, context: EncodedRows) -> Arrays:
        """The state of one row, [1, slots], of `of_context`."""
        return self._context.run(context)

    def logits(self, state: Arrays, candidates: EncodedRows) -> NDArray[np.float32]:
        """Logits [B] of B rows of `of_candidate`; B is at least 1."""
        return self._candidates.run(candidates, state)["logit"]

    def disagreement(self, rows: EncodedRows, score: Session, explain: Session) -> float:
        """The largest distance to the score graph's logit, as a share of the row's 1 + Σ|terms|.

        `rows` are whole ones. CONTEXTS of their contexts are tried, each with the candidates of all of them.
        """
        context, candidate = (_columns(encoder) for encoder in (self.of_context, self.of_candidate))
        candidates, worst = _take(rows, candidate), 0.0
        count = len(rows.ids)
        for at in sorted({*range(count)[: CONTEXTS // 2], *range(count)[-CONTEXTS // 2 :]}):
            whole = EncodedRows(rows.ids.copy(), rows.values.copy())
            whole.ids[:, context], whole.values[:, context] = rows.ids[at, context], rows.values[at, context]
            one = EncodedRows(rows.ids[at : at + 1], rows.values[at : at + 1])
            found = self.logits(self.state(_take(one, context)), candidates)
            excess = np.abs(found - score.run(whole)["logit"]) / magnitude(explain.run(whole))
            worst = max(worst, float(np.nan_to_num(excess, nan=np.inf).max()))
        return worst


def magnitude(explained: Arrays) -> NDArray[np.float32]:
    """1 + Σ|terms| of every row, [B]: what distances between logits are compared with."""
    fields, pairs = (np.abs(explained[name]).sum(axis=1) for name in ("field", "pair"))
    return np.asarray(1 + fields + pairs + np.abs(explained["residual"]))


def _columns(encoder: Encoder) -> NDArray[np.int64]:
    """The slots of these fields in a whole row."""
    schema = encoder.schema
    return np.concatenate([np.r_[schema.slots[schema.names.index(name)]] for name in encoder.names])


def _take(rows: EncodedRows, columns: NDArray[np.int64]) -> EncodedRows:
    return EncodedRows(np.ascontiguousarray(rows.ids[:, columns]), np.ascontiguousarray(rows.values[:, columns]))
