"""What a bundle says of itself: manifest.json."""

import math
import re
from typing import Annotated, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator

from bundle.schema import Strict

FORMAT_VERSION: Final = 1
RESERVED_NAMES = frozenset({"stats"})
NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,63}"

Task = Literal["regression", "binary", "ranking"]
Axis = Literal["pair", "field"]
GraphName = Literal["score", "explain", "rank_context", "rank_candidates"]
TableKind = Literal["float32", "float16", "int8"]
Name = Annotated[str, StringConstraints(pattern=rf"\A{NAME_PATTERN}\z")]
Sha256 = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]
ROW_GRAPHS: tuple[GraphName, ...] = ("score", "explain")
RANK_GRAPHS: tuple[GraphName, ...] = ("rank_context", "rank_candidates")
TERMS = ("bias", "field", "slot", "pair", "residual")  # what every explain graph answers, beside the sizes
_CLIP = re.compile(r"clip\((\S+), (\S+)\)")


class File(Strict):
    sha256: Sha256
    length: int = Field(ge=0)


class Table(Strict):
    """A constant of a graph that is read row by row, and where its bytes lie in a file."""

    file: str
    dtype: TableKind
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    offset: int = Field(ge=0)

    @property
    def length(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Graph(Strict):
    """One ONNX graph; its inputs are `ids` [B, S] int64 and, where their fields need them, `values` [B, S] float32.

    In a ranking, S are the slots of one side: `rank_context` takes one row and answers a state of several tensors, the
    same ones that `rank_candidates` takes beside its rows. `tables`, by the names they have in the graph, are mapped
    once for all graphs; a graph that names none maps them itself.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tables: dict[str, Table] = Field(default={})


class Size(Strict):
    """A size beside the terms, such as AFM's `attention` over pairs or IFM's `factor` over fields."""

    name: str
    axis: Axis


class Split(Strict):
    """The fields that describe the request and those that describe a candidate (source = item)."""

    context: tuple[str, ...]
    candidate: tuple[str, ...]


class Label(Strict):
    """The training label: the column it came from and its range."""

    column: str
    low: float
    high: float


class Provenance(Strict):
    data_sha256: Sha256
    seed: int
    packages: dict[str, str]


class Manifest(Strict):
    """`name` is the served model, `key` its architecture in the registry; prediction = link(logit)."""

    format_version: Literal[1] = FORMAT_VERSION
    name: Name
    version: int = Field(ge=1)
    key: str
    task: Task
    user: str | None = Field(
        default=None, description="the field that says who, where the recipe does; the item is the candidate"
    )
    link: str
    label: Label
    hyper_parameters: dict[str, object]
    graphs: dict[GraphName, Graph]
    sizes: tuple[Size, ...]
    exact: bool
    table: TableKind = Field(default="float32", description="what the embedding tables are stored as")
    split: Split
    files: dict[str, File]
    provenance: Provenance
    checksum: Sha256 | None = Field(default=None, description="sha256 of this file with zeros in place of this value")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name in RESERVED_NAMES:
            raise ValueError(f"the name {self.name!r} is reserved")
        if self.task == "ranking" and (self.user not in self.split.context or not self.split.candidate):
            raise ValueError("a ranking has a user among the fields of its context, and fields of the candidate")
        if set(self.graphs) not in ({*ROW_GRAPHS}, {*ROW_GRAPHS, *RANK_GRAPHS}):
            raise ValueError(
                f"a bundle has the graphs {' and '.join(ROW_GRAPHS)}, and may have {' and '.join(RANK_GRAPHS)}"
            )
        outputs = {"score": {"logit"}, "explain": {*TERMS, *(size.name for size in self.sizes)}}
        state: tuple[str, ...] = ()
        if "rank_context" in self.graphs:
            if not (self.split.context and self.split.candidate):
                raise ValueError("a ranking that is split has fields of the context and of the candidate")
            state = self.graphs["rank_context"].outputs
            if not state or len({*state, "ids", "values"}) < len(state) + 2:
                raise ValueError("the rank_context graph answers a state, of different names")
            outputs |= {"rank_context": {*state}, "rank_candidates": {"logit"}}
        for name, graph in self.graphs.items():
            behind = state if name == "rank_candidates" else ()
            if graph.inputs not in (("ids", *behind), ("ids", "values", *behind)):
                raise ValueError("a graph takes ids, or ids and values; rank_candidates the state behind them")
            if set(graph.outputs) != outputs[name]:
                raise ValueError(f"the {name} graph answers {', '.join(sorted(outputs[name]))}")
            for table in graph.tables.values():
                if table.file not in self.files or table.offset + table.length > self.files[table.file].length:
                    raise ValueError(f"a table of the {name} graph does not lie in a file of the bundle")
        parse_link(self.link)
        return self

    def predictions(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """link(logit), [B]: a probability for binary, a value for regression, the logit for ranking."""
        exact = logits.astype(np.float64)
        if self.link == "sigmoid":
            return np.exp(-np.logaddexp(0.0, -exact))
        low, high = parse_link(self.link)
        return np.clip(exact, low, high)


def parse_link(link: str) -> tuple[float, float]:
    """The range a link maps to: `identity`, `sigmoid` or `clip(lo, hi)`; anything else raises ValueError."""
    if link == "identity":
        return -math.inf, math.inf
    if link == "sigmoid":
        return 0.0, 1.0
    found = _CLIP.fullmatch(link)
    low, high = (float(found[1]), float(found[2])) if found else (math.nan, math.nan)
    if not low < high:
        raise ValueError("a link is identity, sigmoid or clip(lo, hi) with lo < hi")
    return low, high


def clip_link(low: float, high: float) -> str:
    return f"clip({float(low)!r}, {float(high)!r})"
