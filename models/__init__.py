"""Factorization machines in torch: ids and values of a row → a logit, and the terms it is made of."""

from models.base import Explanation, Layout, LogitTerms, Model
from models.registry import MODELS

__all__ = ["MODELS", "Explanation", "Layout", "LogitTerms", "Model"]
