"""Tensors as the Open Inference Protocol sends them: in JSON, or as binary data behind it. Knows no model.

A body is JSON, and behind it, in the order of the tensors, the bytes of those that have a `binary_data_size`.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from service import places
from service.errors import BodyRefused, BodyUnreadable, Refusal
from service.nesting import check_depth
from service.oip_messages import InferAnswer, InferRequest, InputTensor, OutputTensor, RequestedOutput

DTYPES: Final = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
BYTES: Final = "BYTES"
BINARY_ONLY: Final = "FP16"
LENGTH: Final = struct.Struct("<I")  # stands before each element of a BYTES tensor
DIMENSIONS: Final = 2
LARGEST: Final = 2**31 - 1  # of a dimension
RESERVED: Final = "triton_"

Data = NDArray[Any] | list[str | None]


class _Tensor(InputTensor, forbid_unknown_fields=True):
    """Without keys that would be skipped, however deep they are."""


class _Output(RequestedOutput, forbid_unknown_fields=True):
    pass


class _Request(InferRequest, forbid_unknown_fields=True):
    inputs: Annotated[list[_Tensor], Meta(min_length=1)]  # type: ignore[assignment]
    outputs: list[_Output] | None = None  # type: ignore[assignment]


_strict, _lenient = msgspec.json.Decoder(_Request), msgspec.json.Decoder(InferRequest)


class Tensor(NamedTuple):
    """One input: `data` is row-major and flat; of BYTES a list of texts, of anything else an array."""

    datatype: str
    shape: tuple[int, ...]
    data: Data


class Asked(NamedTuple):
    """A request for tensors. `outputs` names those to answer, in order, each with whether as binary data."""

    id: str | None
    inputs: dict[str, Tensor]
    outputs: dict[str, bool]


class Answered(NamedTuple):
    """A body, and the length of its JSON where binary data stands behind it."""

    content: bytes
    header_length: int | None


def read(body: bytes, *, header_length: int | None, outputs: Sequence[str]) -> Asked:
    """A request by its body, whose JSON ends at `header_length` (None: it is all JSON); `outputs` are all there are.

    Raises BodyUnreadable where the JSON is none or of another shape, BodyRefused for what it says.
    """
    if header_length is not None and header_length > len(body):
        raise BodyUnreadable(f"Inference-Header-Content-Length is more than the body's {len(body)} bytes")
    request = _decoded(body if header_length is None else body[:header_length])
    _check_parameters(request.parameters, reserved=RESERVED)
    binary = memoryview(b"") if header_length is None else memoryview(body)[header_length:]
    return Asked(request.id, _inputs(request.inputs, binary), _requested(request, outputs))


def raw(body: bytes, *, name: str, datatype: str, outputs: Sequence[str]) -> Asked:
    """A request that is the bytes of one tensor with one row, and is answered in binary: header length 0."""
    dtype = np.dtype(DTYPES[datatype])
    if len(body) % dtype.itemsize:
        raise _refused(name, f"whole {datatype} numbers", f"{len(body)} bytes")
    data = np.frombuffer(body, dtype)
    return Asked(None, {name: Tensor(datatype, (1, len(data)), data)}, dict.fromkeys(outputs, True))


def write(answer: InferAnswer, outputs: Mapping[str, NDArray[Any]], asked: Mapping[str, bool]) -> Answered:
    """The answer with these outputs in it, in the order in which they were asked for."""
    binary: list[bytes] = []
    for name, is_binary in asked.items():
        array = outputs[name]
        tensor = OutputTensor(name=name, datatype=datatype_of(array), shape=list(array.shape))
        if is_binary:
            binary.append(np.ascontiguousarray(array, DTYPES[tensor.datatype]).tobytes())
            tensor.parameters = {"binary_data_size": len(binary[-1])}
        else:
            tensor.data = array.ravel().tolist()
        answer.outputs.append(tensor)
    head = msgspec.json.encode(answer)
    return Answered(b"".join((head, *binary)), len(head) if binary else None)


def datatype_of(array: NDArray[Any]) -> str:
    return f"FP{8 * array.dtype.itemsize}"


def _decoded(head: bytes) -> InferRequest:
    try:
        request: InferRequest = _strict.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        request = _decoded_with_care(head)
    if head.count(b":") != _keys(request):  # else each is there once, as in `decoder`
        places.check_unique(head, _place)
    return request


def _decoded_with_care(head: bytes) -> InferRequest:
    """The same where keys are to be skipped, or the refusal."""
    check_depth(head)
    try:
        return _lenient.decode(head)
    except msgspec.ValidationError as error:  # it names types and places, and no content
        raise BodyUnreadable(f"the JSON is no request for tensors: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = (
            "the body is cut off or has something that JSON has not; binary data needs Inference-Header-Content-Length"
        )
        raise places.unreadable(head, said, _place) from None


def _keys(request: InferRequest) -> int:
    """How many keys it takes at least to write a request."""
    keys = 1 + (request.id is not None) + (request.outputs is not None)
    for tensor in request.inputs:
        keys += 3 + (tensor.data is not None)
    for each in (request, *request.inputs, *(request.outputs or ())):
        keys += bool(each.parameters) + len(each.parameters)
    return keys + len(request.outputs or ())


def _place(path: places.Path) -> places.Place:
    """`inputs[1].data`, with the position in it."""
    match path:
        case (("inputs" | "outputs") as key, int(at), ("name" | "datatype" | "shape" | "parameters") as part, *_):
            return places.Place(f"{key}[{at}].{part}")
        case ("inputs", int(at), "data", *within):
            row = within[0] if within else None
            return places.Place(f"inputs[{at}].data", row if isinstance(row, int) else None)
        case (("inputs" | "outputs") as key, int(at), *_):
            return places.Place(f"{key}[{at}]")
        case (("inputs" | "outputs" | "id" | "parameters") as key, *_):
            return places.Place(key)
    return places.Place()


def _inputs(tensors: Sequence[InputTensor], binary: memoryview) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    for at, tensor in enumerate(tensors):
        place = f"inputs[{at}]"
        if tensor.name in read:
            raise _refused(place, "tensors of different names", "a name that was there before")
        data, binary = _input(tensor, place, binary)
        read[tensor.name] = Tensor(tensor.datatype, tuple(tensor.shape), data)
    if len(binary):
        raise _refused("inputs", "binary data of the sizes given", f"{len(binary)} bytes more")
    return read


def _input(tensor: InputTensor, place: str, binary: memoryview) -> tuple[Data, memoryview]:
    """The data of a tensor, and the binary data left for those behind it."""
    if tensor.datatype != BYTES and tensor.datatype not in DTYPES:
        raise _refused(f"{place}.datatype", f"one of {', '.join((*DTYPES, BYTES))}", "another text")
    if not 1 <= len(tensor.shape) <= DIMENSIONS or min(tensor.shape) < 1 or max(tensor.shape) > LARGEST:
        raise _refused(f"{place}.shape", f"1 to {DIMENSIONS} dimensions of 1 to {LARGEST}", "another shape")
    _check_parameters(tensor.parameters, refused=("shared_memory_region",))
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if tensor.data is None:
            raise _refused(place, "data, or the parameter binary_data_size", "neither")
        return _of_json(tensor, tensor.data, place), binary
    if tensor.data is not None:
        raise _refused(place, "data, or the parameter binary_data_size", "both")
    if type(size) is not int or not 0 <= size <= len(binary):
        raise _refused(f"{place}.parameters", f"a binary_data_size of 0 to {len(binary)} bytes", "another value")
    return _of_binary(tensor, binary[:size], place), binary[size:]


def _of_binary(tensor: InputTensor, binary: memoryview, place: str) -> Data:
    count = math.prod(tensor.shape)
    if tensor.datatype == BYTES:
        return _texts(binary, count, place)
    dtype = np.dtype(DTYPES[tensor.datatype])
    if len(binary) != count * dtype.itemsize:
        raise _refused(place, f"{count * dtype.itemsize} bytes for its shape and datatype", f"{len(binary)} bytes")
    return np.frombuffer(binary, dtype)


def _texts(binary: memoryview, count: int, place: str) -> list[str | None]:
    texts: list[str | None] = []
    whole, unpack, start = bytes(binary), LENGTH.unpack_from, 0
    try:
        while start < len(whole) and len(texts) < count:
            (length,) = unpack(whole, start)
            end = start + LENGTH.size + length
            texts.append(whole[start + LENGTH.size : end].decode())
            start = end
    except struct.error:
        raise _refused(place, "a length of 4 bytes before each element", "fewer bytes") from None
    except UnicodeDecodeError:
        raise _refused(place, "text in UTF-8", "other bytes", instance=len(texts)) from None
    if len(texts) != count or start != len(whole):
        raise _refused(place, f"{count} elements for its shape", "more or fewer bytes than they have")
    return texts


def _of_json(tensor: InputTensor, data: list[Any], place: str) -> Data:
    flat = _flat(data, tensor.shape, place)
    if tensor.datatype == BYTES:
        _check_types(flat, {str, type(None)}, "strings", place)
        return flat
    if tensor.datatype == BINARY_ONLY:
        raise _refused(f"{place}.data", f"{BINARY_ONLY} as binary data", "an array")
    if tensor.datatype == "BOOL":
        _check_types(flat, {bool}, "booleans", place)
    elif tensor.datatype.startswith("FP"):
        _check_types(flat, {int, float}, "numbers", place)
    else:
        _check_types(flat, {int}, "integers", place)
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused where it is used
            return np.array(flat, DTYPES[tensor.datatype])
    except OverflowError:
        raise _refused(f"{place}.data", f"numbers that {tensor.datatype} can hold", "another") from None


def _flat(data: list[Any], shape: Sequence[int], place: str) -> list[Any]:
    """The elements of an array that is flat already, or nested as its shape says."""
    if data and isinstance(data[0], list):
        widths = {len(row) if isinstance(row, list) else None for row in data}
        if (len(data), widths) != (shape[0], set(shape[1:])):
            raise _refused(f"{place}.data", "an array nested as the shape says, or flat", "another array")
        return list(chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise _refused(f"{place}.data", f"{math.prod(shape)} elements for its shape", f"{len(data)} elements")
    return data


def _check_types(flat: list[Any], types: set[type], named: str, place: str) -> None:
    if not set(map(type, flat)) <= types:
        at = next(at for at, value in enumerate(flat) if type(value) not in types)
        raise _refused(f"{place}.data", named, "another type", instance=at)


def _requested(request: InferRequest, outputs: Sequence[str]) -> dict[str, bool]:
    binary = request.parameters.get("binary_data_output", False)
    if not request.outputs:
        return dict.fromkeys(outputs, _is_set(binary, "parameters.binary_data_output"))
    return dict(_output(each, f"outputs[{at}]", outputs, binary) for at, each in enumerate(request.outputs))


def _output(asked: RequestedOutput, place: str, outputs: Sequence[str], binary: object) -> tuple[str, bool]:
    if asked.name not in outputs:
        raise _refused(f"{place}.name", f"one of {', '.join(outputs)}", "another text")
    _check_parameters(asked.parameters, refused=("classification", "shared_memory_region"))
    is_binary = asked.parameters.get("binary_data", binary)
    return asked.name, _is_set(is_binary, f"{place}.parameters.binary_data")


def _is_set(value: object, place: str) -> bool:
    if not isinstance(value, bool):
        raise _refused(place, "a boolean", "another type")
    return value


def _check_parameters(given: Mapping[str, object], *, refused: Sequence[str] = (), reserved: str | None = None) -> None:
    for name in refused:
        if name in given:
            raise _refused("parameters", f"no {name}: this server does not offer it", "the parameter")
    if reserved and any(name.startswith(reserved) for name in given):
        raise _refused("parameters", f"no name that starts with {reserved}, which is reserved", "such a name")


def _refused(place: str, expected: str, received: str, *, instance: int | None = None) -> BodyRefused:
    return BodyRefused(Refusal(key=place, instance=instance, expected=expected, received=received))
