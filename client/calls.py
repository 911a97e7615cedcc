"""What both clients ask, and how they read the answers: no input and output happens here."""

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, Literal, TypeVar, get_args
from urllib.parse import quote

import httpx
import msgspec
from msgspec.structs import force_setattr

from client.answers import ExplainAnswer, Explanation, Health, ModelAnswer, ModelsAnswer, PredictAnswer, RankAnswer
from client.errors import Unreadable, problem_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
A = TypeVar("A", PredictAnswer, ModelsAnswer, ModelAnswer)

Row = Mapping[str, Any]
Rows = Sequence[Row] | Mapping[str, Sequence[Any]]
Route = Literal["stable", "canary", "shadow"]
ROUTES: Final[tuple[Route, ...]] = get_args(Route)
Version = int | Route  # a number, or whichever version has that route now

JSON: Final = {"content-type": "application/json"}


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """One request, and what becomes of an answer whose status is in `answers`; `once`: it is never tried again."""

    path: str
    decode: Callable[[httpx.Response], T_co]
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    answers: frozenset[int] = frozenset({200})
    once: bool = False

    @property
    def method(self) -> str:
        return "GET" if self.content is None else "POST"

    def compressed(self, over: int) -> "Call[T_co]":
        """The same with a gzip body where it has more than `over` bytes."""
        if self.content is None or len(self.content) <= over:
            return self
        headers = {**self.headers, "content-encoding": "gzip"}
        return replace(self, content=gzip.compress(self.content, 1), headers=headers)


def predict(model: str, rows: Rows, *, logits: bool, version: Version | None) -> Call[PredictAnswer]:
    said = _batch("instances", rows) | ({"logits": True} if logits else {})
    return _verb("predict", model, version, said, _reading(PredictAnswer))


def explain(model: str, rows: Rows, *, top_k: int | None, version: Version | None) -> Call[ExplainAnswer]:
    said = _batch("instances", rows) | _given(top_k=top_k)
    return _verb("explain", model, version, said, _explained)


def rank(
    model: str, context: Row, candidates: Rows, *, top_k: int | None, explain: int | None, version: Version | None
) -> Call[RankAnswer]:
    said = {"context": context} | _batch("candidates", candidates) | _given(top_k=top_k, explain=explain)
    return _verb("rank", model, version, said, _ranked)


def models() -> Call[list[str]]:
    read = _reading(ModelsAnswer)
    return Call("/v1/models", lambda response: read(response).models)


def model(name: str, *, version: Version | None) -> Call[ModelAnswer]:
    return Call(address(name, version), _reading(ModelAnswer))


def health() -> Call[Health]:
    return Call("/readyz", _health, answers=frozenset({200, 503}), once=True)


def address(model: str, version: Version | None) -> str:
    """Raises ValueError for a version that is neither a number nor a route's name."""
    name = f"/v1/models/{quote(model, safe='')}"
    if version is None:
        return name
    if isinstance(version, str) and version not in ROUTES and not (version.isascii() and version.isdigit()):
        raise ValueError(f"version {version!r}: expected a number or one of {', '.join(ROUTES)}")
    return f"{name}/versions/{version}"


def _verb(
    verb: str, model: str, version: Version | None, said: dict[str, Any], decode: Callable[[httpx.Response], T]
) -> Call[T]:
    content = msgspec.json.encode(said, enc_hook=_plain)
    return Call(f"{address(model, version)}:{verb}", decode, content, JSON)


def _batch(name: str, rows: Rows) -> dict[str, Any]:
    return {"columns": rows} if isinstance(rows, Mapping) else {name: rows}


def _given(**options: int | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _plain(value: Any) -> Any:
    """What numpy and pandas hold, as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no value of a field")


def _reading(kind: type[A]) -> Callable[[httpx.Response], A]:
    return lambda response: _read(response, kind)


def _read(response: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"this is no answer of the service: {error}") from None


def _explained(response: httpx.Response) -> ExplainAnswer:
    answer = _read(response, ExplainAnswer)
    _add_sizes(answer.explanations, response)
    return answer


def _ranked(response: httpx.Response) -> RankAnswer:
    answer = _read(response, RankAnswer)
    _add_sizes(answer.explanations or [], response)
    return answer


def _add_sizes(explanations: list[Explanation], response: httpx.Response) -> None:
    """Put the sizes, which stand beside a contribution under names of the model's own, where their type says."""
    if not explanations:
        return
    for explanation, said in zip(explanations, msgspec.json.decode(response.content)["explanations"], strict=True):
        terms = (*explanation.fields, *explanation.pairs)
        for term, given in zip(terms, (*said["fields"], *said["pairs"]), strict=True):
            force_setattr(term, "sizes", {name: given[name] for name in given.keys() - set(term.__struct_fields__)})


def _health(response: httpx.Response) -> Health:
    return Health(True) if response.status_code == 200 else Health(False, problem_of(response).detail)
