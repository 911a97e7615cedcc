"""Which tensors a version takes and gives, and how the rows in them are encoded.

Either `ids` [B, S], with `values` [B, S] where the graph takes them; or any of the fields, raw: [B], or [B, n] with ''
behind the values of a row that has fewer than n.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundle import Categorical, EncodedRows, Encoder, InputError, Multi, Numeric
from bundle.rows import Column
from bundle.schema import FittedField
from bundle.values import LARGEST
from service.errors import BodyRefused, Refusal
from service.messages import check_count
from service.tensors import BYTES, DTYPES, Tensor
from service.texts import check_column

IDS, VALUES = "ids", "values"
INTEGERS: Final = tuple(name for name in DTYPES if "INT" in name)
FLOATS: Final = tuple(name for name in DTYPES if name.startswith("FP"))
NUMBER: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Spec(NamedTuple):
    """A tensor by name; `dims` are those behind the rows."""

    name: str
    datatype: str
    dims: tuple[int, ...]


OUTPUTS: Final = (Spec("prediction", "FP64", ()), Spec("logit", "FP32", ()))
OUTPUT_NAMES: Final = tuple(spec.name for spec in OUTPUTS)


class Signature:
    """The tensors of one version."""

    def __init__(self, encoder: Encoder) -> None:
        schema = encoder.schema
        self._encoder, self._fields = encoder, {field.name: field for field in schema.fields}
        self.graph = (IDS, VALUES) if schema.needs_values else (IDS,)
        sizes = [field.size for field in schema.fields]
        self._field_S = np.repeat(np.arange(len(sizes)), schema.widths)
        self._start_S = np.repeat(np.array(schema.starts), schema.widths)
        self._size_S = np.repeat(np.array(sizes, np.uint64), schema.widths)
        self._may_pad_S = np.ones(len(self._field_S), np.bool_)
        self._may_pad_S[[slots.start for slots in schema.slots]] = False

    @property
    def inputs(self) -> list[Spec]:
        """Every tensor it can take; no request has all of them."""
        slots = (len(self._field_S),)
        of_graph = [Spec(IDS, "INT64", slots), Spec(VALUES, "FP32", slots)][: len(self.graph)]
        return of_graph + [Spec(field.name, BYTES, (field.kind.width,)) for field in self._fields.values()]

    def encode(self, tensors: Mapping[str, Tensor], *, limit: int, longest: int | None = None) -> EncodedRows:
        """At most `limit` rows, of texts of at most `longest` letters. Raises BodyRefused and InputError."""
        ids = tensors.get(IDS)
        if ids is not None and (ids.datatype != BYTES or IDS not in self._fields):
            return self._of_ids(tensors, limit)
        columns: dict[str, Column] = {}
        for at, (name, tensor) in enumerate(tensors.items()):
            if name not in self._fields:
                known = ", ".join((*self.graph, *self._fields))
                raise BodyRefused(Refusal(key=f"inputs[{at}].name", expected=f"one of {known}", received="another"))
            check_count(tensor.shape[0], limit=limit, key=name)
            is_numeric = isinstance(self._fields[name].kind, Numeric)
            if longest is not None and isinstance(tensor.data, list) and not is_numeric:
                width = math.prod(tensor.shape[1:])
                _check_lengths(tensor.data, name, width=width, longest=longest)
            columns[name] = _column(self._fields[name], tensor)
        return self._encoder.columns(columns)

    def _of_ids(self, tensors: Mapping[str, Tensor], limit: int) -> EncodedRows:
        if set(tensors) != set(self.graph):
            names = " and ".join(self.graph)
            raise BodyRefused(Refusal(key="inputs", expected=f"{names} alone, or fields alone", received="others"))
        ids = self._matrix(tensors[IDS], IDS, "INT64")
        check_count(len(ids), limit=limit, key=IDS)
        is_padding = (ids == 0) & self._may_pad_S
        distance = ids - self._start_S  # below the first id it is negative, and very large without a sign
        self._check((distance.view(np.uint64) < self._size_S) | is_padding, IDS, self._id_expected)
        if VALUES not in tensors:
            return EncodedRows(ids, np.ones(ids.shape, np.float32))
        values = self._matrix(tensors[VALUES], VALUES, "FP32")
        if len(values) != len(ids):
            raise BodyRefused(Refusal(key=VALUES, expected=f"{len(ids)} rows, as ids", received=f"{len(values)} rows"))
        with np.errstate(invalid="ignore"):
            fits = (np.abs(values) <= LARGEST) & (~is_padding | (values == 0))
        self._check(fits, VALUES, lambda _: f"a number from -{LARGEST:g} to {LARGEST:g}, 0 where the id is 0")
        return EncodedRows(ids, values)

    def _matrix(self, tensor: Tensor, name: str, datatype: str) -> NDArray[Any]:
        """[B, S] of exactly this type."""
        slots = len(self._field_S)
        if not isinstance(tensor.data, np.ndarray) or tensor.datatype != datatype:
            raise BodyRefused(Refusal(key=name, expected=f"the datatype {datatype}", received="another"))
        if tensor.shape[1:] != (slots,):
            expected = f"the shape [rows, {slots}]: a slot for each field, max_len of them where it is multi-valued"
            raise BodyRefused(Refusal(key=name, expected=expected, received="another shape"))
        return tensor.data.reshape(tensor.shape)

    def _check(self, fits: NDArray[np.bool_], name: str, expected: Callable[[int], str]) -> None:
        if fits.all():
            return
        row, slot = np.argwhere(~fits)[0].tolist()
        field = list(self._fields)[self._field_S[slot]]
        refusal = Refusal(key=name, instance=row, field=field, expected=expected(slot), received="another number")
        raise BodyRefused(refusal)

    def _id_expected(self, slot: int) -> str:
        start, padded = int(self._start_S[slot]), ", or 0" if self._may_pad_S[slot] else ""
        return f"an id from {start} to {start + int(self._size_S[slot]) - 1}{padded}"


def _column(field: FittedField, tensor: Tensor) -> Column:
    """The raw values of one field."""
    width = math.prod(tensor.shape[1:])
    if isinstance(field.kind, Multi):
        texts = _data(field, tensor, (BYTES,))
        return [_unpadded(texts[at : at + width]) for at in range(0, len(texts), width)]
    if width != 1:
        raise _refused(field, "the shape [rows] or [rows, 1]", "another shape")
    if isinstance(field.kind, Categorical):
        values: Column = _data(field, tensor, (BYTES, "BOOL", *INTEGERS))
        return values
    numbers = _data(field, tensor, (BYTES, *INTEGERS, *FLOATS))
    if isinstance(numbers, np.ndarray):
        return numbers.astype(np.float64)
    return [_number(text, field, at) for at, text in enumerate(numbers)]


def _check_lengths(values: Sequence[str | None], field: str, *, width: int, longest: int) -> None:
    try:
        check_column(values, field, longest=longest)
    except InputError as error:
        raise error.at(instance=(error.instance or 0) // width) from None


def _data(field: FittedField, tensor: Tensor, datatypes: tuple[str, ...]) -> Any:
    if tensor.datatype not in datatypes:
        raise _refused(field, f"a datatype of {', '.join(datatypes)}", "another")
    return tensor.data


def _unpadded(texts: list[str | None]) -> list[str | None]:
    end = len(texts)
    while end and not texts[end - 1]:
        end -= 1
    return texts[:end]


def _number(text: str | None, field: FittedField, at: int) -> float | None:
    """A number that was sent as text; '' is missing, as in a file."""
    if not text:
        return None
    if not NUMBER.fullmatch(text):
        raise InputError(expected="a number in decimal, or ''", received="another text", field=field.name, instance=at)
    return float(text)


def _refused(field: FittedField, expected: str, received: str) -> BodyRefused:
    return BodyRefused(Refusal(key="inputs", field=field.name, expected=expected, received=received))
