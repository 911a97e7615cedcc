"""FuxiCTR: nfm and afm out of its layers (the package comes without its models), trained by its `train_epoch`."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, InnerProductInteraction, LogisticRegression, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn
from worker import ATTENTION, EMBEDDING_DIM, L2, LAYER, LEARNING_RATE, Job, serve


class Fuxi(BaseModel):  # type: ignore[misc]
    def __init__(self, features: FeatureMap, job: Job, folder: str) -> None:
        regularizer = 2 * L2 / job.batch  # its own is lambda/2 ‖θ‖² beside the mean
        super().__init__(
            features,
            task="regression",
            gpu=0 if job.device == "cuda" else -1,
            embedding_regularizer=regularizer,
            verbose=0,
            model_root=folder,
            metrics=[],
        )
        self.embedding = FeatureEmbedding(features, EMBEDDING_DIM)
        self.linear = LogisticRegression(features, use_bias=True)
        self.interaction = self.interactions(features.num_fields)
        self.compile("adam", "mse_loss", LEARNING_RATE)
        self.reset_parameters()
        self.model_to_device()
        # `fit` would validate and save after every epoch; here no step is ever the one to do it after.
        self._eval_steps, self._total_steps, self._max_gradient_norm, self._stop_training = math.inf, 0, 10.0, False

    def interactions(self, fields: int) -> nn.Module:
        raise NotImplementedError

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        given = self.get_inputs(inputs)
        return {"y_pred": self.linear(given) + self.interaction(self.embedding(given))}


class NFM(Fuxi):
    def interactions(self, fields: int) -> nn.Module:
        pooling = InnerProductInteraction(fields, output="bi_interaction")
        return nn.Sequential(pooling, MLP_Block(EMBEDDING_DIM, [LAYER], output_dim=1))


class AFM(Fuxi):
    def interactions(self, fields: int) -> nn.Module:
        return Attentive(fields)


class Attentive(nn.Module):
    def __init__(self, fields: int) -> None:
        super().__init__()
        self.products = InnerProductInteraction(fields, output="elementwise_product")
        hidden = nn.Linear(EMBEDDING_DIM, ATTENTION)
        self.attention = nn.Sequential(hidden, nn.ReLU(), nn.Linear(ATTENTION, 1, bias=False), nn.Softmax(dim=1))
        self.p = nn.Linear(EMBEDDING_DIM, 1, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        products = self.products(embeddings)
        total: Tensor = self.p((self.attention(products) * products).sum(1))
        return total


def build(job: Job) -> Callable[[], object]:
    ids, labels, sizes = job.data()
    folder = tempfile.TemporaryDirectory()
    names = [f"f{at}" for at in range(len(sizes))]
    file = Path(folder.name) / "train.npz"
    np.savez(file, label=labels, **dict(zip(names, ids.T, strict=True)))
    features = FeatureMap("rows", folder.name)
    spec: list[dict[str, Any]] = [{"source": "", "type": "categorical", "vocab_size": size} for size in sizes]
    features.features.update(zip(names, spec, strict=True))
    features.labels = ["label"]
    features.num_fields = features.get_num_fields()
    features.set_column_index()
    rows, _ = RankDataLoader(
        features, stage="train", train_data=str(file), batch_size=job.batch, shuffle=True, num_workers=0
    )
    folder.cleanup()
    model = {"nfm": NFM, "afm": AFM}[job.model](features, job, folder.name)
    return lambda: model.train_epoch(rows)


serve(build)
