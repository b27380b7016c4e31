"""A small net that a method puts behind the features, with weights of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_tta.draws import random_words


@torch.no_grad()
def make_projector(width: int, hidden: int, outputs: int, *, seed: int, like: Tensor) -> nn.Sequential:
    """Linear, ReLU, Linear, frozen; weights uniform in torch's own range for linear layers, the same on every device.

    Args:
        width: Of the features.
        hidden: Width between the layers.
        outputs: Width of what it returns.
        seed: Of the weights.
        like: A tensor of the device and dtype to have.
    """
    first, second = (
        nn.Linear(*sizes, device="meta").to_empty(device=like.device) for sizes in ((width, hidden), (hidden, outputs))
    )
    tensors = [(tensor, layer.in_features) for layer in (first, second) for tensor in layer.parameters()]
    for number, (tensor, inputs) in enumerate(tensors):
        words = random_words(torch.tensor([seed, -1 - number]), tensor.numel())  # steps of a stream count from 0
        tensor.copy_((words.double() * (2**-31 / math.sqrt(inputs))).view(tensor.shape))
    return nn.Sequential(first, nn.ReLU(), second).requires_grad_(False).to(like.dtype)
