"""Options that several models share, and the sentences that refuse a value out of range."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FactorConfig:
    """Options of a model whose features have embeddings; each model says where its `dropout` sits."""

    embedding_dim: int = 64
    dropout: float = 0.0
    init_std: float = 0.01

    def __post_init__(self) -> None:
        require_positive("embedding_dim", self.embedding_dim)
        require_dropout("dropout", self.dropout)
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std: expected a finite number above 0, got {self.init_std!r}")


def require_positive(option: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{option}: expected a whole number of at least 1, got {value!r}")


def require_dropout(option: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{option}: expected a share to drop, at least 0 and below 1, got {value!r}")


def require_widths(option: str, widths: tuple[int, ...]) -> None:
    if any(width < 1 for width in widths):
        raise ValueError(f"{option}: expected widths of at least 1, one for each layer, got {widths!r}")
