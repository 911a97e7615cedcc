"""What `--threads auto` is held to."""

import statistics
from collections.abc import Mapping, Sequence

OF_THE_BETTER, OF_ONE = 0.95, 1.3
BATCH, GAINING = 2048, ("ifm", "afm")  # where more than one thread is to pay


def auto_bar(model: str, batch: int, rates: Mapping[str, Sequence[float]]) -> str:
    """A sentence on the rows per second, round by round, of "1" thread, of "2" and of "auto": what it is of the others
    in the median round, and what is missed."""
    better = max(rates["1"], rates["2"], key=statistics.median)
    shares = [(_times(rates["auto"], better), "the better of one and two", OF_THE_BETTER)]
    if batch == BATCH and model in GAINING:
        shares.append((_times(rates["auto"], rates["1"]), "one", OF_ONE))
    said = [
        f"{share:.2f} x {what} ({'' if share >= least else 'missed: '}at least {least:g})"
        for share, what, least in shares
    ]
    return f"auto: {', '.join(said)}"


def _times(rates: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))
