"""The moving average of the weights over the steps of training."""

import copy

import torch

from models import Model

START = 10  # steps: an average of few steps forgets faster, so that the first weights do not linger


class Average:
    """A model beside the one in training, its weights the moving average of the other's.

    After step t (from 0), average += (1 − d) · (weights − average), d = min(decay, t / (t + 10)). The statistics of
    batch norm are those of the model in training: of nfm on Frappe they gave the lower RMSE, by up to 0.001, than
    averaged ones.
    """

    def __init__(self, model: Model, decay: float) -> None:
        shared = {id(buffer): buffer for buffer in model.buffers()}
        self.model = copy.deepcopy(model, shared).requires_grad_(False).eval()
        self._decay = decay
        self._live = [parameter.detach() for parameter in model.parameters()]
        self._averaged = [parameter.detach() for parameter in self.model.parameters()]

    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 0 over all epochs."""
        decay = min(self._decay, step / (step + START))
        torch._foreach_lerp_(self._averaged, self._live, 1 - decay)
