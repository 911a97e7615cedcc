"""Neural Factorization Machines for Sparse Predictive Analytics. Xiangnan He and Tat-Seng Chua, SIGIR 2017.
https://doi.org/10.1145/3077136.3080777

    ŷ(x) = w0 + Σ w_i x_i + f(x)                                                                    (eq. 2)
    f_BI(V_x) = Σ_{i<j} x_i v_i ⊙ x_j v_j = ½[(Σ x_i v_i)² − Σ (x_i v_i)²]                      (eq. 3, 4)
    z_1 = σ(W_1 f_BI + b_1), …, z_L = σ(W_L z_{L−1} + b_L)                                          (eq. 5)
    f(x) = hᵀ z_L                                                                                   (eq. 6)

With no layers h is fixed at 1 and, without batch norm and dropout, NFM is FM (section 3.2.1).
Shapes: see models/base.py; D is the width of z_L.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.base import Explanation, Layout, Model
from models.dropout import Dropout
from models.interactions import FactorModel
from models.mlp import NetworkConfig, mlp, opened
from models.split import FirstOrder, Part, Split, pair_sum, sum_fields


class NFM(FactorModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(NetworkConfig):
        """`dropout` is on f_BI, `layer_dropout` on every z_l; `batch_norm` comes before them on both."""

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self._affine = not config.layers or config.activation == "identity"
        norm = [nn.BatchNorm1d(config.embedding_dim)] if config.batch_norm else []
        self.pooling = nn.Sequential(*norm, Dropout(config.dropout))
        self.mlp = mlp(
            config.embedding_dim,
            config.layers,
            activation=config.activation,
            batch_norm=config.batch_norm,
            dropout=config.layer_dropout,
        )
        self.h = (
            nn.Parameter(nn.init.xavier_normal_(torch.empty(config.layers[-1], 1)))
            if config.layers
            else nn.Buffer(torch.ones(config.embedding_dim, 1), persistent=False)
        )
        self.served_network: nn.Module | None = None

    @property
    def exact(self) -> bool:
        return self._affine

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        bi_BK = self.bi_interaction(self.embed(ids_BS, values_BS))
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + self.network(bi_BK)

    def network(self, bi_BK: Tensor) -> Tensor:
        """f(x) from f_BI, [B]."""
        if self.served_network is not None:
            out_B1: Tensor = self.served_network(bi_BK)
            return out_B1.squeeze(1)
        z_BD: Tensor = self.mlp(self.pooling(bi_BK))
        return (z_BD @ self.h).squeeze(1)

    def _opened(self) -> tuple[nn.Linear, nn.Module]:
        """The network in eval mode as a linear layer, with batch norm folded into it, and the rest behind it."""
        first, rest = opened(self.mlp, self.h)
        norm = self.pooling[0]
        return (_behind(norm, first) if isinstance(norm, nn.BatchNorm1d) else first), rest

    def inference(self, sample_BS: Tensor | None = None) -> Model:
        """Batch norm folded into the layer behind it."""
        served = copy.deepcopy(self, {id(table): table for table in self.tables.values()})
        if isinstance(self.pooling[0], nn.BatchNorm1d):
            served.served_network = nn.Sequential(*self._opened())
        return served

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        slot_BS = self.slot_terms(ids_BS, values_BS)
        e_BFK = self.embed(ids_BS, values_BS)
        if not self.exact:
            return self.explanation(slot_BS, residual_B=self.network(self.bi_interaction(e_BFK)))
        shift, slope_K = self._shift_and_slope()
        return self.explanation(slot_BS, bias=self.bias + shift, pair_BP=self.pair_dots(e_BFK * slope_K, e_BFK))

    def _shift_and_slope(self) -> tuple[Tensor, Tensor]:
        """An affine network is its value at 0 and its K steps along the axes."""
        axes_KK = torch.eye(self.embedding.shape[1]).to(self.embedding)
        at_zero = self.network(torch.zeros_like(axes_KK[:1])).squeeze(0)
        return at_zero, self.network(axes_KK) - at_zero

    def split(self, candidate: Sequence[int]) -> Split | None:
        return self.split_into(self.sides(candidate), FirstOrder(self.bias), PooledPairs(*self._opened()))


class PooledPairs(Part):
    """A network of f_BI = b_C + Σ_C e ⊙ Σ_D e + b_D, where b is f_BI of one side alone.

    Its first layer W is linear: W (Σ_C e ⊙ Σ_D e) = (W diag(Σ_C e)) Σ_D e, so that the context leaves one matrix.
    """

    state = ("network", "slopes")

    def __init__(self, first: nn.Linear, rest: nn.Module) -> None:
        super().__init__()
        W_HK, bias_H = first.weight.detach(), first.bias
        self.W_KH = nn.Buffer(W_HK.T.contiguous(), persistent=False)
        self.bias_H = nn.Buffer(W_HK.new_zeros(len(W_HK)) if bias_H is None else bias_H.detach(), persistent=False)
        self.rest = rest

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        return torch.addmm(self.bias_H, pair_sum(e_1CK), self.W_KH), e_1CK.sum(1).T * self.W_KH

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        constant_1H, slopes_KH = state
        hidden_NH = torch.addmm(constant_1H, sum_fields(e_NDK), slopes_KH)
        if e_NDK.shape[1] > 1:
            hidden_NH = torch.addmm(hidden_NH, pair_sum(e_NDK), self.W_KH)
        summand_N1: Tensor = self.rest(hidden_NH)
        return summand_N1


def _behind(norm: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear:
    """x -> linear(norm(x)) in eval mode, as one layer."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    W_HK = linear.weight.detach()
    scale_K = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    shift_H = W_HK @ (norm.bias.detach() - norm.running_mean * scale_K)
    folded = nn.Linear(linear.in_features, linear.out_features)
    folded.weight = nn.Parameter(W_HK * scale_K)
    folded.bias = nn.Parameter(shift_H if linear.bias is None else shift_H + linear.bias.detach())
    return folded
