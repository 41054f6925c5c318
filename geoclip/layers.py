"""Multi-layer perceptrons, and weights that are drawn from a generator."""

import itertools
import math

import torch
from torch import nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, with a ReLU between each two."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draw PyTorch's default initialisation of linear and convolution layers from `generator`, if there is one."""
    layers = module.modules() if generator else ()
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
