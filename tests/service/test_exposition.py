"""Metrics of several processes as those of one."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service import exposition
from service.exposition import Family


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
