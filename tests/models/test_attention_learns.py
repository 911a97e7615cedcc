"""AFM's attention tells pairs apart. In the authors' released code every weight is 1, whatever is learnt."""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from models import MODELS, Layout, Model

FIELDS, VALUES = 6, 8
PLANTED = [(0, 3), (1, 4)]
LAYOUT = Layout(num_features=1 + FIELDS * VALUES, widths=(1,) * FIELDS, needs_values=False)


def test_attention_tells_pairs_apart_and_contributions_find_the_planted_ones() -> None:
    torch.manual_seed(3)
    ids_BF, labels_B = planted_log(rows=8192)
    model = MODELS["afm"](LAYOUT, MODELS["afm"].Config(embedding_dim=16, attention_dim=16, dropout=0.3))
    assert contrast(model, ids_BF) < 1.05
    train(model, ids_BF, labels_B, epochs=12)
    assert contrast(model, ids_BF) > 1.5
    # By contribution, not by attention: without noise embeddings alone can fit, and attention is only a size.
    with torch.no_grad():
        strength_P = model.eval().explain(ids_BF).terms.pair.abs().mean(0)
    strongest = strength_P.topk(len(PLANTED)).indices.tolist()
    assert sorted(LAYOUT.pairs[pair] for pair in strongest) == PLANTED


@torch.no_grad()
def contrast(model: Model, ids_BF: Tensor) -> float:
    """The largest attention of a row over its smallest, on average."""
    attention_BP = model.eval().explain(ids_BF).sizes["attention"]
    return (attention_BP.amax(1) / attention_BP.amin(1)).mean().item()


def planted_log(*, rows: int) -> tuple[Tensor, Tensor]:
    """Rows drawn at random whose label is ±1 per planted pair of values, and nothing of single fields."""
    values_BF = torch.randint(VALUES, (rows, FIELDS))
    labels_B = torch.zeros(rows)
    for f, g in PLANTED:
        sign = torch.randint(2, (VALUES, VALUES)) * 2.0 - 1
        labels_B += sign[values_BF[:, f], values_BF[:, g]]
    return 1 + values_BF + VALUES * torch.arange(FIELDS), labels_B


def train(model: Model, ids_BF: Tensor, labels_B: Tensor, *, epochs: int) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels_B)).split(256):
            optimizer.zero_grad()
            mse_loss(model(ids_BF[batch]), labels_B[batch]).backward()
            optimizer.step()
