"""What the export's passes and the kinds of table do to a run of the score graph: µs of CPU, one thread.

    python -m benchmarks.passes

Ten categorical fields, 5,382 features, K = 64, random weights. The variants of a model take turns; of each the quickest
round counts. `plain` is the model without the pass: fm without folded squares, nfm with batch norm behind its pooling,
afm as most code writes it (indexing with tensors, pairs as [B, P, K] throughout).
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bundle import EncodedRows
from bundle.manifest import TableKind
from bundle.session import Session
from models import MODELS, Layout, Model
from models.afm import AFM
from training.compact import compact_tables, rounded
from training.graphs import write_graphs

LAYOUT = Layout(num_features=5382, widths=(1,) * 10, needs_values=False)
BATCHES, ROUNDS = (1, 16, 128, 256), 40
KINDS: tuple[TableKind, ...] = ("float16", "int8")


class PlainAFM(AFM):
    """The same numbers, written as a formula is read."""

    def _pooled(self, vectors: Tensor) -> Tensor:
        products = vectors[:, self.first_P] * vectors[:, self.second_P]
        of = self.attention
        attention = torch.softmax(torch.relu(products @ of.W + of.b) @ of.h, 1)
        return ((attention * products).sum(1) @ self.p).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(f"{'':<14}" + "".join(f"{f'B = {rows}':>10}" for rows in BATCHES))
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("fm", {}), ("nfm", {"batch_norm": True}), ("afm", {"attention_dim": 16})):
            for variant, taken in _measure(_sessions(name, options, Path(folder))).items():
                print(f"{name + ' ' + variant:<14}" + "".join(f"{taken[rows] * 1e6:>10.0f}" for rows in BATCHES))


def _sessions(name: str, options: Mapping[str, object], folder: Path) -> dict[str, Session]:
    torch.manual_seed(1)
    model = MODELS[name](LAYOUT, MODELS[name].Config(embedding_dim=64, **options)).eval()
    for table in model.tables.values():
        torch.nn.init.normal_(table, std=0.05)
    plain = PlainAFM(LAYOUT, model.config).eval() if isinstance(model, AFM) else _as_it_is(model)
    found = {"plain": _session(plain, folder / name), "exported": _session(model, folder / f"{name}-exported")}
    return found | {kind: _session(model, folder / f"{name}-{kind}", kind) for kind in KINDS}


def _as_it_is(model: Model) -> Model:
    other = rounded(model, {})
    other.inference = lambda _=None: other  # type: ignore[method-assign]
    return other


def _session(model: Model, folder: Path, kind: TableKind = "float32") -> Session:
    folder.mkdir()
    compact = compact_tables(model, kind)
    served = rounded(model, compact).eval() if compact else model
    return Session(folder, write_graphs(served, folder, compact=compact, sample=_ids(256))["score"])


def _measure(sessions: Mapping[str, Session]) -> dict[str, dict[int, float]]:
    taken = {variant: dict.fromkeys(BATCHES, float("inf")) for variant in sessions}
    for rows in BATCHES:
        ids = _ids(rows).numpy()
        encoded, runs = EncodedRows(ids, np.ones(ids.shape, np.float32)), max(1, 256 // rows)
        for _ in range(ROUNDS):
            for variant, session in sessions.items():
                started = time.thread_time()
                for _ in range(runs):
                    session.run(encoded)
                taken[variant][rows] = min(taken[variant][rows], (time.thread_time() - started) / runs)
    return taken


def _ids(rows: int) -> Tensor:
    return torch.randint(1, LAYOUT.num_features, (rows, LAYOUT.slots), generator=torch.Generator().manual_seed(2))


if __name__ == "__main__":
    main()
