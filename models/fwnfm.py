"""Field-weighted Neural FM, a variant of ours: an NFM that learns a weight for every pair of fields.

    f_BI(V_x) = Σ_{f<g} r_fg e_f ⊙ e_g

The weights r are those of Field-weighted FMs (Junwei Pan et al., WWW 2018, https://doi.org/10.1145/3178876.3186040),
all else is NFM (He & Chua, SIGIR 2017). They start at 1, as an NFM. With no layers, and without batch norm and dropout,
it is the FwFM. One product with the [F, F] matrix of weights costs little beside the network: no pair is formed.

Shapes: see models/base.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.base import Layout, Model
from models.nfm import NFM
from models.split import Split


class FwNFM(NFM):
    served_weights: Tensor | None

    def __init__(self, layout: Layout, config: NFM.Config) -> None:
        super().__init__(layout, config)
        self.r = nn.Parameter(torch.ones(len(layout.pairs)))
        self.register_buffer("served_weights", None, persistent=False)

    def inference(self, sample_BS: Tensor | None = None) -> Model:
        """The matrix of weights written out, too."""
        served = super().inference(sample_BS)
        assert isinstance(served, FwNFM)
        served.served_weights = self._weights().detach()
        return served

    def bi_interaction(self, e_BFK: Tensor) -> Tensor:
        return (e_BFK * (self._weights() @ e_BFK)).sum(1)

    def pair_dots(self, left_BFK: Tensor, right_BFK: Tensor) -> Tensor:
        return super().pair_dots(left_BFK, right_BFK) * self.r

    def split(self, candidate: Sequence[int]) -> Split | None:
        return None  # the context's vectors have another sum for every field of a candidate

    def _weights(self) -> Tensor:
        """r_fg above the diagonal, 0 elsewhere, [F, F]."""
        if self.served_weights is not None:
            return self.served_weights
        fields = self.layout.fields
        flat = self.r.new_zeros(fields**2).index_copy(0, self.first_P * fields + self.second_P, self.r)
        return flat.view(fields, fields)
