"""EcoTTA's meta parts: small nets beside the parts of a frozen one, which alone learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, cross_entropy, l1_loss

from lightning_tta.auxiliary.base import Auxiliary, other_forwards
from lightning_tta.auxiliary.stages import find_stages
from lightning_tta.backbones.split import as_logits, is_inside
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32

MOMENTUM = 0.1
"""Of the running statistics: torch's own."""
ADDED = 0.01
"""Scale of the convolutions' share at the start, when the rest is the identity; 0 would leave them without gradient."""
Moments = dict[str, tuple[Tensor, Tensor]]
"""By the name of a norm layer of the meta parts: mean, and unbiased variance, of what it took."""


class MetaPart(nn.Module):
    """Beside a part x -> y of a net: ``norm(y) + ReLU(added_norm(conv(x)))``, with BatchNorm and a 3 x 3 convolution.

    Args:
        inputs: Channels of x.
        outputs: Channels of y.
        stride: Of the convolution: how much larger x is; what it gives is pooled where its size is another than y's.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm, self.added_norm = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, device="meta").to_empty(device="cpu")
        generator, bound = torch.Generator().manual_seed(0), (9 * inputs) ** -0.5
        with torch.no_grad():
            self.conv.weight.uniform_(-bound, bound, generator=generator)
            self.added_norm.weight.fill_(ADDED)


class MetaParts(Auxiliary):
    """The cross-entropy of a net with meta parts; the net itself gets no gradient where it is frozen.

    The net's blocks, those modules that take and return feature maps, in the order in which they run, are shared out
    among the parts, as evenly as it goes; the last parts have the more.

    Args:
        net: A net at least half of whose stages run once, take one feature map (B, C, H, W) and return one.
        weight: See :class:`~lightning_tta.auxiliary.base.Auxiliary`.
        parts: Number of parts, >= 1; as many as there are blocks where there are fewer.

    Raises:
        UnsupportedModelError: If the net has no such stages.
    """

    kind: ClassVar[str] = "meta_parts"

    def __init__(self, net: nn.Module, weight: float = 1.0, parts: int = 5) -> None:
        super().__init__(net, weight)
        check_range("parts", parts, 1, integer=True)
        blocks = list(_blocks(net))
        if not blocks:
            raise UnsupportedModelError(
                f"{type(net).__name__} has no blocks that take and return feature maps (B, C, H, W), beside which meta "
                "parts could stand. For transformers use method 'vida', or 'tent' with select='lora'."
            )
        number = min(parts, len(blocks))
        ends = [len(blocks) * (part + 1) // number for part in range(number)]
        spans = [(blocks[start], blocks[end - 1]) for start, end in zip([0, *ends], ends, strict=False)]
        self.names = [(first[0], last[0]) for first, last in spans]
        self.parts = nn.ModuleList([_beside(first[1], last[2]) for first, last in spans])

    def running(
        self, net: nn.Module, noted: Moments | None = None, penalties: list[Tensor] | None = None
    ) -> AbstractContextManager[None]:
        """While active, a pass of the net has the meta parts beside its parts.

        Args:
            net: As at construction.
            noted: If given, their norm layers take the batch's own statistics, which are noted here.
            penalties: If given, gets of each part the mean absolute difference that it makes, 0-dimensional, whose
                gradient reaches this part alone.
        """
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for number, (first, last) in enumerate(self.names):
            added: list[tuple[Tensor, Tensor | None]] = []
            begin = self._beginning(number, net.get_submodule(first), added, noted, penalties is not None)
            forwards[net.get_submodule(first)] = begin
            plain = begin if first == last else net.get_submodule(last).forward
            forwards[net.get_submodule(last)] = self._ending(number, plain, added, noted, penalties)
        return other_forwards(forwards)

    def _beginning(
        self, number: int, module: nn.Module, added: list[Any], noted: Moments | None, detached: bool
    ) -> Callable[..., Any]:
        plain = module.forward

        def forward(x: Tensor, *rest: Any, **options: Any) -> Any:
            alone = self._added(number, x.detach(), None, noted is not None) if detached else None
            added.append((self._added(number, x, noted, noted is not None), alone))
            return plain(x, *rest, **options)

        return forward

    def _ending(
        self,
        number: int,
        plain: Callable[..., Any],
        added: list[Any],
        noted: Moments | None,
        penalties: list[Tensor] | None,
    ) -> Callable[..., Any]:
        def forward(*inputs: Any, **options: Any) -> Tensor:
            y: Tensor = plain(*inputs, **options)
            more, alone = added.pop()
            if penalties is not None:
                fixed = y.detach()
                difference = self._normed(number, "norm", fixed, None, noted is not None) + _fit(alone, y)
                penalties.append(l1_loss(at_least_float32(difference), at_least_float32(fixed)))
            return self._normed(number, "norm", y, noted, noted is not None) + _fit(more, y)

        return forward

    def _added(self, number: int, x: Tensor, noted: Moments | None, of_batch: bool) -> Tensor:
        part = self.parts[number]
        assert isinstance(part, MetaPart)
        return self._normed(number, "added_norm", part.conv(x), noted, of_batch).relu()

    def _normed(self, number: int, name: str, x: Tensor, noted: Moments | None, of_batch: bool) -> Tensor:
        layer = getattr(self.parts[number], name)
        count = x.numel() // x.shape[1]
        if not of_batch or count < 2:  # one value a channel has no variance
            return batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        if noted is not None:
            var, mean = torch.var_mean(at_least_float32(x.detach()), (0, 2, 3))
            noted[f"parts.{number}.{name}"] = (mean, var)
        return batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)

    def moved(self, noted: Moments) -> dict[str, Tensor]:
        """The running statistics, by name, after a batch with these moments."""
        moved: dict[str, Tensor] = {}
        for name, values in noted.items():
            for leaf, value in zip(("running_mean", "running_var"), values, strict=True):
                before = self.get_buffer(f"{name}.{leaf}")
                moved[f"{name}.{leaf}"] = torch.lerp(before, value.to(before), MOMENTUM)
        return moved

    @torch.no_grad()
    def begin_as_identity(self, moments: list[tuple[Tensor, Tensor]]) -> None:
        """Let each part's norm layer be the identity on maps with these means and variances, in the order of parts."""
        for part, (mean, var) in zip(self.parts, moments, strict=True):
            assert isinstance(part, MetaPart)
            layer = part.norm
            assert layer.running_mean is not None
            assert layer.running_var is not None
            for tensor, value in ((layer.running_mean, mean), (layer.bias, mean), (layer.running_var, var)):
                tensor.copy_(value)
            layer.weight.copy_((var + layer.eps).sqrt())

    def loss(self, net: nn.Module, images: Tensor, labels: Tensor, key: Tensor) -> Tensor:
        """The mean over the batch; the running statistics follow it."""
        noted: Moments = {}
        with self.running(net, noted):
            loss = cross_entropy(at_least_float32(as_logits(net(images))), labels)
        with torch.no_grad():
            for name, value in self.moved(noted).items():
                self.get_buffer(name).copy_(value)
        return loss


def _fit(added: Tensor, like: Tensor) -> Tensor:
    return added if added.shape == like.shape else adaptive_avg_pool2d(added, (like.shape[-2], like.shape[-1]))


def _blocks(net: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The blocks with what they took and returned in a trial pass, in the order in which they run."""
    stages = find_stages(net, "use method 'tent', which needs no parts")
    maps = {name: call for name in stages.calls if (call := stages.once(name)) and all(map(_is_map, call))}
    if 2 * sum(name in maps for name in stages.names) < len(stages.names):  # a transformer: its patches alone are a map
        return
    for stage in stages.names:
        module = net.get_submodule(stage)
        children = [f"{stage}.{name}" for name, _ in module.named_children()]
        holds_blocks = isinstance(module, nn.Sequential) and all(
            child in maps and sum(is_inside(layer, child) for layer in stages.layers) > 1 for child in children
        )
        for name in children if holds_blocks else [stage]:
            if name in maps:
                yield name, *maps[name]


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _beside(x: Tensor, y: Tensor) -> MetaPart:
    return MetaPart(x.shape[1], y.shape[1], max(1, x.shape[2] // y.shape[2]))
