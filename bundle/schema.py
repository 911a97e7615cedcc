"""Field kinds as data: what a recipe asks for (a *kind*) and what fitting made of it (a *field* of a schema).

Ids are global. Id 0 is padding. Then field by field, in schema order:

    categorical, multi   missing, unknown, the values in order of first appearance in training
    the same, hashed     missing, bucket 0 … bucket n-1
    numeric              missing, one feature whose value is the scaled number
    numeric, quantile    missing, bucket 0 … bucket n-1
"""

from functools import cached_property
from itertools import accumulate, pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Source = Literal["user", "item", "context"]

PADDING = 0
MOST_FIELDS, MOST_SLOTS = 4096, 2**16  # arrays over the pairs of fields, and over the slots of a row, are that long


class Strict(BaseModel):
    """Frozen, and an unknown key is an error: for everything that is written to or read from a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Hash(Strict):
    """Ids by hashing (BLAKE2b with a seed: the same in every process and Python version) instead of a vocabulary."""

    buckets: int = Field(ge=2, le=2**31)
    seed: int = Field(default=0, ge=0, lt=2**63)


class _Kind(Strict):
    source: Source = "context"


class _Categories(_Kind):
    min_count: int = Field(default=1, ge=1, description="values rarer than this in training are unknown")
    hash: Hash | None = Field(default=None, description="hash into buckets instead of keeping a vocabulary")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.hash and self.min_count > 1:
            raise ValueError("min_count needs a vocabulary and has no effect with hash: give one of the two")
        return self


class Categorical(_Categories):
    """One category per row."""

    kind: Literal["categorical"] = "categorical"

    @property
    def width(self) -> int:
        return 1


class Multi(_Categories):
    """A list of categories per row, or an object {category: weight}."""

    kind: Literal["multi"] = "multi"
    max_len: int = Field(default=8, ge=1, le=4096)
    truncate: bool = Field(default=False, description="keep the first max_len values instead of refusing more")
    combiner: Literal["sum", "mean", "sqrtn"] = "mean"
    separator: str = Field(default="|", min_length=1, description="splits a CSV cell")

    @property
    def width(self) -> int:
        return self.max_len


class Numeric(_Kind):
    """A number: standardised, log1p (sign(x) log(1 + |x|)), or cut into quantile buckets."""

    kind: Literal["numeric"] = "numeric"
    transform: Literal["standardise", "log1p", "quantile"] = "standardise"
    buckets: int = Field(default=16, ge=2, le=65536, description="quantile buckets at most")

    @property
    def width(self) -> int:
        return 1


Kind = Annotated[Categorical | Multi | Numeric, Field(discriminator="kind")]


class FittedField(Strict):
    """One field of a fitted schema: its kind, and what fitting learnt beside the vocabulary."""

    name: str = Field(min_length=1)
    kind: Kind
    size: int = Field(ge=2, description="ids this field takes")
    mean: float = 0.0
    scale: float = Field(default=1.0, gt=0)
    edges: tuple[float, ...] = ()

    @property
    def needs_values(self) -> bool:
        """Whether its slots have values beside ids: unless it is one id with value 1."""
        is_scaled = isinstance(self.kind, Numeric) and self.kind.transform != "quantile"
        return isinstance(self.kind, Multi) or is_scaled

    @property
    def has_vocabulary(self) -> bool:
        return not isinstance(self.kind, Numeric) and self.kind.hash is None

    @model_validator(mode="after")
    def _sized(self) -> Self:
        match self.kind:
            case Numeric(transform="quantile"):
                expected = 1 + len(self.edges) + 1
            case Numeric():
                expected = 2
            case Categorical(hash=Hash() as hashing) | Multi(hash=Hash() as hashing):
                expected = 1 + hashing.buckets
            case _:
                return self
        if self.size != expected:
            raise ValueError(f"field {self.name!r} takes {expected} ids, not {self.size}")
        return self


class FeatureSchema(Strict):
    """The fields in order. Sizes: F fields, S slots (the sum of their widths), `size` ids with padding."""

    fields: tuple[FittedField, ...] = Field(min_length=1, max_length=MOST_FIELDS)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if sum(field.kind.width for field in self.fields) > MOST_SLOTS:
            raise ValueError(f"a row has at most {MOST_SLOTS:,} slots: the sum of max_len over the fields")
        if len(set(self.names)) < len(self.fields):
            raise ValueError("two fields have the same name")
        return self

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        return tuple(field.kind.width for field in self.fields)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First id of each field; it means 'missing'. Where there is a vocabulary the next one means 'unknown'."""
        return tuple(accumulate((field.size for field in self.fields), initial=PADDING + 1))[:-1]

    @cached_property
    def slots(self) -> tuple[slice, ...]:
        """The columns of `EncodedRows` that belong to each field."""
        ends = list(accumulate(self.widths, initial=0))
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @property
    def size(self) -> int:
        return 1 + sum(field.size for field in self.fields)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Positions (f, g), f < g, of the P = F(F-1)/2 field pairs, in the order of every [B, P] array."""
        return tuple((f, g) for f in range(len(self.fields)) for g in range(f + 1, len(self.fields)))

    @property
    def needs_values(self) -> bool:
        """Whether graphs take values beside ids: unless every field is one id with value 1."""
        return any(field.needs_values for field in self.fields)

    def side(self, *, candidate: bool) -> tuple[FittedField, ...]:
        """The fields that a candidate of a ranking has (source = item), or those of its context, in order."""
        return tuple(field for field in self.fields if (field.kind.source == "item") == candidate)
