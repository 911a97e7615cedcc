"""What the benchmark of the service starts, asks and promises."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bundle
from benchmarks.measure import bundles, load, requests
from benchmarks.measure.bars import Bar, Bars
from benchmarks.measure.environments import PEERS
from benchmarks.measure.requests import Request, Row
from benchmarks.measure.rounds import Case
from benchmarks.measure.servers import CORES, SCRIPTS
from benchmarks.measure.stage import Line, Stage

OURS, FASTAPI, NULL, TWO = "factorlens", "FastAPI", "null", "factorlens, two workers"
COLUMNS, BINARY, HANDLER = "factorlens, columns", "factorlens, binary ids", "MLServer, handler of our own"
PREDICT, RANK, RANK_COLUMNS = "factorlens :predict", "factorlens :rank", "factorlens :rank, columns"
STORED = "factorlens :rank, stored set"
SLOW = ("BentoML", "Ray Serve")  # by far: asked for one instance at a time only

ONE, HUNDRED, ALONE = "1 instance", "100 instances", "1 instance, one connection"
HALF, STORED_SET = "1 instance, open loop at half of the peak", "rank 1 × 10,000, fm"
MODELS: dict[str, dict[str, Any]] = {
    "nfm": {"layers": [64], "batch_norm": True},
    "afm": {"attention_dim": 16},
    "ifm": {"fen_layers": [256]},
    "fm": {},
}
RANKED = {"nfm": 12, "afm": 15, "ifm": 10}  # at least so many times FastAPI's :predict of as many instances
CANDIDATES, STORED_CANDIDATES = 1000, 10_000
SET = "/v1/models/fm/candidate-sets/benchmark"
FEW = 4  # connections for long requests
BARE_RUNS = 2000

RAW = (
    Line(OURS, OURS, partial(requests.instances, "/v1/models/nfm:predict")),
    Line(FASTAPI, FASTAPI, partial(requests.instances, "/predict")),
    Line("MLServer", "MLServer", partial(requests.tensors, "/v2/models/model/infer")),
    Line(HANDLER, "MLServer", partial(requests.instances, "/predict")),
    Line("LitServe", "LitServe", partial(requests.instances, "/predict")),
    Line("PyTriton", "PyTriton", partial(requests.tensors, "/v2/models/model/infer")),
    Line("BentoML", "BentoML", partial(requests.instances, "/predict")),
    Line("Ray Serve", "Ray Serve", partial(requests.instances, "/predict")),
    Line(NULL, NULL, partial(requests.instances, "/")),
)


def of_ids(path: Path) -> tuple[Line, ...]:
    """The lines of the tables of integers: the ids of the rows as each server takes tensors, in binary where it can."""
    encoder = bundle.open(path).encoder

    def ids(form: requests.OfIds, address: str, rows: Sequence[Row]) -> Request:
        return form(address, encoder.rows(rows).ids)

    nested, tensor, binary = (partial(ids, form) for form in (requests.ids, requests.ids_tensor, requests.ids_binary))
    return (
        Line(BINARY, OURS, partial(binary, "/v2/models/nfm/infer")),
        Line("factorlens, JSON", OURS, partial(tensor, "/v2/models/nfm/infer")),
        Line(FASTAPI, FASTAPI, partial(nested, "/ids")),
        Line("MLServer, JSON", "MLServer", partial(tensor, "/v2/models/model/infer")),
        Line("LitServe", "LitServe", partial(nested, "/predict")),
        Line("PyTriton, binary", "PyTriton", partial(binary, "/v2/models/ids/infer")),
        Line("BentoML", "BentoML", partial(nested, "/ids")),
        Line("Ray Serve", "Ray Serve", partial(nested, "/predict")),
    )


def of_rank(key: str) -> tuple[Line, ...]:
    """A ranking of candidates against predictions of as many whole instances."""
    return (
        Line(RANK_COLUMNS, OURS, partial(requests.rank, f"/v1/models/{key}:rank", as_columns=True)),
        Line(RANK, OURS, partial(requests.rank, f"/v1/models/{key}:rank", as_columns=False)),
        Line(PREDICT, OURS, partial(requests.instances, f"/v1/models/{key}:predict")),
        Line(FASTAPI, _fastapi(key), partial(requests.instances, "/predict")),
    )


def quick(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.server not in SLOW]


def integers(table: str) -> str:
    return f"{table} as integers"


def ranking(key: str) -> str:
    return f"rank 1 × {CANDIDATES:,}, {key}"


def _fastapi(key: str) -> str:
    return FASTAPI if key == "nfm" else f"{FASTAPI}, {key}"


def write_bundles(root: Path) -> dict[str, Path]:
    return {key: bundles.write(root, key, key=key, **options) for key, options in MODELS.items()}


def start(stage: Stage, paths: Mapping[str, Path], environments: Path | None) -> None:
    """Start every server; peers only where the folder of their environments is given."""
    rows, first = requests.draw(1), requests.instances("/predict", requests.draw(1))
    ours = ["-m", "service", "--bundles", str(paths["nfm"].parents[1]), "--port", "{port}", "--provider", "cpu"]
    predict = RAW[0].form(rows)
    stage.start(OURS, ours, predict, variables={"FACTORLENS_ADMIN": "true"})
    if OURS not in stage.up:
        raise SystemExit(f"the service {stage.absent[OURS]}")
    stage.start(TWO, [*ours, "--workers", "2"], predict, cores=CORES)
    stage.start(NULL, [str(SCRIPTS / "null.py"), "{port}"], first)
    for key in RANKED:
        stage.start(_fastapi(key), [str(SCRIPTS / "idiomatic.py"), "{port}", str(paths[key])], first)
    for peer in PEERS if environments else ():
        assert environments
        form = next(line.form for line in reversed(RAW) if line.server == peer.name)
        stage.start_peer(peer, paths["nfm"], form(rows), environments)


def cases(stage: Stage, paths: Mapping[str, Path]) -> list[Case]:
    """Everything that is measured in a closed loop."""
    one, hundred, many = (requests.draw(count) for count in (1, 100, CANDIDATES))
    raw, columns = RAW[0].form, partial(requests.columns, "/v1/models/nfm:predict")
    found = [
        *stage.cases(ONE, RAW, one),
        *stage.cases(ONE, [Line(TWO, TWO, raw)], one),
        *stage.cases(HUNDRED, [RAW[0], Line(COLUMNS, OURS, columns), *quick(RAW[1:])], hundred),
        *stage.cases(ALONE, [RAW[0]], one, connections=1),
    ]
    lines = of_ids(paths["nfm"])
    found += stage.cases(integers(ONE), lines, one)
    found += stage.cases(integers(HUNDRED), quick(lines), hundred)
    for key in RANKED:
        found += stage.cases(ranking(key), of_rank(key), requests.with_one_context(many), connections=FEW)
    status = load.ask(stage.up[OURS].port, requests.candidate_set(SET, requests.draw(STORED_CANDIDATES)))
    if status not in ("200", "201", "204"):
        stage.absent[STORED] = f"not there: the service answers {status}"
        return found
    stored = partial(requests.rank_set, "/v1/models/fm:rank", SET.rpartition("/")[2])
    return found + stage.cases(STORED_SET, [Line(STORED, OURS, stored)], one, connections=FEW)


def bare_run_us(path: Path) -> float:
    """CPU microseconds of the score graph alone, for one encoded row."""
    model = bundle.open(path)
    encoded = model.encoder.rows(requests.draw(1))
    started = time.process_time()
    for _ in range(BARE_RUNS):
        model.score.run(encoded)
    return (time.process_time() - started) / BARE_RUNS * 1e6


def promises(bars: Bars, bare_us: float) -> list[Bar]:
    """Every bar."""
    mlserver = bars.quickest((ONE, "MLServer"), (ONE, HANDLER))[1]
    limits = {FASTAPI: 4, mlserver: 12, "LitServe": 20, "PyTriton": 4}
    ours, hundred, binary = (ONE, OURS), (HUNDRED, OURS), (integers(HUNDRED), BINARY)
    idle = "over a handler that does nothing"
    return [
        *(bars.times(f"{ONE}, over {name}", limit, of=ours, over=(ONE, name)) for name, limit in limits.items()),
        bars.cost(f"{ONE}, CPU {idle}", 1.5, of=ours, over=(ONE, NULL)),
        bars.times(f"{HUNDRED}, over {FASTAPI}", 2.2, of=hundred, over=(HUNDRED, FASTAPI)),
        bars.times(f"{HUNDRED}, over PyTriton", 1.8, of=hundred, over=(HUNDRED, "PyTriton")),
        bars.times(f"{HUNDRED}, columns over rows", 1.0, of=(HUNDRED, COLUMNS), over=hundred),
        bars.times(f"{HUNDRED}, binary ids over rows", 1.5, of=binary, over=hundred),
        bars.spread(f"half of the peak, p99/p50 {idle}", 1.5, of=(HALF, OURS), over=(HALF, NULL)),
        bars.above("one connection, CPU over the bare run of the graph", 150, of=(ALONE, OURS), floor_us=bare_us),
        *(bar for key in RANKED for bar in _of_ranking(bars, key)),
        bars.cost(f"{STORED_SET} of a stored set, CPU {idle}", 40, of=(STORED_SET, STORED), over=(ONE, NULL)),
        bars.scaling("two workers over one, by the processors left to each", 1.7, of=(ONE, TWO), over=ours),
    ]


def _of_ranking(bars: Bars, key: str) -> Iterator[Bar]:
    """The bars are on columns; what rows come to stands beside them."""
    table = ranking(key)
    for other, whose, limit in ((FASTAPI, "FastAPI's", RANKED[key]), (PREDICT, "our", 5)):
        columns, rows = (
            bars.times(f"{table}, columns over {whose} :predict", limit, of=(table, form), over=(table, other))
            for form in (RANK_COLUMNS, RANK)
        )
        yield replace(columns, text=f"{columns.text} (rows: {rows.measured})")
