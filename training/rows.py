"""Row-wise updates: a step touches the rows of the tables that its batch looks up, and costs the same for any table."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models import Model
from training.lookup import RowGradient
from training.optim import ADAGRAD_START
from training.recipe import Fit

# Numbers in all tables from which moving rows is cheaper than sweeping the tables, where a batch can look up at most a
# quarter of the rows: nfm on Frappe, K = 256, batch 128, is 12 % faster with 1.4 million.
FASTER, LARGE = 1_000_000, 16_000_000
SPARSE = 4
ADAGRAD_EPS, ADAM_EPS = 1e-10, 1e-8  # PyTorch's
BETA_1, BETA_2 = 0.9, 0.999


def rows_pay(model: Model, lambdas: Mapping[str, float], settings: Fit) -> bool:
    """Whether to update row by row: as `fit.lazy` says, else where it is faster.

    For Adam and for tables with a penalty rows are not the same as whole tables, and only large tables, which cannot
    be swept at every step, are updated so. An average sweeps the tables anyway.
    """
    if settings.lazy is not None:
        return settings.lazy
    numbers = sum(table.numel() for table in model.tables.values())
    same = settings.optimizer == "adagrad" and not any(lambdas[name] for name in model.tables)
    looked_up = settings.batch_size * model.layout.slots
    sparse = model.layout.num_features >= SPARSE * looked_up
    return not settings.average and sparse and numbers >= (FASTER if same else LARGE)


class RowOptimizer:
    """Adagrad or Adam on the rows of a batch.

    Rows that are not looked up do not change. For Adagrad without a penalty they would not change anyway, and the
    weights are those of the dense update. A penalty is added to the gradient of the batch's rows only. Adam's moments
    rest with their row, and its bias correction counts the steps of that row: each row sees the Adam of its own
    gradients, as if the steps in between had not been.
    """

    def __init__(self, tables: Mapping[str, Tensor], lambdas: Mapping[str, float], settings: Fit) -> None:
        self._tables = {name: table.detach() for name, table in tables.items()}
        self._lambdas, self._adam = lambdas, settings.optimizer == "adam"
        self.state: dict[str, Tensor] = {}  # a row for every feature, as in the tables
        for name, table in self._tables.items():
            if self._adam:  # mean, square and steps in one row: they are fetched together
                self.state[f"{name}.moments"] = table.new_zeros(len(table), 2 * table.shape[1] + 1)
            else:
                self.state[f"{name}.sum"] = torch.full_like(table, ADAGRAD_START)

    def step(self, gradients: Mapping[str, list[RowGradient]], learning_rate: float) -> None:
        """Update the rows that have a gradient; one of several lookups gets the sum of its gradients."""
        for name, found in gradients.items():
            if not found:
                continue
            ids_U, row_UK, gradient_UK = found[0] if len(found) == 1 else self._merged(name, found)
            if penalty := self._lambdas[name]:
                gradient_UK.add_(row_UK, alpha=penalty)
            update = self._adam_step if self._adam else self._adagrad_step
            update(name, ids_U, row_UK, gradient_UK, learning_rate)
            self._tables[name].index_copy_(0, ids_U, row_UK)

    def _adagrad_step(
        self, name: str, ids_U: Tensor, row_UK: Tensor, gradient_UK: Tensor, learning_rate: float
    ) -> None:
        sums_NK = self.state[f"{name}.sum"]
        sum_UK = sums_NK.index_select(0, ids_U).addcmul_(gradient_UK, gradient_UK)
        sums_NK.index_copy_(0, ids_U, sum_UK)
        row_UK.addcdiv_(gradient_UK, sum_UK.sqrt_().add_(ADAGRAD_EPS), value=-learning_rate)

    def _adam_step(self, name: str, ids_U: Tensor, row_UK: Tensor, gradient_UK: Tensor, learning_rate: float) -> None:
        moments = self.state[f"{name}.moments"]
        found = moments.index_select(0, ids_U)
        mean_UK, square_UK, step_U1 = torch.split(found, [row_UK.shape[1], row_UK.shape[1], 1], dim=1)
        mean_UK.lerp_(gradient_UK, 1 - BETA_1)
        square_UK.mul_(BETA_2).addcmul_(gradient_UK, gradient_UK, value=1 - BETA_2)
        step_U1.add_(1)
        moments.index_copy_(0, ids_U, found)
        deviation_UK = square_UK.div_(1 - BETA_2**step_U1).sqrt_().add_(ADAM_EPS)
        row_UK.addcdiv_(mean_UK.div_(1 - BETA_1**step_U1), deviation_UK, value=-learning_rate)

    def _merged(self, name: str, found: list[RowGradient]) -> RowGradient:
        ids_U, place = torch.unique(torch.cat([lookup.ids for lookup in found]), return_inverse=True)
        row_UK = self._tables[name].index_select(0, ids_U)
        gradients = torch.cat([lookup.gradients for lookup in found])
        return RowGradient(ids_U, row_UK, torch.zeros_like(row_UK).index_add_(0, place, gradients))
