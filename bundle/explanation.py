"""Named contributions: what the arrays of the explain graph mean for one row.

logit = bias + Σ fields + Σ pairs + remaining + residual, up to `completeness_error`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.rows import EncodedRows, Row
from bundle.schema import FeatureSchema, Multi
from bundle.store import Bundle
from bundle.values import canonical

NEGLIGIBLE = 1e-9  # of the sum of all |terms|: a hundredth of what a float32 can tell apart

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class ValueTerm:
    """One value of a multi-valued field (None: the field is missing); the values add up to the field."""

    value: str | None
    contribution: float


@dataclass(frozen=True)
class FieldTerm:
    """First-order contribution of one field. `known` is false where a value was not in the vocabulary."""

    field: str
    known: bool
    contribution: float
    sizes: dict[str, float]
    values: tuple[ValueTerm, ...] | None


@dataclass(frozen=True)
class PairTerm:
    fields: tuple[str, str]
    contribution: float
    sizes: dict[str, float]


@dataclass(frozen=True)
class RowExplanation:
    """One score, taken apart. `pairs` are the strongest, by |contribution|; `remaining` counts and sums the others.

    `residual` is what a network branch added, as one number (exactly 0 where `exact`). `completeness_error` is the
    distance between the sum of all terms and the logit of the score graph.
    """

    prediction: float
    logit: float
    link: str
    bias: float
    fields: tuple[FieldTerm, ...]
    pairs: tuple[PairTerm, ...]
    remaining_count: int
    remaining_contribution: float
    residual: float
    exact: bool
    completeness_error: float

    def as_json(self) -> dict[str, Any]:
        """The explanation as the HTTP contract spells it."""
        return {
            "prediction": self.prediction,
            "logit": self.logit,
            "link": self.link,
            "bias": self.bias,
            "fields": [_field_json(term) for term in self.fields],
            "pairs": [
                {"fields": list(term.fields), "contribution": term.contribution, **term.sizes} for term in self.pairs
            ],
            "remaining": {"count": self.remaining_count, "contribution": self.remaining_contribution},
            "residual": self.residual,
            "exact": self.exact,
            "method": "terms" if self.exact else "terms+residual",
            "completeness_error": self.completeness_error,
        }


def _field_json(term: FieldTerm) -> dict[str, Any]:
    named: dict[str, Any] = {"field": term.field, "known": term.known, "contribution": term.contribution, **term.sizes}
    if term.values is not None:
        named["values"] = [{"value": value.value, "contribution": value.contribution} for value in term.values]
    return named


def explain(
    bundle: Bundle,
    rows: Sequence[Row],
    encoded: EncodedRows,
    logits: NDArray[np.float32],
    arrays: Arrays,
    *,
    top_k: int,
) -> list[RowExplanation]:
    """Name the arrays of the explain graph, one explanation a row.

    `rows` are the raw rows (for the values of multi-valued fields), `logits` [B] the score graph's own answer, and
    `arrays` the outputs of the explain graph: bias [], field [B, F], slot [B, S], pair [B, P], residual [B] and sizes.
    Of the pairs, those that are not NEGLIGIBLE compete for `top_k`; ties keep schema order. Where no pair contributes
    by itself but the model sizes pairs (inn), the largest sizes are shown.
    """
    named = _Names(bundle, arrays)
    known = ~bundle.encoder.unknown(encoded.ids)
    predictions = bundle.manifest.predictions(logits)
    return [
        named.row(at, row, known[at], float(predictions[at]), float(logits[at]), top_k) for at, row in enumerate(rows)
    ]


class _Names:
    def __init__(self, bundle: Bundle, arrays: Arrays) -> None:
        self._schema, self._manifest = bundle.schema, bundle.manifest
        self._arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}

    def row(
        self, at: int, row: Row, known: NDArray[np.bool_], prediction: float, logit: float, top_k: int
    ) -> RowExplanation:
        bias, residual = float(self._arrays["bias"]), float(self._arrays["residual"][at])
        fields, pairs = self._arrays["field"][at], self._arrays["pair"][at]
        least = NEGLIGIBLE * (abs(bias) + float(np.abs(fields).sum() + np.abs(pairs).sum()) + abs(residual))
        shown = self._strongest(at, top_k, least)
        rest = np.delete(pairs, shown)
        return RowExplanation(
            prediction=prediction,
            logit=logit,
            link=self._manifest.link,
            bias=bias,
            fields=tuple(self._field(at, f, row, known=bool(known[f])) for f in range(len(fields))),
            pairs=tuple(self._pair(at, p) for p in shown),
            remaining_count=len(rest),
            remaining_contribution=float(rest.sum()),
            residual=residual,
            exact=self._manifest.exact,
            completeness_error=abs(bias + float(fields.sum()) + float(pairs.sum()) + residual - logit),
        )

    def _strongest(self, at: int, top_k: int, least: float) -> list[int]:
        """Pairs by |contribution|. Where a network takes them all in (inn), by their size: none has a contribution."""
        pairs, sized = self._arrays["pair"][at], [s.name for s in self._manifest.sizes if s.axis == "pair"]
        if sized and not pairs.any():
            return np.argsort(-self._arrays[sized[0]][at], kind="stable")[:top_k].tolist()  # type: ignore[no-any-return]
        return [p for p in np.argsort(-np.abs(pairs), kind="stable")[:top_k].tolist() if abs(pairs[p]) > least]

    def _field(self, at: int, f: int, row: Row, *, known: bool) -> FieldTerm:
        values = _values(self._schema, f, row, self._arrays["slot"][at]) if self._is_multi(f) else None
        return FieldTerm(
            self._schema.names[f], known, float(self._arrays["field"][at, f]), self._sizes("field", at, f), values
        )

    def _pair(self, at: int, p: int) -> PairTerm:
        first, second = self._schema.pairs[p]
        names = (self._schema.names[first], self._schema.names[second])
        return PairTerm(names, float(self._arrays["pair"][at, p]), self._sizes("pair", at, p))

    def _sizes(self, axis: str, at: int, index: int) -> dict[str, float]:
        return {s.name: float(self._arrays[s.name][at, index]) for s in self._manifest.sizes if s.axis == axis}

    def _is_multi(self, f: int) -> bool:
        return isinstance(self._schema.fields[f].kind, Multi)


def _values(schema: FeatureSchema, f: int, row: Row, slot: NDArray[np.float64]) -> tuple[ValueTerm, ...]:
    raw = row.get(schema.names[f])
    given = raw if isinstance(raw, list | tuple | dict | np.ndarray) else ()
    values = [canonical(value) for value in islice(given, schema.widths[f])]
    contributions = slot[schema.slots[f]].tolist()
    return tuple(
        ValueTerm(value, contribution) for value, contribution in zip(values or [None], contributions, strict=False)
    )
