"""Metrics as plain data, so that those of several processes can be sent, added up and written out as one.

prometheus_client's own way, a mapped file for each process, would cost every request what this costs a scrape alone:
counting takes three times as long there, and it leaves out the metrics of the processes themselves.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from msgspec import Struct
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

Labels = dict[str, str]

ADDED: Final = {"counter", "histogram", "summary"}
ADDED_GAUGES: Final = {
    "factorlens_queue_rows",
    "factorlens_workers",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
}
LEAST: Final = {"factorlens_ready", "process_start_time_seconds"}


class Family(Struct):
    """One metric: its samples are (name, labels, value)."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, Labels, float]]


def families(registry: CollectorRegistry) -> list[Family]:
    """All metrics of this process."""
    return [
        Family(family.name, family.type, family.documentation, [(s.name, s.labels, s.value) for s in family.samples])
        for family in registry.collect()
    ]


def text(found: Sequence[Family]) -> bytes:
    """In Prometheus' text format."""
    return generate_latest(_Written(found))


def combined(processes: Iterable[Sequence[Family]]) -> list[Family]:
    """The metrics of several processes as if they were one.

    Counts, memory and descriptors are added up; a start is the first one's, ready are all or none, and of any other
    gauge, which says the same in every process, the largest value stands.
    """
    merged: dict[str, Family] = {}
    values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in (family for process in processes for family in process):
        into = merged.setdefault(family.name, Family(family.name, family.kind, family.help, []))
        for name, labels, value in family.samples:
            key = name, frozenset(labels.items())
            if key not in values:
                into.samples.append((name, labels, value))
            values[key] = _both(family, name, values[key], value) if key in values else value
    for family in merged.values():
        family.samples = [(name, labels, values[name, frozenset(labels.items())]) for name, labels, _ in family.samples]
    return list(merged.values())


def counts(found: Sequence[Family]) -> list[Family]:
    """What stays of a process that has ended: a counter must never go back."""
    return [family for family in found if family.kind in ADDED]


def _both(family: Family, name: str, first: float, second: float) -> float:
    if family.name in LEAST or name.endswith("_created"):
        return min(first, second)
    if family.kind in ADDED or family.name in ADDED_GAUGES:
        return first + second
    return max(first, second)


class _Written(Collector):
    def __init__(self, found: Sequence[Family]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        for family in self._found:
            metric = Metric(family.name, family.help, family.kind)
            for name, labels, value in family.samples:
                metric.add_sample(name, labels, value)
            yield metric
