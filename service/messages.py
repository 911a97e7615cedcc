"""Requests and answers, as they stand on the wire: for the OpenAPI document, and to say what is wrong with a request.

Reading a request never lets its content into an error.
"""

from collections.abc import Collection, Iterable
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from bundle.errors import type_name
from bundle.manifest import Task
from bundle.schema import Source
from service import places
from service.errors import BodyRefused, Refusal
from service.nesting import check_depth
from service.places import Path, Place

Instance = dict[str, Any]
Columns = dict[str, list[Any]]

REFUSALS_SHOWN = 20


class Reply(NamedTuple):
    """An answer as it is sent: its body, and the headers that are its own. `rows` is how many it was asked about."""

    content: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)
    rows: int = 1


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Batch(_Message):
    """Rows as a list of objects, or as an object of columns: one of the two."""

    instances: list[Instance] | None = Field(default=None, description="one object {field: value} an instance")
    columns: Columns | None = Field(default=None, description="one list of values a field, all of one length")
    signature_name: str | None = Field(default=None, description="TensorFlow Serving clients send it; it is ignored")

    @model_validator(mode="after")
    def _either(self) -> Self:
        _require_one(instances=self.instances, columns=self.columns)
        return self


class PredictRequest(Batch):
    logits: bool = Field(default=False, description="answer the logits beside the predictions")


class ExplainRequest(Batch):
    top_k: int | None = Field(default=None, ge=1, description="pairs to show; the setting top_k unless given")


class CandidatesRequest(_Message):
    """Candidates to keep, as rows or as columns."""

    candidates: list[Instance] | None = Field(default=None, description="one object {field: value} a candidate")
    columns: Columns | None = Field(default=None, description="the candidates as one list of values a field")

    @model_validator(mode="after")
    def _either(self) -> Self:
        _require_one(candidates=self.candidates, columns=self.columns)
        return self


class RankRequest(_Message):
    """One context and the candidates to order for it: as rows, as columns, or a set that is kept."""

    context: Instance = Field(description="the fields that all candidates share")
    candidates: list[Instance] | None = Field(default=None, description="one object {field: value} a candidate")
    columns: Columns | None = Field(default=None, description="the candidates as one list of values a field")
    candidate_set: str | None = Field(default=None, description="the name of a set that was put beforehand")
    top_k: int | None = Field(default=None, ge=1, description="candidates to answer; the setting top_k unless given")
    explain: int | None = Field(default=None, ge=1, description="candidates to explain, of those answered")

    @model_validator(mode="after")
    def _either(self) -> Self:
        _require_one(candidates=self.candidates, columns=self.columns, candidate_set=self.candidate_set)
        return self


class _Answer(_Message):
    """What every answer carries: the version that gave it."""

    model: str
    version: int
    digest: str = Field(description="sha256 of the bundle's manifest.json")


class Unknown(_Message):
    instance: int
    fields: list[str] = Field(description="fields whose value is not in the vocabulary; scored as unknown")


class PredictAnswer(_Answer):
    predictions: list[float] = Field(description="probabilities (binary), values (regression) or logits (ranking)")
    logits: list[float] | None = None
    unknown: list[Unknown]


class _Sized(_Message):
    """Sizes the model declares stand beside the contribution under their own names, such as `attention`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]


class ValueTerm(_Message):
    value: str | None
    contribution: float


class FieldTerm(_Sized):
    field: str
    known: bool
    contribution: float
    values: list[ValueTerm] | None = Field(default=None, description="of a multi-valued field")


class PairTerm(_Sized):
    fields: list[str] = Field(min_length=2, max_length=2)
    contribution: float


class Remaining(_Message):
    count: int = Field(description="pairs left out")
    contribution: float = Field(description="the sum of what they contribute")


class Explanation(_Message):
    """bias + fields + pairs + remaining + residual = logit, up to completeness_error; prediction = link(logit)."""

    prediction: float
    logit: float
    link: str
    bias: float
    fields: list[FieldTerm] = Field(description="every field, in schema order")
    pairs: list[PairTerm] = Field(description="the strongest by |contribution|")
    remaining: Remaining
    residual: float = Field(description="the output of a network branch; 0 where exact")
    exact: bool
    method: Literal["terms", "terms+residual"]
    completeness_error: float


class ExplainAnswer(_Answer):
    explanations: list[Explanation]


class Ranked(_Message):
    index: int = Field(description="position among the candidates")
    score: float = Field(description="the prediction")


class UnknownField(_Message):
    """A field whose value is not in the vocabulary; scored as unknown."""

    field: str
    candidates: int = Field(description="how many candidates it is unknown in: all, where it is the context's")


class RankAnswer(_Answer):
    ranked: list[Ranked] = Field(description="best first; ties by lower index")
    path: Literal["split", "flat"] = Field(description="split: the context was computed once")
    unknown: list[UnknownField]
    misplaced: list[str] | None = Field(
        default=None, description="fields on the other side than their source says; without them the path were split"
    )
    explanations: list[Explanation] | None = Field(default=None, description="of the first ones, where asked for")


class Rejected(_Message):
    version: int
    reason: str


class CandidateSetAnswer(_Message):
    """A candidate set that is kept."""

    model: str
    name: str
    candidates: int
    fields: list[str] = Field(description="the fields that its candidates have")
    bytes: int = Field(description="what it counts towards max_candidate_set_bytes")
    rejected: list[Rejected] = Field(description="versions that serve, but cannot encode it, each with the reason")


class CandidateSetsAnswer(_Message):
    model: str
    candidate_sets: list[CandidateSetAnswer]


VersionNumber = Annotated[int, Field(ge=1, le=2**53)]


class RoutesRequest(_Message):
    """Which versions of a model answer what."""

    stable: VersionNumber | None = Field(
        default=None, description="answers requests without a version; left out: the highest that is nothing else"
    )
    canary: VersionNumber | None = Field(default=None, description="answers some of these instead")
    canary_percent: float = Field(default=0.0, description="how many of a hundred, by their key: 0 to 100")
    shadow: VersionNumber | None = Field(default=None, description="scores again what the stable version has answered")
    shadow_percent: float = Field(default=100.0, description="how many of a hundred, by their key: 0 to 100")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for key, percent in (("canary_percent", self.canary_percent), ("shadow_percent", self.shadow_percent)):
            if not 0 <= percent <= 100:
                raise _shape(key, expected="a number from 0 to 100", received="another number")
        for key, version in (("canary", self.canary), ("shadow", self.shadow)):
            if version is not None and version == self.stable:
                raise _shape(key, expected="another version than stable", received="the same")
        if self.canary is None and self.canary_percent:
            raise _shape("canary", expected="a version, where it has a percentage", received="none")
        return self


class RoutesAnswer(_Message):
    """What was set, and what it comes to among the versions that serve."""

    model: str
    stable: int | None
    canary: int | None
    canary_percent: float
    shadow: int | None
    shadow_percent: float
    default: int | None = Field(description="the version that answers as stable now; null where none serves")
    versions: list[int] = Field(description="versions that serve, highest first")
    passed_over: list[Rejected] = Field(description="versions that are set, but do not serve: stable answers for them")


class Live(_Message):
    live: Literal[True]


class Ready(_Message):
    ready: Literal[True]


class ModelsAnswer(_Message):
    models: list[str]


class FieldInfo(_Message):
    name: str
    kind: str
    source: Source
    vocabulary: int | None = Field(default=None, description="values it knows")
    buckets: int | None = Field(default=None, description="of a hashed or quantile field")
    max_len: int | None = Field(default=None, description="values a multi-valued field takes")
    transform: str | None = Field(default=None, description="of a numeric field")


class SizeInfo(_Message):
    name: str
    axis: str


class ModelAnswer(_Message):
    """A model, described by the version asked for, or else by its default one. `name`, `ready`: as KServe v1."""

    name: str
    ready: bool
    versions: list[int] = Field(description="versions that serve, highest first")
    rejected: list[Rejected] = Field(description="versions that were found and refused")
    version: int | None = None
    digest: str | None = None
    key: str | None = Field(default=None, description="its architecture")
    task: Task | None = None
    link: str | None = Field(default=None, description="prediction = link(logit)")
    exact: bool | None = Field(default=None, description="whether terms alone give the logit, without a residual")
    provider: str | None = Field(default=None, description="where its graphs run")
    nodes: dict[str, int] | None = Field(
        default=None, description="how many nodes of its graphs run where; on a GPU some may be left to the CPU"
    )
    fields: list[FieldInfo] | None = None
    sizes: list[SizeInfo] | None = Field(default=None, description="what explanations say beside contributions")
    metrics: dict[str, Any] | None = Field(default=None, description="measured when it was trained")
    example: Instance | None = Field(default=None, description="an instance that can be sent back as it is")


Request = TypeVar("Request", bound=BaseModel)


def read(kind: type[Request], raw: bytes, *, fields: Collection[str]) -> Request:
    """A request from the bytes of a body, where `fields` are the names a refusal may repeat.

    Raises BodyUnreadable where it is not JSON (NaN, Infinity and lone surrogates are not) or nested too deep, and
    BodyRefused where it has another shape, or a key twice.
    """
    check_depth(raw)
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise places.unreadable(raw, str(error), partial(place, keys=kind.model_fields, fields=fields)) from None
    places.check_unique(raw, partial(place, keys=kind.model_fields, fields=fields))
    try:
        return kind.model_validate(_curtailed(body, kind.model_fields))
    except ValidationError as error:
        found = error.errors(include_url=False)[:REFUSALS_SHOWN]
        raise BodyRefused(*(_refusal(each, body, kind, fields) for each in found)) from None


def place(path: Path, *, keys: Collection[str], fields: Collection[str]) -> Place:
    """What a path into a body is called, with those of its names that are in `keys` and `fields`."""
    key, within = path[:1], path[1:3]
    return Place(
        key=next((each for each in key if each in keys and isinstance(each, str)), None),
        instance=next((each for each in within if isinstance(each, int)), None),
        field=next((each for each in within if isinstance(each, str) and each in fields), None),
    )


def _curtailed(body: object, keys: Collection[str]) -> object:
    """The body without what is wrong in it beyond REFUSALS_SHOWN times: millions of errors would take seconds."""
    if not isinstance(body, dict):
        return body
    dropped = set([key for key in body if key not in keys][REFUSALS_SHOWN:])
    kept = {key: value for key, value in body.items() if key not in dropped}
    return kept | {key: _until_wrong(kept[key]) for key in ("instances", "candidates", "columns") if key in kept}


def _until_wrong(value: object) -> object:
    """Rows, or columns, up to where the last refusal that is shown will be."""
    match value:
        case list():
            return value[: _place_of_last(value, dict)]
        case dict():
            return dict(islice(value.items(), _place_of_last(value.values(), list)))
    return value


def _place_of_last(values: Iterable[object], kind: type) -> int | None:
    wrong = (at for at, value in enumerate(values, 1) if not isinstance(value, kind))
    return next(islice(wrong, REFUSALS_SHOWN - 1, None), None)


def check_count(count: int, *, limit: int, key: str | None = None) -> None:
    """Raise BodyRefused unless a batch has at least one row and at most `limit`."""
    if not 1 <= count <= limit:
        raise BodyRefused(Refusal(key=key, expected=f"1 to {limit} rows", received=f"{count} rows"))


EXPECTED = {
    "bool_type": "a boolean",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than_equal": "a number of at least 1",
    "int_type": "an integer",
    "less_than_equal": "a smaller number",
    "list_type": "an array",
    "missing": "a value",
    "model_type": "an object",
    "string_type": "a string",
}


def _refusal(error: ErrorDetails, body: Any, kind: type[BaseModel], fields: Collection[str]) -> Refusal:
    if error["type"] == "shape":
        return Refusal(**error["ctx"])
    if error["type"] == "extra_forbidden":
        position = list(body).index(error["loc"][0])
        expected = f"only the keys {', '.join(kind.model_fields)}"
        return Refusal(expected=expected, received=f"an unknown key at position {position}")
    key, within = (*error["loc"], None, None)[:2]
    received = "nothing" if error["type"] == "missing" else type_name(error["input"])
    if isinstance(within, str) and within not in fields:
        received = f"{received} at position {list(body[key]).index(within)}"
    return Refusal(
        key=None if key is None else str(key),
        instance=within if isinstance(within, int) else None,
        field=within if isinstance(within, str) and within in fields else None,
        expected=EXPECTED[error["type"]],
        received=received,
    )


def _shape(key: str, *, expected: str, received: str) -> PydanticCustomError:
    """A refusal that has its sentence already."""
    return PydanticCustomError("shape", "the shape", {"key": key, "expected": expected, "received": received})


def _require_one(**values: object) -> None:
    given = [key for key, value in values.items() if value is not None]
    if len(given) != 1:
        *others, last = values
        expected = f"one of the keys {', '.join(others)} and {last}"
        received = " and ".join(given) or "none of them"
        raise PydanticCustomError("shape", "the shape", {"expected": expected, "received": received})
