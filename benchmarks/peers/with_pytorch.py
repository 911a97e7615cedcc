"""Plain PyTorch, as a careful reader of the papers would write it: one table of weights and embeddings, formulas as
they are printed, slices of a shuffled tensor in place of a DataLoader, the fused Adam."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from worker import ATTENTION, EMBEDDING_DIM, FEN, L2, LAYER, LEARNING_RATE, Job, serve


class Plain(nn.Module):
    """A bias, and for every feature a row of K factors and one weight."""

    def __init__(self, features: int, fields: int) -> None:
        super().__init__()
        self.fields = fields
        self.bias = nn.Parameter(torch.zeros(()))
        self.table = nn.Embedding(features, EMBEDDING_DIM + 1)
        nn.init.normal_(self.table.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return self.bias + self.terms(rows[..., :-1], rows[..., -1])

    def terms(self, factors: Tensor, weights: Tensor) -> Tensor:
        return weights.sum(1) + bi_interaction(factors).sum(1)


class PlainNFM(Plain):
    def __init__(self, features: int, fields: int) -> None:
        super().__init__(features, fields)
        self.network = nn.Sequential(nn.Linear(EMBEDDING_DIM, LAYER), nn.ReLU(), nn.Linear(LAYER, 1, bias=False))

    def terms(self, factors: Tensor, weights: Tensor) -> Tensor:
        network: Tensor = self.network(bi_interaction(factors))
        return weights.sum(1) + network.squeeze(1)


class PlainIFM(Plain):
    def __init__(self, features: int, fields: int) -> None:
        super().__init__(features, fields)
        wide = nn.Linear(fields * EMBEDDING_DIM, FEN)
        self.fen = nn.Sequential(wide, nn.ReLU(), nn.Linear(FEN, fields, bias=False), nn.Softmax(1))

    def terms(self, factors: Tensor, weights: Tensor) -> Tensor:
        m = self.fields * self.fen(factors.flatten(1))
        return super().terms(factors * m.unsqueeze(2), weights * m)


class PlainAFM(Plain):
    def __init__(self, features: int, fields: int) -> None:
        super().__init__(features, fields)
        self.first, self.second = torch.triu_indices(fields, fields, offset=1)
        hidden = nn.Linear(EMBEDDING_DIM, ATTENTION)
        self.attention = nn.Sequential(hidden, nn.ReLU(), nn.Linear(ATTENTION, 1, bias=False), nn.Softmax(1))
        self.p = nn.Linear(EMBEDDING_DIM, 1, bias=False)

    def terms(self, factors: Tensor, weights: Tensor) -> Tensor:
        products = factors[:, self.first] * factors[:, self.second]
        pooled = (self.attention(products) * products).sum(1)
        total: Tensor = self.p(pooled)
        return weights.sum(1) + total.squeeze(1)


MODELS = {"fm": Plain, "nfm": PlainNFM, "ifm": PlainIFM, "afm": PlainAFM}


def bi_interaction(factors: Tensor) -> Tensor:
    return 0.5 * (factors.sum(1).square() - factors.square().sum(1))


def build(job: Job) -> Callable[[], object]:
    ids, labels, sizes = job.data()
    starts = np.cumsum([0, *sizes[:-1]])
    all_ids, all_labels = torch.from_numpy(ids + starts).to(job.device), torch.from_numpy(labels).to(job.device)
    model = MODELS[job.model](sum(sizes), len(sizes)).to(job.device)
    others = [parameter for name, parameter in model.named_parameters() if name != "table.weight"]
    groups: list[dict[str, Any]] = [
        {"params": [model.table.weight], "weight_decay": 2 * L2 / job.batch},
        {"params": others},
    ]
    optimizer = torch.optim.Adam(groups, lr=LEARNING_RATE, fused=True)

    def epoch() -> None:
        for at in torch.split(torch.randperm(len(all_labels), device=job.device), job.batch):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(all_ids[at]), all_labels[at])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return epoch


serve(build)
