"""CPU time of a ranking: the context once (split) against whole rows (flat), and where the time goes.

    python -m benchmarks.ranking                      # fm, nfm, afm, ifm with 1,000 candidates
    python -m benchmarks.ranking --models fm --candidates 10000

Ten categorical fields of a made-up log, one of them the item's, K = 64, one thread, all in this process and by turns;
medians of CPU microseconds. `graphs` is encoded rows to logits. `whole` is the bytes of a body to those of its answer,
as the endpoint makes them, without HTTP: of :predict with N instances of ten fields, of :rank on the flat path, and on
the split path with its candidates as rows, as columns and as a set. `read` and `encode` are parts of these two.
"""

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from service import runtime, scorer
from service.candidates import CandidateSets
from service.catalog import Catalog, Model
from service.metrics import Metrics
from service.ranker import rank
from service.runtime import Runtime
from service.settings import Settings
from training.pipeline import Options, run
from training.recipe import check

FIELDS, VALUES, ROWS = 10, 538, 2000
OPTIONS: dict[str, dict[str, object]] = {
    "fm": {},
    "nfm": {},
    "afm": {"attention_dim": 16},
    "ifm": {"fen_layers": [256]},
}
COLUMNS = ("graphs flat", "split", "whole predict", "flat", "rows", "columns", "set", "read rows", "columns", "encode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=15, help="times that each is measured (default: 15)")
    options = parser.parse_args()
    print(f"{options.candidates} candidates, CPU us")
    print(" ".join(f"{name:>13}" for name in ("", *COLUMNS, "predict/rows", "predict/columns")))
    with tempfile.TemporaryDirectory() as folder:
        for key in options.models:
            taken = _measure(_bundle(Path(folder), key), options.candidates, options.repeat)
            _, _, whole, _, rows, columns, *_ = taken
            cells = [f"{us:13.0f}" for us in taken] + [f"{whole / rows:13.1f}", f"{whole / columns:13.1f}"]
            print(f"{key:>13}", *cells, flush=True)


def _bundle(folder: Path, key: str) -> Path:
    """A model that was trained for one epoch: what it says does not matter, what it costs does."""
    names = [f"f{position}" for position in range(FIELDS)]
    draw = random.Random(0)
    log = {name: [_value(row if row < VALUES else draw.randrange(VALUES)) for row in range(ROWS)] for name in names}
    pq.write_table(pa.table({"clicked": [row % 2 for row in range(ROWS)], **log}), folder / "log.parquet")
    document = {
        "name": key,
        "task": "binary",
        "data": {"train": str(folder / "log.parquet"), "label": "clicked"},
        "fields": {name: {"kind": "categorical", "source": "item" if name == names[-1] else "user"} for name in names},
        "model": {"key": key, "embedding_dim": 64, **OPTIONS[key]},
        "fit": {"epochs": 1, "batch_size": 256, "optimizer": "adam"},
    }
    return run(
        check(document, origin="of the benchmark"),
        Options(artifacts=folder / "artifacts", checkpoints=folder / "checkpoints", device="cpu"),
    )


def _value(number: int) -> str:
    return f"value-{number:04}"


def _measure(path: Path, count: int, repeat: int) -> list[float]:
    split, flat = (runtime.load(path, provider="cpu", threads=1, metrics=Metrics()) for _ in range(2))
    flat.ranking = None
    ranking, settings = split.ranking, Settings(max_candidates=count, max_rows=count)
    catalog = Catalog(settings, Metrics())
    name = split.manifest.name
    catalog.models[name] = Model(name, {"1": split})
    sets = CandidateSets(catalog, settings, Metrics())
    assert ranking is not None
    draw = random.Random(1)
    context = {f"f{position}": _value(draw.randrange(VALUES)) for position in range(FIELDS - 1)}
    items = [_value(draw.randrange(VALUES)) for _ in range(count)]
    item = f"f{FIELDS - 1}"
    candidates = [{item: value} for value in items]
    of_rows = json.dumps({"context": context, "candidates": candidates}).encode()
    of_columns = json.dumps({"context": context, "columns": {item: items}}).encode()
    whole = json.dumps({"instances": [context | candidate for candidate in candidates]}).encode()
    sets.put(sets.command(name, "all", json.dumps({"columns": {item: items}}).encode()))
    of_set = json.dumps({"context": context, "candidate_set": "all"}).encode()
    encoded = split.encoder.rows([context | candidate for candidate in candidates])
    gc.collect()
    gc.freeze()  # as the service does
    one = ranking.of_context.rows([context])
    sides = one, ranking.of_candidate.rows(candidates)
    return _medians(
        [
            lambda: flat.logits(encoded),
            lambda: split.rank(*sides),
            lambda: _predict(flat, whole, settings),
            lambda: rank(flat, of_rows, settings, sets=sets),
            lambda: rank(split, of_rows, settings, sets=sets),
            lambda: rank(split, of_columns, settings, sets=sets),
            lambda: rank(split, of_set, settings, sets=sets),
            lambda: split.decoder.rank(of_rows, limit=count),
            lambda: split.decoder.rank(of_columns, limit=count),
            lambda: ranking.of_candidate.encode([items], count),
        ],
        repeat,
    )


def _predict(loaded: Runtime, raw: bytes, settings: Settings) -> bytes:
    table, logits = scorer.read(loaded, raw, settings)
    return scorer.answer(loaded, loaded.score_all([table]), logits).content


def _medians(works: list[Callable[[], object]], repeat: int) -> list[float]:
    """Median CPU microseconds of each, taking turns; the first turn warms up."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(repeat + 1):
        for times, work in zip(taken, works, strict=True):
            started = time.process_time()
            work()
            times.append((time.process_time() - started) * 1e6)
    return [median(times[1:]) for times in taken]


if __name__ == "__main__":
    main()
