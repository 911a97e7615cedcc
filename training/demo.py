"""The demo: a synthetic log, four recipes, four bundles, and curl lines to try."""

import json
import socket
from pathlib import Path
from typing import Any

import bundle
from bundle import Predictor, store
from training import demo_log
from training.dataset import digest
from training.errors import TrainingError
from training.pipeline import Options, run
from training.progress import say
from training.recipe import load

FIELDS = """\
name = "demo-{key}"
task = "binary"

[data]
train = "log.csv"
label = "installed"
split = { by = "fraction", fraction = 0.1 }

[fields]
user    = { kind = "categorical", source = "user", min_count = 3 }
country = { kind = "categorical", source = "user" }
age     = { kind = "numeric", transform = "quantile", buckets = 8, source = "user" }
device  = { kind = "categorical" }
network = { kind = "categorical" }
hour    = { kind = "categorical" }
app     = { kind = "categorical", source = "item" }
genres  = { kind = "multi", max_len = 4, separator = "|", source = "item" }
"""

MODELS = {
    "fm": """
[model]
key = "fm"
embedding_dim = 16
dropout = 0.2
""",
    "nfm": """
[model]
key = "nfm"
embedding_dim = 16
layers = [32]
dropout = 0.2
layer_dropout = 0.2
""",
    "afm": """
[model]
key = "afm"
embedding_dim = 16
attention_dim = 16
dropout = 0.1
""",
    "ifm": """
[model]
key = "ifm"
embedding_dim = 16
fen_layers = [32]
""",
}

FIT = """
[fit]
optimizer = "adam"
learning_rate = 0.002
batch_size = 512
epochs = 12
patience = 2
seed = 2017
l2 = { embedding = 1e-3 }
"""


def write_recipes(folder: Path) -> list[Path]:
    """One recipe a model beside the log, to read, change and run again; one that is there already is kept."""
    paths = []
    for key, model in MODELS.items():
        path = folder / f"{key}.toml"
        if not path.exists():
            path.write_text(FIELDS.replace("{key}", key) + model + FIT)
        paths.append(path)
    return paths


def demo(folder: Path, options: Options, *, port: int, again: bool) -> None:
    """Write log, ground truth and recipes into `folder`, train what is not trained yet, and say what to try."""
    check_port(port)
    log, truth = demo_log.write(folder)
    say(f"wrote {log} ({demo_log.ROWS:,} rows) and the effects planted in it, {truth}")
    for path in write_recipes(folder):
        recipe = load(path)
        trained = None if again else _trained_before(options.artifacts, recipe.name, log)
        if trained:
            say(f"{trained} is trained on this log already (train it anew with --again)")
        else:
            say(f"wrote {run(recipe, options)}")
    newest = store.versions(options.artifacts, "demo-afm")[-1]
    print(curl_lines(bundle.open(options.artifacts / "demo-afm" / str(newest)), port=port))


def check_port(port: int) -> None:
    """TrainingError where the port is taken: said before minutes of training, not after."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise TrainingError(
                f"port {port} on 127.0.0.1 is taken: end what listens there, or choose another with PORT={port + 1}"
            ) from None
        except OverflowError:
            raise TrainingError(f"--port: expected a number up to 65535, got {port}") from None


def curl_lines(model: Predictor, *, port: int) -> str:
    """Requests made of the bundle's own example row: predict, explain and rank."""
    rows, items = [_readable(row) for row in model.bundle.golden_rows], model.manifest.split.candidate
    known = [not any(row) for row in model.encoder.unknown(model.encoder.rows(rows).ids).tolist()]
    whole = [row for row, all_known in zip(rows, known, strict=True) if all_known and row.keys() >= {*items}]
    context = {name: value for name, value in rows[0].items() if name not in items}
    bodies = {
        "predict": {"instances": [rows[0]]},
        "explain": {"instances": [rows[0]], "top_k": 3},
        "rank": {"context": context, "candidates": [{name: row[name] for name in items} for row in whole[:4]]},
    }
    url = f"http://127.0.0.1:{port}/v1/models/{model.manifest.name}"
    lines = [f"curl -s {url}:{verb} -d '{json.dumps(body)}'" for verb, body in bodies.items()]
    return "\n".join(
        [
            "",
            f"python -m service --port {port} answers at http://127.0.0.1:{port} (documentation: /docs). Try:",
            "",
            *lines,
            "",
        ]
    )


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """A drawn row as a person would write it: no value of a list twice, whole numbers."""
    return {name: _written(value) for name, value in row.items()}


def _written(value: Any) -> Any:
    if isinstance(value, list):
        return [*dict.fromkeys(value)]
    return round(value) if isinstance(value, float) else value


def _trained_before(artifacts: Path, name: str, log: Path) -> Path | None:
    found = store.versions(artifacts, name)
    if not found:
        return None
    newest = artifacts / name / str(found[-1])
    data = store.open_verified(newest).manifest.provenance.data_sha256
    return newest if data == digest(log, log) else None
