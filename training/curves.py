"""The learning curves of a comparison, drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.compare import Compared
from training.errors import MissingExtra
from training.metrics import better
from training.results import Result

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart; then again with another dash.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
GREY, PALE = "#555555", "#E3E3E3"
NAMES = {"rmse": "RMSE", "mae": "MAE", "auc": "AUC", "log_loss": "log loss", "mrr": "MRR", "gauc": "GAUC"}
SHOWN = 0.9  # of each curve's epochs, the last ones; the steep first ones may leave the picture


def draw(compared: Sequence[Compared], path: Path) -> None:
    """Write the validation metric of every epoch, against epochs and against training time, as SVG, PNG or PDF.

    One line a run and one colour a row; a dot marks the epoch that was kept. Rows of another monitor than the first
    are drawn below. Raises MissingExtra where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import StrMethodFormatter
    except ImportError:
        raise MissingExtra("a picture of the learning curves", "matplotlib", extra="report") from None
    drawn = [each for each in compared if each.results]
    monitors = list(dict.fromkeys(each.results[0].monitor for each in drawn))
    style: Any = {"font.size": 9, "font.family": "sans-serif", "svg.hashsalt": "factorlens", "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(10, 4.2 * len(monitors)), layout="constrained")
        panels = figure.subplots(len(monitors), 2, sharey="row", squeeze=False)
        for monitor, (by_epoch, by_time) in zip(monitors, panels, strict=True):
            own = [each for each in drawn if each.results[0].monitor == monitor]
            own.sort(key=lambda each: _best(each, monitor), reverse=better(monitor, 1.0, 0.0))
            _panel(by_epoch, own, monitor, _epochs, "epoch")
            _panel(by_time, own, monitor, _seconds, "training time, s")
            by_epoch.set_ylabel(f"validation {NAMES.get(monitor, monitor)}")
            by_epoch.xaxis.get_major_locator().set_params(integer=True)
            by_time.set_xscale("log")
            by_time.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            by_time.legend(
                title="best first; a dot is the epoch kept",
                alignment="left",
                loc="center left",
                bbox_to_anchor=(1.02, 0.5),
                frameon=False,
                handlelength=2.2,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, compared: Sequence[Compared], monitor: str, across: Any, label: str) -> None:
    for at, each in enumerate(compared):
        line = {"color": COLOURS[at % len(COLOURS)], "linestyle": DASHES[at // len(COLOURS) % len(DASHES)]}
        for number, result in enumerate(each.results):
            x, y = across(result), _values(result, monitor)
            axes.plot(
                x, y, linewidth=1.4, label=None if number else f"{_best(each, monitor):.4f}  {each.entry.name}", **line
            )
            axes.plot(x[result.best_epoch - 1], y[result.best_epoch - 1], "o", markersize=4, color=line["color"])
    axes.set_ylim(*_limits([_values(result, monitor) for each in compared for result in each.results]))
    axes.set_xlabel(label)
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, length=3)


def _best(each: Compared, monitor: str) -> float:
    """The mean over the runs."""
    return float(np.mean([_values(result, monitor)[result.best_epoch - 1] for result in each.results]))


def _values(result: Result, monitor: str) -> Any:
    return np.array([epoch[monitor] for epoch in result.curve], np.float64)  # None, of an epoch that diverged, is NaN


def _epochs(result: Result) -> Any:
    return np.arange(1, len(result.curve) + 1)


def _seconds(result: Result) -> Any:
    """Training time at the end of every epoch, that of a first step before it."""
    return result.first_step_seconds + np.cumsum(result.epoch_seconds)


def _limits(curves: Sequence[Any]) -> tuple[float, float]:
    """Room for the last SHOWN of each curve, and a margin."""
    late = np.concatenate([curve[round((1 - SHOWN) * len(curve)) :] for curve in curves])
    low, high = float(np.nanmin(late)), float(np.nanmax(late))
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin
