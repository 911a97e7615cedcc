"""DeepCTR-Torch: its models as its documentation builds them, its `fit` without metrics."""

from collections.abc import Callable

import torch
from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import AFM, IFM, NFM
from worker import ATTENTION, EMBEDDING_DIM, FEN, L2, LAYER, LEARNING_RATE, Job, serve


def build(job: Job) -> Callable[[], object]:
    ids, labels, sizes = job.data()
    columns = [SparseFeat(f"f{at}", size, EMBEDDING_DIM) for at, size in enumerate(sizes)]
    options = {"task": "regression", "l2_reg_linear": L2, "l2_reg_embedding": L2, "device": job.device}
    match job.model:
        case "nfm":
            model = NFM(columns, columns, dnn_hidden_units=(LAYER,), **options)
        case "ifm":
            model = IFM(columns, columns, dnn_hidden_units=(FEN,), **options)
        case _:
            model = AFM(columns, columns, attention_factor=ATTENTION, **options)
    model.compile(torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), "mse")
    inputs = {f"f{at}": ids[:, at] for at in range(len(sizes))}
    return lambda: model.fit(inputs, labels[:, None], batch_size=job.batch, epochs=1, verbose=0)


serve(build)
