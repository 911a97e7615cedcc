"""Metrics of every version that is loaded, worked out when they are asked for: counting them costs requests nothing."""

import weakref
from collections.abc import Iterator
from typing import Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from service.drift import Scores
from service.statistics import Statistics

VERSION: Final = ("model", "version")
Labels = tuple[str, str]


class Loaded(Protocol):
    """A version, as far as these metrics know one."""

    statistics: Statistics
    scores: Scores | None

    @property
    def labels(self) -> Labels:
        """Its model and its version."""


class Versioned(Collector):
    """Tells of the versions that were added, until nobody else holds them."""

    def __init__(self) -> None:
        self._added: list[weakref.ref[Loaded]] = []

    def add(self, loaded: Loaded) -> None:
        self._added = [ref for ref in self._added if ref() is not None] + [weakref.ref(loaded)]

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | SummaryMetricFamily]:
        found = [loaded for each in self._added if (loaded := each()) is not None]
        versions = {loaded.labels: loaded for loaded in found}  # the later of two, while one is opened anew
        yield _stages(versions)
        yield from _scores({labels: loaded.scores for labels, loaded in versions.items() if loaded.scores})


def _stages(versions: dict[Labels, Loaded]) -> SummaryMetricFamily:
    family = SummaryMetricFamily(
        "factorlens_stage_seconds",
        "Stages of a predict or infer that was answered: read its body, queue, compute, write the answer",
        labels=(*VERSION, "stage"),
    )
    for labels, loaded in versions.items():
        answered, stages = loaded.statistics.stages()
        for stage, seconds in stages.items():
            family.add_metric((*labels, stage), answered, seconds)
    return family


def _scores(versions: dict[Labels, Scores]) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
    bins = (*VERSION, "bin")
    served = CounterMetricFamily("factorlens_score_bin", "Scores of predict and infer, by bin", labels=bins)
    expected = GaugeMetricFamily(
        "factorlens_score_bin_expected", "Share of the validation rows whose scores were in a bin", labels=bins
    )
    stability = GaugeMetricFamily(
        "factorlens_score_psi",
        "Population stability index of the last scores against those of the validation rows",
        labels=VERSION,
    )
    for labels, scores in versions.items():
        for at, (count, share) in enumerate(zip(scores.counts.tolist(), scores.bins.shares, strict=True)):
            served.add_metric((*labels, str(at)), count)
            expected.add_metric((*labels, str(at)), share)
        if (index := scores.stability) is not None:
            stability.add_metric(labels, index)
    yield from (served, expected, stability)
