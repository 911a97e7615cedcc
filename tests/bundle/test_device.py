"""What a GPU is asked for, and what is said of it where there is none. Nothing here needs one."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bundle import RuntimeRefused, device
from bundle.device import Gpu


def test_tf32_and_cuda_graphs_are_off_unless_asked_for() -> None:
    off = {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "0"}
    assert device.providers("cuda", Gpu()) == [("CUDAExecutionProvider", off)]
    ((_, on),) = device.providers("cuda", Gpu(3, tf32=True, cuda_graphs=True))
    assert on == {"device_id": "3", "use_tf32": "1", "enable_cuda_graph": "1"}
    assert device.providers("cpu", Gpu(3)) == [("CPUExecutionProvider", {})]


def test_tensorrt_leaves_the_rest_to_cuda_and_keeps_what_it_built_where_it_is_told() -> None:
    names = [name for name, _ in device.providers("tensorrt", Gpu())]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    assert device.providers("tensorrt", Gpu(1))[0][1] == {"device_id": "1"}
    assert device.providers("tensorrt", Gpu(1, tensorrt_cache=Path("/cache")))[0][1] == {
        "device_id": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/cache",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "/cache",
    }
    with pytest.raises(RuntimeRefused, match="cuda_graphs is for provider = cuda"):
        device.providers("tensorrt", Gpu(cuda_graphs=True))


def test_tensorrt_is_kept_from_tf32_by_the_environment() -> None:
    assert device.environment("tensorrt", Gpu()) == {"NVIDIA_TF32_OVERRIDE": "0"}
    assert device.environment("tensorrt", Gpu(tf32=True)) == {}
    assert device.environment("cuda", Gpu()) == {}


def test_without_cuda_there_is_ordinary_memory_and_none_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cuda", lambda: None)
    assert device.memory(0) is None
    array = device.host_array((3, 2), np.dtype(np.float32))
    assert (array.shape, array.dtype, array.sum()) == ((3, 2), np.float32, 0)
    assert device.host_array((), np.dtype(np.float32)).shape == ()


class Cuda:
    """In the place of libcudart: 16 GiB of which 6 are free, and pinned memory that is counted."""

    def __init__(self) -> None:
        self.freed: list[int | None] = []
        self.failure = 0
        self.devices: list[int] = []
        self._kept: list[ctypes.Array[ctypes.c_char]] = []

    def cudaSetDevice(self, number: int) -> int:  # noqa: N802
        self.devices.append(number)
        return 0

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = 6 * 2**30, 16 * 2**30
        return 0

    def cudaHostAlloc(self, pointer: Any, size: ctypes.c_size_t, flags: int) -> int:  # noqa: N802
        self._kept.append((ctypes.c_char * size.value)(*b"\xff" * size.value))
        pointer._obj.value = ctypes.addressof(self._kept[-1])
        return 0

    def cudaMemcpy(self, target: Any, source: Any, size: ctypes.c_size_t, kind: int) -> int:  # noqa: N802
        assert kind == 2  # device to host
        ctypes.memmove(target, source, size.value)
        return self.failure

    def cudaFreeHost(self, pointer: ctypes.c_void_p) -> int:  # noqa: N802
        self.freed.append(pointer.value)
        return 0


def test_memory_is_told_of_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(device, "_cuda", lambda: cuda)
    assert device.memory(2) == {"used": 10 * 2**30, "total": 16 * 2**30}
    assert cuda.devices == [2]


def test_pinned_memory_is_zero_and_freed_with_the_last_view_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(device, "_cuda", lambda: cuda)
    array = device.host_array((4, 3), np.dtype(np.int64))
    address, view = array.ctypes.data, array[1:]
    assert (array.shape, array.sum()) == ((4, 3), 0)
    del array
    assert cuda.freed == []
    view[...] = 1
    del view
    assert cuda.freed == [address]


class Value:
    """In the place of an OrtValue on a GPU."""

    def __init__(self, held: NDArray[np.float32]) -> None:
        self._held = held

    def device_name(self) -> str:
        return "cuda"

    def data_ptr(self) -> int:
        return self._held.ctypes.data


def test_answers_are_read_from_the_device_and_a_failure_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(device, "_cuda", lambda: cuda)
    into = np.zeros(3, np.float32)
    device.read(Value(np.array([1, 2, 3], np.float32)), into)
    assert into.tolist() == [1, 2, 3]
    cuda.failure = 700
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        device.read(Value(into), np.zeros(3, np.float32))
