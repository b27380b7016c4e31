"""Small classifiers, built by the tests: 3 x 16 x 16 pixels -> logits, each with features() and a linear head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

KINDS = ("bn", "gn", "ln", "user")
TOKENS_ONLY = ("foa", "rem")
"""Methods that run on none of these, but on ``vit``."""


def kinds_of(method: str) -> tuple[str, ...]:
    """The kinds of nets on which a method is tried."""
    return (*KINDS, "vit") if method in TOKENS_ONLY else KINDS


def kind_for(method: str, kind: str) -> str:
    """``kind``, or the kind that the method runs on instead."""
    return "vit" if method in TOKENS_ONLY else kind


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm or GroupNorm."""

    def __init__(self, norm: str, num_classes: int) -> None:
        super().__init__()
        make = {"bn": nn.BatchNorm2d, "gn": lambda width: nn.GroupNorm(2, width)}[norm]
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), make(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), make(12)
        self.head = nn.Linear(12, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class TinyViT(nn.Module):
    """Four patches, one attention block, LayerNorm of one width."""

    def __init__(self, num_classes: int, width: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.mlp(self.norm2(x))
        return self.norm(x).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class TokenBlock(nn.Module):
    """Attention and a hidden layer over tokens (B, N, D), any number N of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, dim=-1))
        return x + self.mlp(self.norm2(x))


class TokenViT(nn.Module):
    """A class token and four patches through blocks, as vision transformers have them."""

    def __init__(self, num_classes: int, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width) / 2)
        self.blocks = nn.Sequential(*(TokenBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.patches(x), 2).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.norm(self.blocks(x)[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class UserNet(nn.Module):
    """What a user may bring: own names, BatchNorm on pixels and on vectors, dropout, several linear layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Softplus(),  # else the next BatchNorm would undo the shift of the first
            nn.Conv2d(3, 6, 5, stride=4),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )
        self.hidden = nn.Sequential(nn.Linear(54, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(0.5))
        self.decide = nn.Linear(10, num_classes)

    @property
    def head(self) -> nn.Linear:
        return self.decide

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(self.stem(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(self.features(x))


class TinyNet(nn.Module):
    """Two convolutions without padding: 2 x 2 pixels are too few. Any norm layer or ``none``; no features()."""

    def __init__(self, kind: str, num_classes: int, width: int = 12) -> None:
        super().__init__()
        make = {"bn": nn.BatchNorm2d, "gn": lambda n: nn.GroupNorm(3, n)}.get(kind, lambda n: nn.Identity())
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, 2, 1), make(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 2), make(width)
        self.norm = nn.LayerNorm(width) if kind == "ln" else nn.Identity()
        self.hidden, self.drop = nn.Linear(width, width), nn.Dropout(0.1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x))).amax((2, 3))
        return self.head(self.drop(F.relu(self.hidden(self.norm(x)))))


def make_net(kind: str, num_classes: int = 5, seed: int = 0) -> nn.Module:
    """A net in eval mode with random weights, affine parameters and running statistics; global RNG untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = {"ln": TinyViT, "user": UserNet, "vit": TokenViT}.get(kind, lambda k: ConvNet(kind, k))(num_classes)
        for module in net.modules():
            if isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.3, 1.0)
        with torch.no_grad():
            net.head.weight.mul_(4)  # predictions that are neither uniform nor saturated
    return net.eval()


def make_images(batch: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: int = 16) -> Tensor:
    """Pixels (B, 3, size, size) in [0, 1]; each image has its own brightness and contrast."""
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = torch.rand(batch, 3, size, size, generator=generator, dtype=torch.float64)
    contrast, brightness = torch.rand(2, batch, 3, 1, 1, generator=generator, dtype=torch.float64)
    return (brightness + contrast * (noise - brightness)).to(dtype)


def make_stream(batches: int, batch: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Several batches of different images."""
    return [make_images(batch, seed=100 * seed + i, dtype=dtype) for i in range(batches)]


def without_running_statistics(net: nn.Module) -> nn.Module:
    """The plain way to batch statistics: BatchNorm in training mode that tracks nothing. Changes and returns net."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return net


def norm_weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias of every norm layer of one of the nets above, by name."""
    types = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
    return {
        f"{name}.{leaf}": getattr(module, leaf)
        for name, module in net.named_modules()
        if isinstance(module, types)
        for leaf in ("weight", "bias")
    }


def max_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return (a - b).abs().max().item()


def without_account(state: dict) -> dict:
    """A method's state but for its account of the stream's BatchNorm statistics, which every batch enters."""
    return _without(state, "stream.")


def without_prior(state: dict) -> dict:
    """A method's state but for its prior, learned from predictions alone, whether or not there was a step."""
    return _without(state, "prior.")


def _without(state: dict, prefix: str) -> dict:
    memory = {n: value for n, value in state["_extra_state"]["memory"].items() if not n.startswith(prefix)}
    return {**state, "_extra_state": {**state["_extra_state"], "memory": memory}}


def same(a: object, b: object) -> bool:
    """Whether two nested states (dicts, lists, tensors, numbers) are equal bit by bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dtype != b.dtype:
            return False
        if a.shape != b.shape:  # of a state that is empty: allocated at its first use, and reset since
            return all(t.is_floating_point() and bool(t.isnan().all()) for t in (a, b))
        return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())  # a state that is empty is NaN
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
