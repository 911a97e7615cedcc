"""A GPU: what graphs are asked to do on it, and what CUDA's own libraries say of it, which are never a dependency."""

import ctypes
import math
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from bundle.errors import RuntimeRefused

Provider = Literal["auto", "cuda", "tensorrt", "cpu"]
EXECUTION_PROVIDERS: Final = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_LOADED: list[ctypes.CDLL] = []
MAPS: Final = Path("/proc/self/maps")
FOR_ALL_CONTEXTS: Final = 1  # cudaHostAllocPortable
TO_HOST: Final = 2  # cudaMemcpyDeviceToHost


@dataclass(frozen=True)
class Gpu:
    """How graphs run on a GPU; on the CPU nothing of it matters.

    `number` is the device. `tf32` allows products of 10 bits of mantissa. `cuda_graphs` records a run of each batch
    size once and replays it. `tensorrt_cache` is a folder for engines and timings, which else are built at every load.
    """

    number: int = 0
    tf32: bool = False
    cuda_graphs: bool = False
    tensorrt_cache: Path | None = None


FIRST_GPU: Final = Gpu()


def providers(provider: str, gpu: Gpu) -> list[tuple[str, dict[str, str]]]:
    """What onnxruntime is to run a graph on, best first, each with its options. Raises RuntimeRefused."""
    if provider == "cpu":
        return [(EXECUTION_PROVIDERS["cpu"], {})]
    cuda = {"device_id": str(gpu.number), "use_tf32": _flag(gpu.tf32), "enable_cuda_graph": _flag(gpu.cuda_graphs)}
    if provider == "cuda":
        return [(EXECUTION_PROVIDERS["cuda"], cuda)]
    if gpu.cuda_graphs:
        raise RuntimeRefused("cuda_graphs is for provider = cuda; TensorRT records none here")
    tensorrt = {"device_id": str(gpu.number)}
    if gpu.tensorrt_cache is not None:
        folder = str(gpu.tensorrt_cache)
        tensorrt |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
        tensorrt |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}
    return [(EXECUTION_PROVIDERS["tensorrt"], tensorrt), (EXECUTION_PROVIDERS["cuda"], cuda)]


def place(gpu: Gpu) -> tuple[str, int]:
    """Where the tensors of a run are, as onnxruntime says it."""
    return "cuda", gpu.number


def environment(provider: str, gpu: Gpu) -> dict[str, str]:
    """Variables that have to be set before TensorRT is loaded: it has no option for TF32, which it uses unless told."""
    return {"NVIDIA_TF32_OVERRIDE": "0"} if provider == "tensorrt" and not gpu.tf32 else {}


def count() -> int:
    """The GPUs that this process may use; 0 where there is no driver. No context is made on any of them."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int(0)
    good = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0
    return found.value if good else 0


def memory(number: int) -> dict[str, int] | None:
    """Bytes of a GPU that a session of this process runs on: `used`, by whomever, and `total`."""
    cuda = _cuda()
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    if cuda is None or cuda.cudaSetDevice(number) or cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        return None
    return {"used": total.value - free.value, "total": total.value}


def use(number: int) -> None:
    """Let this thread's CUDA calls be for that GPU: they else make a context on the first one, of 350 MB and more."""
    if cuda := _cuda():
        cuda.cudaSetDevice(number)


def read(value: Any, into: NDArray[Any]) -> None:
    """Copy an OrtValue into an array of `host_array`. Raises RuntimeError where CUDA fails."""
    cuda = _cuda()
    if cuda is None or value.device_name() == "cpu":
        into[...] = value.numpy()
        return
    target, source = ctypes.c_void_p(into.ctypes.data), ctypes.c_void_p(value.data_ptr())
    if code := cuda.cudaMemcpy(target, source, ctypes.c_size_t(into.nbytes), TO_HOST):
        raise RuntimeError(f"CUDA error {code} while an answer was read")


def host_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that a GPU reads and writes without a copy on the way (pinned); ordinary ones where there is no CUDA."""
    size, cuda = math.prod(shape) * dtype.itemsize, _cuda()
    pointer = ctypes.c_void_p()
    if cuda is None or not size or cuda.cudaHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(size), FOR_ALL_CONTEXTS):
        return np.zeros(shape, dtype)
    assert pointer.value is not None
    held = (ctypes.c_char * size).from_address(pointer.value)
    weakref.finalize(held, cuda.cudaFreeHost, pointer).atexit = False  # a thread may still be at work then
    array: NDArray[Any] = np.frombuffer(memoryview(held), dtype).reshape(shape)
    array[...] = 0
    return array


def _cuda() -> ctypes.CDLL | None:
    """The CUDA runtime that onnxruntime has loaded, if it has; once found, it stays."""
    if not _LOADED:
        with suppress(OSError):
            mapped = {line.partition("/")[2] for line in MAPS.read_text().splitlines() if "libcudart.so" in line}
            _LOADED.extend(ctypes.CDLL(f"/{path}") for path in sorted(mapped))
    return _LOADED[0] if _LOADED else None


def _flag(value: bool) -> str:
    return str(int(value))
