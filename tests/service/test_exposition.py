"""Metrics of several processes as those of one."""

from dataclasses import dataclass, field

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bundle.drift import ScoreBins
from service import exposition
from service.drift import Scores
from service.exposition import Family
from service.metrics import Metrics
from service.statistics import Statistics


def process(answered: int, seconds: float, *, ready: int, version: str) -> list[Family]:
    registry = CollectorRegistry()
    requests = Counter("requests", "answered", ("status",), registry=registry)
    requests.labels("200").inc(answered)
    requests.labels(version).inc()
    Histogram("seconds", "taken", buckets=(1, 2), registry=registry).observe(seconds)
    Gauge("factorlens_ready", "ready", registry=registry).set(ready)
    Gauge("factorlens_workers", "workers", registry=registry).set(1)
    Gauge("info", "loaded", ("version",), registry=registry).labels(version).set(1)
    return exposition.families(registry)


def lines(found: list[Family]) -> list[str]:
    return [line for line in exposition.text(found).decode().splitlines() if not line.startswith("#")]


def test_one_is_written_as_prometheus_client_does() -> None:
    registry = CollectorRegistry()
    Counter("requests", 'odd "help"\n', ("path",), registry=registry).labels('a\\"b').inc(2.5)
    Histogram("seconds", "taken", buckets=(1, 2), registry=registry).observe(1.5)
    assert exposition.text(exposition.families(registry)) == generate_latest(registry)


def test_counts_are_added_and_gauges_are_not() -> None:
    found = lines(exposition.combined([process(3, 0.5, ready=1, version="1"), process(4, 1.5, ready=0, version="2")]))
    for line in (
        'requests_total{status="200"} 7.0',
        'requests_total{status="1"} 1.0',
        'requests_total{status="2"} 1.0',
        'seconds_bucket{le="1.0"} 1.0',
        'seconds_bucket{le="2.0"} 2.0',
        'seconds_bucket{le="+Inf"} 2.0',
        "seconds_sum 2.0",
        "factorlens_ready 0.0",
        "factorlens_workers 2.0",
        'info{version="1"} 1.0',
        'info{version="2"} 1.0',
    ):
        assert found.count(line) == 1


def test_what_a_process_counted_stays_and_what_it_was_does_not() -> None:
    ended, alive = process(3, 0.5, ready=0, version="1"), process(4, 1.5, ready=1, version="2")
    found = lines(exposition.combined([alive, exposition.counts(ended)]))
    assert 'requests_total{status="200"} 7.0' in found
    assert "seconds_sum 2.0" in found
    assert "factorlens_ready 1.0" in found
    assert "factorlens_workers 1.0" in found
    assert 'info{version="1"} 1.0' not in found


@dataclass
class Loaded:
    """A version that has answered so many requests of a row each."""

    answered: int
    labels: tuple[str, str] = ("m", "1")
    statistics: Statistics = field(default_factory=Statistics)
    scores: Scores | None = field(default_factory=lambda: Scores(ScoreBins(edges=(0.0,), shares=(0.5, 0.5))))

    def __post_init__(self) -> None:
        assert self.scores
        for _ in range(self.answered):
            self.statistics.succeeded(encode=0.5, queue=0.25, infer=0.25, answer=0.25)
            self.scores.add(np.array([1.0]))


def test_what_is_opened_anew_counts_on() -> None:
    workers = [Metrics(), Metrics()]

    def told(name: str) -> list[float]:
        found = exposition.combined([exposition.families(each.registry) for each in workers])
        return [
            value
            for family in found
            for sample, labels, value in family.samples
            if sample == name
            and labels["model"] == "m"
            and labels.get("stage", "read") == "read"
            and labels.get("bin", "1") == "1"
        ]

    def check(answered: int) -> None:
        assert told("factorlens_stage_seconds_count") == [answered]
        assert told("factorlens_stage_seconds_sum") == [answered / 2]
        assert told("factorlens_score_bin_total") == [answered]

    def load(at: int, answered: int) -> Loaded:
        loaded = Loaded(answered)
        workers[at].versions.add(loaded)
        return loaded

    served = [load(0, 3), load(1, 4)]
    check(7)
    for at in range(2):  # one after the other
        for answered in (0, 5):
            opened = load(at, answered)
            check(7 + 5 * at + answered)
            served[at] = opened
            del opened
            check(7 + 5 * at + answered)
    while served:
        del served[0]
        check(17)
    assert told("factorlens_score_bin_expected") == []


def test_what_never_answered_leaves_nothing() -> None:
    metrics = Metrics()
    for version in range(100):
        loaded = Loaded(0, ("m", str(version)))
        metrics.versions.add(loaded)
        (stages,) = [each for each in exposition.families(metrics.registry) if each.name == "factorlens_stage_seconds"]
        assert {labels["version"] for _, labels, _ in stages.samples} == {str(version)}
