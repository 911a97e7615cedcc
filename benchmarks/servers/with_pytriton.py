"""PyTriton: Triton, with a model in Python. `python with_pytriton.py <port> <bundle>`

`/v2/models/model/infer` takes a BYTES tensor [B, 1] for each field, `/v2/models/ids/infer` a tensor `ids` [B, F].
Triton's own batching joins what waits.
"""

import socket
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from scorer import Scorer

MAX_ROWS = 4096
scorer = Scorer(sys.argv[2])


@batch  # type: ignore[untyped-decorator]
def columns(**tensors: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    texts = {name: [value.decode() for value in tensor[:, 0].tolist()] for name, tensor in tensors.items()}
    return {"predictions": np.array(scorer.columns(texts))[:, None]}


@batch  # type: ignore[untyped-decorator]
def ids(ids: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    return {"predictions": np.array(scorer.ids(ids))[:, None]}


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


config = TritonConfig(
    http_address="127.0.0.1", http_port=int(sys.argv[1]), grpc_port=_free(), metrics_port=_free(), log_verbose=0
)
answers = [Tensor(name="predictions", dtype=np.float64, shape=(1,))]
with Triton(config=config) as triton:
    fields = [Tensor(name=name, dtype=bytes, shape=(1,)) for name in scorer.names]
    row = [Tensor(name="ids", dtype=np.int64, shape=(len(scorer.names),))]
    limit = ModelConfig(max_batch_size=MAX_ROWS)
    triton.bind(model_name="model", infer_func=columns, inputs=fields, outputs=answers, config=limit)
    triton.bind(model_name="ids", infer_func=ids, inputs=row, outputs=answers, config=limit)
    triton.serve()
