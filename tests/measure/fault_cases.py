"""The faults of the fault table: bad input, unusual models, and the nets that meet them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plumbing import TinyNet, make_images

OPTIONS: dict[str, dict[str, Any]] = {
    "norm": {"momentum": 0.3},
    "tent": {"lr": 1e-2},
    "zerosiam": {"lr": 0.1, "predictor_lr": 0.1},
    "eata": {"entropy_margin": 0.99, "diversity_margin": 0.999},
    "eta": {"entropy_margin": 0.99, "diversity_margin": 0.999},
    "sar": {"entropy_margin": 0.99, "reset_threshold": None},
    "deyo": {"entropy_margin": 0.99, "plpd_threshold": -0.5, "patches": 2},
    "memo": {"views": 2, "augment": "crop_flip"},
    "view_averaging": {"views": 2, "augment": "crop_flip"},
    "zero": {"views": 4},
    "cotta": {"views": 2, "anchor_threshold": 1.0, "ema_decay": 0.9},
    "adacontrast": {"lr": 1e-2, "queue_size": 16, "warmup": 4},
    "petal": {"views": 2, "anchor_threshold": 1.0, "swag_epochs": 2},
    "psmt": {"lr": 1e-2},
    "rmt": {"lr": 1e-2, "projector": 8},
    "eco_tta": {"warmup_epochs": 1},
    "itta": {"head_epochs": 1},
    "ttt": {"head_epochs": 1},
    "ttt_pp": {"head_epochs": 1},
    "meta_ttt": {"threshold": 0.4, "episodic": False},
    "t3a": {"filter_k": 3},
}
"""Options that make each method do its work on the tiny nets."""

CLASSES = 5


def net(kind: str) -> nn.Module:
    """A net with random weights and running statistics, neither uniform nor saturated."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = TinyNet(kind, CLASSES)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.3, 1.0)
        with torch.no_grad():
            model.head.weight.mul_(6)
    return model.eval()


def _some(images: Tensor, value: float) -> Tensor:
    images = images.clone()
    images[1, 0, 3, 3] = value
    images[4] = value
    return images


LEFT_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN in some images": lambda x: _some(x, float("nan")),
    "Inf in some images": lambda x: _some(x, float("inf")),
    "-Inf in some images": lambda x: _some(x, -float("inf")),
    "all images NaN": lambda x: torch.full_like(x, float("nan")),
    "all images Inf": lambda x: torch.full_like(x, float("inf")),
}
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "1 channel": lambda x: x[:, :1],
    "4 channels": lambda x: torch.cat([x, x[:, :1]], 1),
    "no batch dimension": lambda x: x[0],
    "5 dimensions": lambda x: x[None],
    "too small, 2 x 2": lambda x: x[..., :2, :2],
    "empty batch": lambda x: x[:0],
    "no pixels": lambda x: x[..., :0],
    "0-255 as float": lambda x: x * 255,
    "uint8": lambda x: (x * 255).to(torch.uint8),
    "standardised": lambda x: (x - 0.5) * 8,
    "a list": lambda x: x.tolist(),
}
FINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "batch of 1": lambda x: x[:1],
    "one constant image": lambda x: torch.full_like(x[:1], 0.5),
    "a constant batch": lambda x: torch.full_like(x, 0.5),
    "all black": lambda x: torch.zeros_like(x),
    "one image repeated": lambda x: x[:1].expand(6, -1, -1, -1),
    "larger frames, 24 x 24": lambda x: make_images(6, 9, size=24),
}
SAME: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # given, and what it should equal
    "float16": (lambda x: x.half(), lambda x: x.half().float()),
    "bfloat16": (lambda x: x.bfloat16(), lambda x: x.bfloat16().float()),
    "float64": (lambda x: x.double(), lambda x: x),
    "channels_last": (lambda x: x.to(memory_format=torch.channels_last), lambda x: x),
    "not contiguous": (lambda x: torch.stack([x, 1 - x], -1)[..., 0], lambda x: x),
    "needs a gradient": (lambda x: x.clone().requires_grad_(), lambda x: x),
}


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _compiled_layer(model: nn.Module) -> nn.Module:
    model.norm2 = torch.compile(model.norm2, backend="eager")
    return model


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen model": lambda model: model.requires_grad_(False),
    "model in train mode": lambda model: model.train(),
    "compiled model": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": _compiled_in_place,
    "compiled part": _compiled_layer,
    "in DataParallel": nn.DataParallel,
}
OTHERS = ("model without values (meta)", "model on another device", "no norm layers", "a class never predicted")
FAULTS = (*LEFT_OUT, *REFUSED, *FINITE, *SAME, *MODELS, *OTHERS)
