"""What a step of training must move through a GPU's memory, and how fast that memory is."""

import time

import torch
from peers.worker import ATTENTION, EMBEDDING_DIM, FEN, LAYER

NUMBER, ID = 4, 8  # bytes of a float32 and of an int64
COPIED = 2**28  # bytes of the tensor that is copied: no cache holds it
COPIES = 10


def parameters(model: str, *, fields: int, features: int) -> int:
    """The numbers that are trained: a bias, a weight and K factors for every feature, and what the model adds."""
    width = EMBEDDING_DIM
    added = {
        "fm": 0,
        "nfm": (width + 1) * LAYER + LAYER,
        "ifm": (fields * width + 1) * FEN + FEN * fields,
        "afm": (width + 1) * ATTENTION + ATTENTION + width,
    }
    return 1 + features * (width + 1) + added[model]


def step_bytes(model: str, *, batch: int, fields: int, features: int) -> int:
    """The bytes that a step of Adam over whole tables cannot do without, each array once in each direction.

    Ids and labels are read. Rows are looked up, and their gradients written and read again. A gradient of every
    parameter is written and read, parameter and two moments are read and written. What a model computes in between is
    left out: a kernel may keep it on the chip. So the memory is at least as busy as this says.
    """
    rows = batch * (fields * ID + NUMBER)
    looked_up = 3 * batch * fields * (EMBEDDING_DIM + 1) * NUMBER
    adam = (2 + 3 * 2) * parameters(model, fields=fields, features=features) * NUMBER
    return rows + looked_up + adam


def share_of_limit(rows_per_second: float, *, batch: int, step: int, bandwidth: float) -> float:
    """The bytes that these steps move over those that the memory could, both in a second."""
    return rows_per_second / batch * step / bandwidth


def copy_bandwidth(device: str, size: int = COPIED) -> float:
    """Bytes a second, those read and those written, of the fastest of some copies of `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(1 + COPIES):  # the first one warms up
        _wait_for(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size / min(seconds[1:])


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
