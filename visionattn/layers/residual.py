"""Residual wrapper of a channel module."""

import torch
from torch import nn


class Residual(nn.Module):
    """``y = module(x) + x``, keeping the state-dict names of the module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) + x
