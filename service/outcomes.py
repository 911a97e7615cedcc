"""What became of the requests that a shadow was to score. Most are dropped, so that this must cost next to nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

Look = Literal["scored", "refused", "failed"]
LOOKS: Final[tuple[Look, ...]] = get_args(Look)


@dataclass(slots=True)
class Tally:
    """The requests of one model. `looks` are written to by one thread, `dropped` under the shadow's lock."""

    looks: dict[Look, int] = field(default_factory=lambda: dict.fromkeys(LOOKS, 0))  # what the shadow did look at
    dropped: int = 0  # answered, and not looked at


class Outcomes(Collector):
    """A counter with the labels model and outcome."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name, self._help = name, help_text
        self.tallies: dict[str, Tally] = {}

    def serves(self, model: str) -> None:
        """Let it be there, with zeros."""
        self.tallies.setdefault(model, Tally())

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._help, labels=("model", "outcome"))
        for model, tally in list(self.tallies.items()):
            for outcome, count in (*tally.looks.items(), ("dropped", tally.dropped)):
                family.add_metric((model, outcome), count)
        yield family
