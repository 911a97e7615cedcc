"""Metrics over a whole set at once, in float64: never averages of batches."""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
CALIBRATION_BINS = 20
CUTOFF = 10  # of hr@10 and ndcg@10
GROWING = frozenset({"auc", "hr@10", "ndcg@10", "mrr", "gauc"})


def regression_metrics(labels: Numbers, predictions: Numbers, label_range: tuple[float, float]) -> dict[str, float]:
    """RMSE and MAE of predictions clipped to the range of the training labels."""
    errors = np.clip(predictions, *label_range) - labels
    return {"rmse": float(np.sqrt(np.mean(errors**2))), "mae": float(np.mean(np.abs(errors)))}


def binary_metrics(labels: Numbers, logits: Numbers) -> dict[str, float]:
    """AUC, log loss and calibration error of logits against labels 0 and 1."""
    probabilities = np.exp(-np.logaddexp(0.0, -logits))
    return {
        "auc": auc(labels, logits),
        "log_loss": float(np.mean(np.logaddexp(0.0, logits) - labels * logits)),
        "calibration_error": calibration_error(labels, probabilities),
    }


def ranking_metrics(ranks: Numbers, areas: Numbers) -> dict[str, float]:
    """Means over held-out rows, each with one item to find: rank 1 is the best, infinity was never ranked.

    hr@10 is the share with rank ≤ 10; ndcg@10 the mean of 1 / log2(1 + rank) where rank ≤ 10, else 0 (one item to
    find: the ideal is 1); mrr the mean of 1 / rank. gauc is the AUC of each user weighted by its rows (Zhu et al., KDD
    2018, section 4: GAUC), which is the mean of the areas of rows; NaN ones have nothing to be compared with and do
    not count. A rank of NaN makes all of them NaN.
    """
    if np.isnan(ranks).any():
        return dict.fromkeys(("ndcg@10", "hr@10", "mrr", "gauc"), float("nan"))
    hits, compared = ranks <= CUTOFF, areas[~np.isnan(areas)]
    return {
        "ndcg@10": float(np.mean(hits / np.log2(1 + ranks))),
        "hr@10": float(np.mean(hits)),
        "mrr": float(np.mean(1 / ranks)),
        "gauc": float(np.mean(compared)) if len(compared) else float("nan"),
    }


def auc(labels: Numbers, scores: Numbers) -> float:
    """Area under the ROC curve: the chance that a positive outranks a negative, ties counting one half.

    NaN where one of the classes is absent or a score is NaN.
    """
    if np.isnan(scores).any():
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    positives = labels == 1
    hits, misses = int(positives.sum()), int((~positives).sum())
    if not hits or not misses:
        return float("nan")
    return float((mean_ranks[inverse[positives]].sum() - hits * (hits + 1) / 2) / (hits * misses))


def calibration_error(labels: Numbers, probabilities: Numbers) -> float:
    """Expected calibration error over bins of equal count: mean |mean probability - share of positives|, weighted."""
    order = np.argsort(probabilities, kind="stable")
    bins = np.array_split(order, min(CALIBRATION_BINS, len(order)))
    gaps = [abs(float(probabilities[b].mean() - labels[b].mean())) * len(b) for b in bins]
    return sum(gaps) / len(order)


def better(metric: str, new: float, old: float | None) -> bool:
    """Whether `new` improves on `old` (None: on nothing yet): GROWING ones grow, errors shrink, NaN never counts."""
    if old is None:
        return not np.isnan(new)
    return new > old if metric in GROWING else new < old
