"""Where held-out items stand among all items: the metrics of a ranking, over the full catalogue."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bundle import EncodedRows
from training.catalogue import Catalogue, Integers
from training.dataset import Dataset
from training.metrics import ranking_metrics
from training.progress import bar

Scorer = Callable[[Tensor, Tensor | None], Tensor]  # logits [B] of ids and values
SCORED_ROWS = 4096  # in one call of a scorer
CELLS = 1 << 16  # of contexts × items, ranked together
SAMPLE_SCORES, SAMPLE_CONTEXTS = 10_000_000, 200  # of a sample: about so many scores, but at least so many contexts


class _Block(NamedTuple):
    """X contexts, and the R held-out rows in them."""

    ids: Tensor  # [X, S]
    values: Tensor | None
    context: Tensor  # [R], of these contexts
    item: Tensor  # [R]


class FullRanking:
    """Ranks each held-out row's item, in the context of that row, among all items that its user had not taken.

    The others are the catalogue without what the user took in training. An item that scores the same counts one half,
    so rank = 1 + higher + equal / 2. A row whose item training has not seen has rank infinity.

    The area of a row is the share of items that the user took neither in training nor in the held-out rows, and that
    score lower (the same: one half). Its mean over the rows of a user is that user's AUC; one with no such items has
    none. Rows with missing and unknown users have taken nothing but their own item.
    """

    def __init__(
        self, catalogue: Catalogue, train: Dataset, held_out: Dataset, device: torch.device, *, seed: int | None = None
    ) -> None:
        """With a `seed` a random sample of contexts is ranked, as large as SAMPLE_SCORES allows."""
        self._catalogue, self._held_out, self._device = catalogue, held_out, device
        item_N = catalogue.find(held_out)
        self._trained = catalogue.taken(train, catalogue.of_row_N, device)
        self._held = catalogue.taken(held_out, item_N, device)
        self._slots_T = torch.tensor(catalogue.slots_T, device=device)
        self._ids_CT = torch.from_numpy(catalogue.ids_CT).to(device)
        self._values_CT = None if catalogue.values_CT is None else torch.from_numpy(catalogue.values_CT).to(device)
        context_N = catalogue.contexts(held_out)
        limit = int(context_N.max()) + 1
        if seed is not None:
            context_N = np.random.default_rng(seed).permutation(limit)[context_N]
            limit = max(SAMPLE_CONTEXTS, SAMPLE_SCORES // len(catalogue))
        chosen_N = context_N < limit
        self.rows, self.unseen = int(chosen_N.sum()), int((item_N[chosen_N] < 0).sum())
        seen = np.flatnonzero(chosen_N & (item_N >= 0))
        seen = seen[np.argsort(context_N[seen], kind="stable")]
        self._rows_R, self._item_R = seen, item_N[seen]
        self._contexts, self._first_R, self._context_R = np.unique(
            context_N[seen], return_index=True, return_inverse=True
        )

    def metrics(self, score: Scorer) -> dict[str, float]:
        """ndcg@10, hr@10, mrr and gauc; all NaN where a score is not finite."""
        ranks, areas = [np.full(self.unseen, np.inf)], [np.zeros(self.unseen)]
        with torch.inference_mode(), bar(total=len(self._contexts), what="ranking", unit="contexts") as progress:
            for first, stop in self._spans():
                for rank_R, area_R in self._ranked(score, self._block(first, stop)):
                    ranks.append(rank_R.cpu().numpy())
                    areas.append(area_R.cpu().numpy())
                progress.update(stop - first)
        return ranking_metrics(np.concatenate(ranks), np.concatenate(areas))

    def _spans(self) -> list[tuple[int, int]]:
        step, contexts = max(1, CELLS // len(self._catalogue)), len(self._contexts)
        return [(first, min(first + step, contexts)) for first in range(0, contexts, step)]

    def _block(self, first: int, stop: int) -> _Block:
        in_block = slice(*np.searchsorted(self._context_R, [first, stop]))
        at = self._rows_R[self._first_R[first:stop]]
        values = None if self._held_out.values is None else self._to(self._held_out.values[at])
        return _Block(
            self._to(self._held_out.ids[at].astype(np.int64)),
            values,
            self._to(self._context_R[in_block] - first),
            self._to(self._item_R[in_block]),
        )

    def _ranked(self, score: Scorer, block: _Block) -> list[tuple[Tensor, Tensor]]:
        """Rank and area of the rows of a block, [R] each, some rows at a time."""
        score_XC, items = self._scores(score, block), len(self._catalogue)
        finite_X, users_X = score_XC.isfinite().all(1), self._catalogue.who.of(block.ids)
        candidates_XC = ~self._trained.among(users_X, items)
        untaken_XC = candidates_XC & ~self._held.among(users_X, items)
        ranked = []
        for first in range(0, len(block.item), step := max(1, CELLS // items)):
            context_R, item_R = block.context[first : first + step], block.item[first : first + step]
            lower, equal, others = _against(score_XC, candidates_XC, context_R, item_R)
            rank_R = torch.where(finite_X[context_R], 1 + others - lower - equal / 2, torch.nan)
            lower, equal, others = _against(score_XC, untaken_XC, context_R, item_R)
            ranked.append((rank_R, (lower + equal / 2) / others))
        return ranked

    def _scores(self, score: Scorer, block: _Block) -> Tensor:
        """The score of every item in every context, [X, C]."""
        items = len(self._catalogue)
        scores = []
        for cell_B in torch.split(torch.arange(len(block.ids) * items, device=self._device), SCORED_ROWS):
            context_B, item_B = cell_B // items, cell_B % items
            ids_BS = block.ids[context_B].index_copy_(1, self._slots_T, self._ids_CT[item_B])
            values_BS = None
            if block.values is not None and self._values_CT is not None:
                values_BS = block.values[context_B].index_copy_(1, self._slots_T, self._values_CT[item_B])
            scores.append(score(ids_BS, values_BS))
        return torch.cat(scores).view(-1, items)

    def _to(self, array: NDArray[np.float32] | Integers) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _against(score_XC: Tensor, allowed_XC: Tensor, context_R: Tensor, item_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the allowed other items score lower, the same, and how many there are: [R] each, float64."""
    score_RC, allowed_RC = score_XC[context_R], allowed_XC[context_R]
    allowed_RC[torch.arange(len(item_R), device=item_R.device), item_R] = False
    own_R1 = score_RC.gather(1, item_R[:, None])
    counts = (
        ((score_RC < own_R1) & allowed_RC).sum(1),
        ((score_RC == own_R1) & allowed_RC).sum(1),
        allowed_RC.sum(1),
    )
    lower_R, equal_R, others_R = (count.double() for count in counts)
    return lower_R, equal_R, others_R


def from_runtime(logits: Callable[[EncodedRows], NDArray[np.float32]]) -> Scorer:
    """A Scorer of what onnxruntime answers."""

    def score(ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        values = np.ones(ids_BS.shape, np.float32) if values_BS is None else values_BS.numpy()
        return torch.from_numpy(logits(EncodedRows(ids_BS.numpy(), values)))

    return score
