"""Scores that are served, by bin, and how far they have moved from those of the validation rows."""

import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from bundle.drift import ScoreBins
from service import drift
from service.drift import Scores

BINS = ScoreBins(edges=(-1.0, 1.0), shares=(0.25, 0.5, 0.25))
ROWS = [{"user": f"u{n % 20}", "app": f"a{n % 12}", "age": 20 + n % 50} for n in range(240)]


def test_every_score_is_counted_once_whoever_adds_it() -> None:
    scores = Scores(BINS)

    def add() -> None:
        for _ in range(500):
            scores.add(np.array([-2.0, 0.0, 0.5], np.float32))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores.counts.tolist() == [2000, 4000, 0]


def test_the_index_is_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(drift.time, "monotonic", lambda: now[0])
    scores = Scores(BINS)
    scores.add(np.repeat([-2.0, 0.0, 2.0], [250, 499, 250]))
    assert scores.stability is None  # 999 rows are too few
    scores.add(np.array([0.0]))
    assert scores.stability == pytest.approx(0)
    scores.add(np.zeros(drift.WINDOW_ROWS))
    now[0] = drift.WINDOW_SECONDS  # the window is full with the next run
    scores.add(np.zeros(1))
    moved = scores.stability
    assert moved is not None
    assert moved > 0.25
    for _ in range(2):  # and two windows later it is forgotten
        now[0] += drift.WINDOW_SECONDS
        scores.add(np.repeat([-2.0, 0.0, 2.0], [1250, 2500, 1250]))
        after = scores.stability
    assert after == pytest.approx(0)
    assert scores.counts.sum() == 1000 + drift.WINDOW_ROWS + 1 + 2 * 5000


def bins_of(client: httpx.Client, metric: str, version: int) -> list[float]:
    text = client.get("/metrics").text
    pattern = rf'^{metric}{{bin="(\d+)",model="tiny-fm",version="{version}"}} (\S+)$'
    found = {int(at): float(value) for at, value in re.findall(pattern, text, re.MULTILINE)}
    return [found[at] for at in range(len(found))]


@pytest.fixture
def binned(publish: Callable[[int], Path], reseal: Callable[[Path, str, bytes], None]) -> ScoreBins:
    """Version 1 of tiny-fm says how its scores were spread; version 2 does not."""
    publish(2)
    path = publish(1)
    report = json.loads((path / "report.json").read_text())
    assert "scores" not in report  # 40 rows are too few
    reseal(path, "report.json", json.dumps(report | {"scores": BINS.model_dump()}).encode())
    return BINS


def test_what_is_served_is_told_by_bin(binned: ScoreBins, serve: Callable[..., httpx.Client]) -> None:
    client = serve()
    assert bins_of(client, "factorlens_score_bin_total", 1) == [0, 0, 0]
    logits: list[float] = []
    for end in (1, 3, 240):  # alone, few together, and more than one run
        body = {"instances": ROWS[:end], "logits": True}
        logits += client.post("/v1/models/tiny-fm/versions/1:predict", json=body).json()["logits"]
    ids = {"inputs": [{"name": "user", "datatype": "BYTES", "shape": [1], "data": ["u1"]}]}
    answered = client.post("/v2/models/tiny-fm/versions/1/infer", json=ids).json()["outputs"]
    logits += next(output["data"] for output in answered if output["name"] == "logit")
    client.post("/v1/models/tiny-fm/versions/1:rank", json={"context": {}, "candidates": [{"app": "a1"}] * 9})
    counted = bins_of(client, "factorlens_score_bin_total", 1)
    assert counted == binned.counts(logits).tolist()
    assert sum(counted) == 245  # a ranking's candidates are other rows than those of training
    assert bins_of(client, "factorlens_score_bin_expected", 1) == list(binned.shares)
    assert "factorlens_score_psi{" not in client.get("/metrics").text
    for _ in range(4):
        logits += client.post("/v1/models/tiny-fm/versions/1:predict", json={"instances": ROWS, "logits": True}).json()[
            "logits"
        ]
    (told,) = re.findall(
        r'factorlens_score_psi{model="tiny-fm",version="(1)"} (\S+)', client.get("/metrics").text
    )  # version 2 tells nothing
    served = binned.counts(logits) / len(logits)
    by_hand = sum((q - p) * math.log(q / p) for q, p in zip(served, binned.shares, strict=True) if q > 1e-4)
    by_hand += sum((1e-4 - p) * math.log(1e-4 / p) for q, p in zip(served, binned.shares, strict=True) if q <= 1e-4)
    assert float(told[1]) == pytest.approx(by_hand)


def test_a_bundle_without_a_spread_tells_nothing(binned: ScoreBins, serve: Callable[..., httpx.Client]) -> None:
    client = serve()
    client.post("/v1/models/tiny-fm:predict", json={"instances": ROWS})
    assert bins_of(client, "factorlens_score_bin_total", 2) == []
    assert bins_of(client, "factorlens_score_bin_expected", 2) == []


def test_a_spread_that_makes_no_sense_is_refused(
    publish: Callable[[int], Path], reseal: Callable[[Path, str, bytes], None], serve: Callable[..., httpx.Client]
) -> None:
    path = publish(1)
    reseal(path, "report.json", json.dumps({"scores": {"edges": [0.0], "shares": [1.0]}}).encode())
    (rejected,) = serve().get("/v1/models/tiny-fm").json()["rejected"]
    assert rejected["reason"].startswith("report.json")


def test_of_an_unloaded_version_stays_what_it_counted(binned: ScoreBins, serve: Callable[..., httpx.Client]) -> None:
    client = serve(admin=True)
    counted = 'factorlens_stage_seconds_count{model="tiny-fm",stage="read",version="1"}'
    client.post("/v1/models/tiny-fm/versions/1:predict", json={"instances": ROWS[:3]})
    before = bins_of(client, "factorlens_score_bin_total", 1)
    assert sum(before) == 3
    assert client.post("/v2/repository/models/tiny-fm/unload").status_code == 200
    text = client.get("/metrics").text
    assert bins_of(client, "factorlens_score_bin_total", 1) == before
    assert f"{counted} 1.0" in text
    assert "factorlens_score_bin_expected{" not in text
    assert 'version="2"} ' not in "".join(line for line in text.splitlines() if "stage_seconds" in line)
    assert client.post("/v2/repository/models/tiny-fm/load").status_code == 200
    client.post("/v1/models/tiny-fm/versions/1:predict", json={"instances": ROWS[:3]})
    assert f"{counted} 2.0" in client.get("/metrics").text
    assert sum(bins_of(client, "factorlens_score_bin_total", 1)) == 6
