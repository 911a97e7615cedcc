"""Metrics of every version that is loaded, worked out when they are asked for: counting them costs requests nothing."""

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, NamedTuple, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from service.drift import Scores
from service.statistics import Statistics

VERSION: Final = ("model", "version")
BINS: Final = (*VERSION, "bin")
Labels = tuple[str, str]


class Loaded(Protocol):
    """A version, as far as these metrics know one."""

    statistics: Statistics
    scores: Scores | None

    @property
    def labels(self) -> Labels:
        """Its model and its version."""


class _Added(NamedTuple):
    """What is left to be counted of a version after nobody holds it any more."""

    alive: weakref.ref[Loaded]
    labels: Labels
    statistics: Statistics
    scores: Scores | None


@dataclass
class _Counts:
    """All that was counted under the same labels."""

    answered: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bins: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, each: _Added) -> None:
        answered, stages = each.statistics.stages()
        self.answered += answered
        for stage, seconds in stages.items():
            self.seconds[stage] += seconds
        for at, count in enumerate(each.scores.counts.tolist() if each.scores else ()):
            self.bins[at] += count


class Versioned(Collector):
    """Tells of the versions that were added. What one has counted stays when nobody holds it any more, for a counter
    must never go back, nor may the sum of several processes that open it anew one after the other."""

    def __init__(self) -> None:
        self._added: list[_Added] = []
        self._ended: dict[Labels, _Counts] = {}
        self._lock = Lock()

    def add(self, loaded: Loaded) -> None:
        with self._lock:
            self._settle()
            self._added.append(_Added(weakref.ref(loaded), loaded.labels, loaded.statistics, loaded.scores))

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | SummaryMetricFamily]:
        with self._lock:
            self._settle()
            added, counts = self._added, deepcopy(self._ended)
        for each in added:
            counts.setdefault(each.labels, _Counts()).add(each)
        yield _stages(counts)
        yield _served(counts)
        yield from _spread({each.labels: each.scores for each in added if each.scores})  # the later of two alike

    def _settle(self) -> None:
        """Of versions that have ended, keep only what was counted, and of those that never answered nothing."""
        added, self._added = self._added, []
        for each in added:
            if each.alive() is not None:
                self._added.append(each)
            elif each.statistics.answered or (each.scores and each.scores.counts.any()):
                self._ended.setdefault(each.labels, _Counts()).add(each)


def _stages(versions: Mapping[Labels, _Counts]) -> SummaryMetricFamily:
    family = SummaryMetricFamily(
        "factorlens_stage_seconds",
        "Stages of a predict or infer that was answered: read its body, queue, compute, write the answer",
        labels=(*VERSION, "stage"),
    )
    for labels, counts in versions.items():
        for stage, seconds in counts.seconds.items():
            family.add_metric((*labels, stage), counts.answered, seconds)
    return family


def _served(versions: Mapping[Labels, _Counts]) -> CounterMetricFamily:
    family = CounterMetricFamily("factorlens_score_bin", "Scores of predict and infer, by bin", labels=BINS)
    for labels, counts in versions.items():
        for at, count in counts.bins.items():
            family.add_metric((*labels, str(at)), count)
    return family


def _spread(versions: Mapping[Labels, Scores]) -> Iterator[GaugeMetricFamily]:
    expected = GaugeMetricFamily(
        "factorlens_score_bin_expected", "Share of the validation rows whose scores were in a bin", labels=BINS
    )
    stability = GaugeMetricFamily(
        "factorlens_score_psi",
        "Population stability index of the last scores against those of the validation rows",
        labels=VERSION,
    )
    for labels, scores in versions.items():
        for at, share in enumerate(scores.bins.shares):
            expected.add_metric((*labels, str(at)), share)
        if (index := scores.stability) is not None:
            stability.add_metric(labels, index)
    yield from (expected, stability)
