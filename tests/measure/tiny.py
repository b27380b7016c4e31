"""For measurements: small nets with each kind of norm layer, made images in several domains, a quiet trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

KINDS = ("bn", "gn", "ln")
DOMAINS = ("plain", "dark", "noisy", "tinted")


class TinyNet(nn.Module):
    """Pixels (B, 3, H, W), H and W at least 8 -> logits (B, K); BatchNorm, GroupNorm, LayerNorm, or ``none``."""

    def __init__(self, kind: str, classes: int = 10, width: int = 12) -> None:
        super().__init__()
        makers: dict[str, Callable[[int], nn.Module]] = {
            "bn": nn.BatchNorm2d,
            "gn": lambda n: nn.GroupNorm(3, n),
            "none": lambda n: nn.Identity(),
        }
        make = makers.get(kind)
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2)
        self.norm1 = make(width) if make else nn.Identity()
        self.norm2 = make(width) if make else nn.Identity()
        self.norm = nn.LayerNorm(width) if kind == "ln" else nn.Identity()
        self.hidden = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = x.amax((2, 3))
        return self.head(self.drop(torch.relu(self.hidden(self.norm(x)))))  # type: ignore[no-any-return]


class Made:
    """Images (3, pixels, pixels) of ten patterns with noise, the same from the same seed, in :data:`DOMAINS`."""

    def __init__(self, classes: int = 10, pixels: int = 12) -> None:
        generator = torch.Generator().manual_seed(1)
        coarse = torch.rand(classes, 3, 4, 4, generator=generator)
        self.patterns = interpolate(coarse, size=(pixels, pixels), mode="bilinear")
        self.classes = classes

    def batch(self, size: int, domain: str, seed: int) -> tuple[Tensor, Tensor]:
        """Images (size, 3, pixels, pixels) in [0, 1] and labels (size,)."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(self.classes, (size,), generator=generator)
        patterns = self.patterns[labels]
        noise = torch.randn(patterns.shape, generator=generator)
        images = 0.3 + 0.4 * patterns + 0.3 * noise
        if domain == "dark":
            images = 0.4 * images
        elif domain == "noisy":
            images = images + 0.2 * torch.randn(images.shape, generator=generator)
        elif domain == "tinted":
            images = images * torch.tensor([1.0, 0.7, 0.5])[:, None, None] + 0.1
        return images.clamp(0, 1), labels


def train(kind: str, made: Made, steps: int = 300) -> nn.Module:
    """A net that knows the plain domain; a second or two. The global random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = TinyNet(kind, made.classes)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for step in range(steps):
            images, labels = made.batch(64, "plain", -1 - step)
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval()


def quiet_trainer(place: str | Path, *callbacks: Callback) -> Trainer:
    """A trainer on the CPU that shows nothing and writes into ``place``, for predict runs."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=place,
        callbacks=list(callbacks),
    )
