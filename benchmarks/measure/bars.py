"""What was promised, and whether it is kept."""

from dataclasses import dataclass

from benchmarks.measure.rounds import Figures, Key


@dataclass(frozen=True)
class Bar:
    """`found` is None where it could not be measured; `why` then says the reason."""

    text: str
    found: float | None
    limit: float
    at_least: bool = True
    unit: str = "×"
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return f"not measured: {self.why}"
        met = self.found >= self.limit if self.at_least else self.found <= self.limit
        return "met" if met else "missed"

    @property
    def asked(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {_number(self.limit)}{self.unit}"

    @property
    def measured(self) -> str:
        return "–" if self.found is None else f"{_number(self.found)}{self.unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Bars:
    """Makes bars out of figures."""

    figures: Figures

    def times(self, text: str, limit: float, *, of: Key, over: Key) -> Bar:
        """Requests per CPU-second of `of`, at least `limit` times those of `over`."""
        return self._bar(text, limit, of, over, at_least=True, invert=True)

    def cost(self, text: str, limit: float, *, of: Key, over: Key) -> Bar:
        """CPU of a request of `of`, at most `limit` times that of `over`."""
        return self._bar(text, limit, of, over, at_least=False, invert=False)

    def above(self, text: str, limit_us: float, *, of: Key, floor_us: float) -> Bar:
        """CPU of a request of `of` over what cannot be saved, in microseconds."""
        if why := self.missing(of):
            return Bar(text, None, limit_us, at_least=False, unit=" µs", why=why)
        return Bar(text, self.figures.medians[of].cpu_us - floor_us, limit_us, at_least=False, unit=" µs")

    def spread(self, text: str, limit: float, *, of: Key, over: Key) -> Bar:
        """p99/p50 of `of`, at most `limit` times that of `over`."""
        if why := self.missing(of, over):
            return Bar(text, None, limit, at_least=False, why=why)
        spreads = [found.p99_ms / found.p50_ms for found in (self.figures.medians[of], self.figures.medians[over])]
        return Bar(text, spreads[0] / spreads[1], limit, at_least=False)

    def scaling(self, text: str, limit: float, *, of: Key, over: Key) -> Bar:
        """Requests per second of the clock of two workers over one, as if both had two whole processors."""
        if why := self.missing(of, over):
            return Bar(text, None, limit, why=why)
        two, one = (self.figures.medians[key] for key in (of, over))
        ratio = 2 * (two.per_second / two.left) / (one.per_second / one.left)
        return Bar(f"{text} ({two.left:.2f} and {one.left:.2f})", ratio, limit)

    def quickest(self, *keys: Key) -> Key:
        """The one whose request costs least CPU, of those that were measured; the first where none was."""
        there = [key for key in keys if not self.missing(key)]
        return min(there, key=lambda key: self.figures.medians[key].cpu_us) if there else keys[0]

    def missing(self, *keys: Key) -> str:
        """Why one of these is not among the figures; empty where all are."""
        gone = [name for table, name in keys if (table, name) not in self.figures.medians]
        return f"{gone[0]}: {self.figures.absent.get(gone[0], 'it was left out')}" if gone else ""

    def _bar(self, text: str, limit: float, of: Key, over: Key, *, at_least: bool, invert: bool) -> Bar:
        if why := self.missing(of, over):
            return Bar(text, None, limit, at_least=at_least, why=why)
        ratio = self.figures.medians[of].cpu_us / self.figures.medians[over].cpu_us
        return Bar(text, 1 / ratio if invert else ratio, limit, at_least=at_least)
