"""A synthetic app-store log with planted effects, and the ground truth recorded beside it.

Nothing in it is real. Every row shows an app to a user; `installed` is drawn from

    logit = base + main effects + user taste + app quality + Σ over planted pairs of strength · sign_a · sign_b

A planted pair splits the values of two fields into a positive and a negative half; where the halves agree the logit
rises by `strength`, where they differ it falls. Both halves are balanced, so a pair leaves no trace in either field
alone: only a model of interactions can find it.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.progress import bar

ROWS, SEED = 60_000, 7
LOG, TRUTH = "log.csv", "truth.json"
LABEL = "installed"

COUNTRIES = ("BR", "DE", "ES", "FR", "IN", "JP", "KR", "US")
DEVICES = ("phone", "foldable", "tablet", "laptop")
HOURS = ("morning", "noon", "evening", "night")
NETWORKS = ("wifi", "fibre", "cellular", "satellite")
GENRES = ("puzzle", "racing", "music", "news", "chess", "video", "photo", "travel")
USERS, APPS = 4_000, 300
YOUNG = 35


@dataclass(frozen=True, kw_only=True)
class PlantedPair:
    """`rises`: the values of each field whose meeting raises the logit by `strength` (as does the meeting of the
    values not named); any other meeting lowers it by as much. Ages are given as a range, [low, high)."""

    fields: tuple[str, str]
    strength: float
    rises: dict[str, list[Any]]


PLANTED = (
    PlantedPair(
        fields=("country", "genres"),
        strength=1.1,
        rises={"country": ["BR", "ES", "JP", "US"], "genres": ["puzzle", "racing", "music", "news"]},
    ),
    PlantedPair(
        fields=("hour", "device"),
        strength=1.0,
        rises={"hour": ["evening", "night"], "device": ["tablet", "laptop"]},
    ),
    PlantedPair(
        fields=("network", "genres"),
        strength=1.1,
        rises={"network": ["wifi", "fibre"], "genres": ["music", "news", "video", "photo"]},
    ),
    PlantedPair(
        fields=("age", "network"),
        strength=1.0,
        rises={"age": [13, YOUNG], "network": ["wifi", "cellular"]},
    ),
)
MAIN_EFFECTS: dict[str, dict[str, float]] = {
    "device": {"phone": 0.5, "laptop": -0.4},
    "hour": {"evening": 0.4, "morning": -0.3},
    "genres": {"puzzle": 0.4, "travel": -0.4},
}
BASE_LOGIT = -0.6


def write(folder: Path, *, rows: int = ROWS, seed: int = SEED) -> tuple[Path, Path]:
    """Write the log (CSV) and its ground truth (JSON) into `folder`; the same bytes for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    columns = _columns(random, rows)
    logits = _logits(columns, random, rows)
    labels = (random.random(rows) < 1 / (1 + np.exp(-logits))).astype(int)
    log, truth = folder / LOG, folder / TRUTH
    staged = log.with_suffix(".part")
    with staged.open("w", newline="") as file, bar(total=rows, what="writing the demo log") as progress:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([LABEL, *columns])
        for at in range(rows):
            writer.writerow([labels[at], *(_cell(column[at]) for column in columns.values())])
            progress.update(1)
    staged.replace(log)
    planted = {"label": LABEL, "pairs": [asdict(pair) for pair in PLANTED], "main_effects": MAIN_EFFECTS}
    truth.write_text(json.dumps(planted, indent=1) + "\n")
    return log, truth


def planted_sign(pair: PlantedPair, row: dict[str, Any]) -> float:
    """+1 where this raw row meets the pair in a way that raises the logit, -1 where it lowers it.

    A multi-valued field counts by the mean over its values, so the answer lies between the two. A missing field
    gives 0.
    """
    sign = 1.0
    for field in pair.fields:
        sign *= _half(row[field], pair.rises[field])
    return sign


def _half(value: Any, rises: list[Any]) -> float:
    if value in (None, "", []):
        return 0.0
    if isinstance(value, list):
        return float(np.mean([_half(one, rises) for one in value]))
    inside = rises[0] <= value < rises[1] if isinstance(value, int) else value in rises
    return 1.0 if inside else -1.0


def _columns(random: np.random.Generator, rows: int) -> dict[str, list[Any]]:
    pick: Callable[[tuple[str, ...]], list[Any]] = lambda values: random.choice(values, rows).tolist()  # noqa: E731
    ages = np.clip(random.gamma(6, 6, rows), 13, 80).astype(int).tolist()
    missing = random.random(rows) < 0.02
    return {
        "user": [f"u{n:04d}" for n in _popular(random, USERS, rows)],
        "country": pick(COUNTRIES),
        "age": [None if gone else age for age, gone in zip(ages, missing, strict=True)],
        "device": pick(DEVICES),
        "network": pick(NETWORKS),
        "hour": pick(HOURS),
        "app": [f"a{n:03d}" for n in _popular(random, APPS, rows)],
        "genres": [random.choice(GENRES, size, replace=False).tolist() for size in random.integers(1, 3, rows)],
    }


def _popular(random: np.random.Generator, count: int, rows: int) -> NDArray[np.int64]:
    """Few values are frequent and most are rare."""
    weights = 1 / np.arange(1, count + 1) ** 0.6
    return random.choice(count, rows, p=weights / weights.sum())


def _logits(columns: dict[str, list[Any]], random: np.random.Generator, rows: int) -> NDArray[np.float64]:
    taste = dict(enumerate(random.normal(0, 0.3, USERS)))
    quality = dict(enumerate(random.normal(0, 0.4, APPS)))
    logits = np.full(rows, BASE_LOGIT)
    logits += [taste[int(user[1:])] for user in columns["user"]]
    logits += [quality[int(app[1:])] for app in columns["app"]]
    for field, effects in MAIN_EFFECTS.items():
        logits += [_effect(value, effects) for value in columns[field]]
    for pair in PLANTED:
        first, second = (columns[field] for field in pair.fields)
        met = [
            _half(a, pair.rises[pair.fields[0]]) * _half(b, pair.rises[pair.fields[1]])
            for a, b in zip(first, second, strict=True)
        ]
        logits += pair.strength * np.array(met)
    return logits


def _effect(value: Any, effects: dict[str, float]) -> float:
    values = value if isinstance(value, list) else [value]
    return float(np.mean([effects.get(one, 0.0) for one in values]))


def _cell(value: Any) -> Any:
    return "|".join(value) if isinstance(value, list) else value
