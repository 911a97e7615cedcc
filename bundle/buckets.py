"""Runs on a device by IO binding: rows are padded to a power of two, and each such size keeps its buffers."""

from collections.abc import Mapping
from threading import Lock
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundle import device

LARGEST: Final = 2**16  # rows; more are run in turn
BY_ROW: Final = ("ids", "values")
DTYPES: Final[dict[str, np.dtype[Any]]] = {"tensor(int64)": np.dtype(np.int64), "tensor(float)": np.dtype(np.float32)}
_RECORDING = Lock()  # no other work may reach the GPU while a CUDA graph is recorded


class Buckets:
    """A session of onnxruntime (`ort`) on `place`, such as ("cuda", 0). Safe to call from many threads.

    Padding is of id 0 and value 0, as in the slots of a row, and its answers are cut off. `limit` is the id that all
    ids have to be below: CUDA answers zeros for one that is not. With `recorded`, a run of each size is a CUDA graph.
    """

    def __init__(
        self, ort: Any, session: Any, *, place: tuple[str, int], limit: int | None = None, recorded: bool = False
    ) -> None:
        self._ort, self._session, self._place, self._limit = ort, session, place, limit
        self._recorded, self._lock = recorded, _RECORDING if recorded else Lock()
        self._buckets: dict[int, _Bucket] = {}

    def run(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name, for the rows of `ids`. Raises ValueError for an id out of range."""
        ids = given["ids"]
        if self._limit is not None and ids.size and not 0 <= ids.min() <= ids.max() < self._limit:
            raise ValueError(f"an id is not in 0…{self._limit - 1}")
        if len(ids) <= LARGEST:
            return self._run(given)
        parts = [self._run(_cut(given, slice(at, at + LARGEST))) for at in range(0, len(ids), LARGEST)]
        return {name: np.concatenate([part[name] for part in parts]) if a.ndim else a for name, a in parts[0].items()}

    def _run(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        rows = size_of(len(given["ids"]))
        with self._lock:
            device.use(self._place[1])
            if rows not in self._buckets:
                self._buckets[rows] = _Bucket(self._ort, self._session, rows, self._place, recorded=self._recorded)
            return self._buckets[rows].run(given)


def size_of(rows: int) -> int:
    """The least power of two that holds so many rows."""
    return 1 << max(rows - 1, 0).bit_length()


def sizes(most: int) -> list[int]:
    """Every bucket that runs of up to `most` rows use."""
    return [1 << power for power in range(size_of(most).bit_length())]


class _Port(NamedTuple):
    """An input or output of a size: on this side `host`, on the device `value`. With `by_row` it is [B, …]."""

    name: str
    by_row: bool
    host: NDArray[Any]
    value: Any


class _Bucket:
    """The buffers of one size, bound once. Recorded graphs need that: a replay reads and writes the same addresses."""

    def __init__(self, ort: Any, session: Any, rows: int, place: tuple[str, int], *, recorded: bool) -> None:
        self._ort, self._session, self._rows, self._place = ort, session, rows, place
        self._binding, self._options = session.io_binding(), ort.RunOptions()
        if recorded:
            self._options.add_run_config_entry("gpu_graph_id", str(rows))
        self._inputs = [self._port(each) for each in session.get_inputs()]
        self._outputs = [self._port(each) for each in session.get_outputs()]
        for port in self._inputs:
            self._binding.bind_ortvalue_input(port.name, port.value)
        for port in self._outputs:
            self._binding.bind_ortvalue_output(port.name, port.value)

    def _port(self, tensor: Any) -> _Port:
        by_row = any(isinstance(size, str) for size in tensor.shape[:1])
        shape, dtype = (self._rows, *tensor.shape[1:]) if by_row else tuple(tensor.shape), DTYPES[tensor.type]
        host = device.host_array(shape, dtype)
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, *self._place)
        return _Port(tensor.name, by_row, host, value)

    def run(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """For at most as many rows as the bucket has."""
        rows = len(given["ids"])
        for port in self._inputs:
            if port.by_row:
                port.host[:rows], port.host[rows:] = given[port.name], 0
            else:
                port.host[...] = given[port.name]
            port.value.update_inplace(port.host)
        self._session.run_with_iobinding(self._binding, self._options)
        for port in self._outputs:
            device.read(port.value, port.host)
        return {port.name: (port.host[:rows] if port.by_row else port.host).copy() for port in self._outputs}


def _cut(given: Mapping[str, NDArray[Any]], rows: slice) -> dict[str, NDArray[Any]]:
    return {name: array[rows] if name in BY_ROW else array for name, array in given.items()}
