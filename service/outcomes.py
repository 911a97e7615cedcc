"""What became of the requests that shadows have looked at."""

from collections.abc import Iterator
from typing import Final, Literal, get_args

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

Look = Literal["scored", "refused", "failed"]
LOOKS: Final[tuple[Look, ...]] = get_args(Look)


class Outcomes(Collector):
    """A counter with the labels model and outcome; one thread counts."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name, self._help = name, help_text
        self.looks: dict[str, dict[Look, int]] = {}

    def serves(self, model: str) -> None:
        """Let it be there, with zeros."""
        self.looks.setdefault(model, dict.fromkeys(LOOKS, 0))

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._help, labels=("model", "outcome"))
        for model, looks in list(self.looks.items()):
            for outcome, count in looks.items():
                family.add_metric((model, outcome), count)
        yield family
