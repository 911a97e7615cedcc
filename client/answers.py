"""Answers as types, named as in the service's OpenAPI document. Keys that a later service adds are ignored."""

from typing import Any, Literal

from msgspec import Struct


class _Answer(Struct, frozen=True, kw_only=True):
    """What every answer of a verb carries: the version that gave it."""

    model: str
    version: int
    digest: str


class Unknown(Struct, frozen=True):
    """The fields of one instance whose value training did not know."""

    instance: int
    fields: list[str]


class PredictAnswer(_Answer, frozen=True, kw_only=True):
    """One prediction a row: a probability (binary), a value (regression) or a logit (ranking)."""

    predictions: list[float]
    logits: list[float] | None = None
    unknown: list[Unknown]


class ValueTerm(Struct, frozen=True):
    """What one value of a multi-valued field contributed."""

    value: str | None
    contribution: float


class FieldTerm(Struct, frozen=True, kw_only=True):
    """What a field contributed; `sizes` are what the model declares beside it, such as `factor`."""

    field: str
    known: bool
    contribution: float
    values: list[ValueTerm] | None = None
    sizes: dict[str, float] = {}


class PairTerm(Struct, frozen=True, kw_only=True):
    """What a pair of fields contributed; `sizes` are what the model declares beside it, such as `attention`."""

    fields: tuple[str, str]
    contribution: float
    sizes: dict[str, float] = {}


class Remaining(Struct, frozen=True):
    """The pairs that are not listed: how many, and the sum of what they contribute."""

    count: int
    contribution: float


class Explanation(Struct, frozen=True, kw_only=True):
    """bias + fields + pairs + remaining + residual = logit, up to completeness_error; prediction = link(logit)."""

    prediction: float
    logit: float
    link: str
    bias: float
    fields: list[FieldTerm]
    pairs: list[PairTerm]
    remaining: Remaining
    residual: float
    exact: bool
    method: Literal["terms", "terms+residual"]
    completeness_error: float


class ExplainAnswer(_Answer, frozen=True, kw_only=True):
    """One explanation a row."""

    explanations: list[Explanation]


class Ranked(Struct, frozen=True):
    """A candidate by its position among those sent, and its prediction."""

    index: int
    score: float


class UnknownField(Struct, frozen=True):
    """A field whose value the model does not know, and in how many candidates: in all, where it is the context's."""

    field: str
    candidates: int


class RankAnswer(_Answer, frozen=True, kw_only=True):
    """The best candidates, best first; explanations of the first ones where they were asked for."""

    ranked: list[Ranked]
    path: Literal["split", "flat"]
    unknown: list[UnknownField]
    misplaced: list[str] | None = None
    explanations: list[Explanation] | None = None


class ModelsAnswer(Struct, frozen=True):
    models: list[str]


class FieldInfo(Struct, frozen=True, kw_only=True):
    """A field of a model's schema."""

    name: str
    kind: str
    source: Literal["user", "item", "context"]
    vocabulary: int | None = None
    buckets: int | None = None
    max_len: int | None = None
    transform: str | None = None


class SizeInfo(Struct, frozen=True):
    """What explanations say beside contributions, and of what."""

    name: str
    axis: str


class Rejected(Struct, frozen=True):
    """A version that was found and refused."""

    version: int
    reason: str


class ModelAnswer(Struct, frozen=True, kw_only=True):
    """A model and one version of it; what describes the version is None where none can serve."""

    name: str
    ready: bool
    versions: list[int]
    rejected: list[Rejected]
    version: int | None = None
    digest: str | None = None
    key: str | None = None
    task: Literal["regression", "binary", "ranking"] | None = None
    link: str | None = None
    exact: bool | None = None
    provider: str | None = None
    nodes: dict[str, int] | None = None
    fields: list[FieldInfo] | None = None
    sizes: list[SizeInfo] | None = None
    metrics: dict[str, Any] | None = None
    example: dict[str, Any] | None = None


class Health(Struct, frozen=True):
    """Whether every model has a version that serves, and if not, why."""

    ready: bool
    reason: str | None = None
