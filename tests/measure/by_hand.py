"""Methods written out without this package, as the yardsticks of tests/measure/gpu.py.

:class:`Tent` and those under it are the authors' algorithms in the usual style of public code: autograd, torch's
optimizers, samples chosen by index, loops over parameters. :class:`Least` is the least that Tent is, and
:class:`Recorded` any step as one CUDA graph.

A net comes in eval mode, on its device. ``names`` are those of the parameters that learn. A call takes pixels
(B, C, H, W) and returns logits (B, K), detached.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing import without_running_statistics

Call = Callable[[Tensor], Tensor]


def entropy(logits: Tensor) -> Tensor:
    """Of each sample."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


class Tent:
    """Mean entropy, down by SGD."""

    def __init__(self, net: nn.Module, names: Sequence[str], *, lr: float = 2.5e-4, momentum: float = 0.9) -> None:
        self.net = without_running_statistics(net).requires_grad_(False)
        parameters = dict(net.named_parameters())
        self.weights = [parameters[name].requires_grad_() for name in names]
        self.optimizer = torch.optim.SGD(self.weights, lr=lr, momentum=momentum)

    def descend(self, loss: Tensor) -> None:
        """One step."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def objective(self, logits: Tensor) -> Tensor:
        """The loss of each sample."""
        return entropy(logits)

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.descend(self.objective(logits).mean())
        return logits.detach()


class COME(Tent):
    """The entropy of opinions of fixed length."""

    def objective(self, logits: Tensor) -> Tensor:
        length = logits.norm(dim=1, keepdim=True)
        fixed = logits / length * length.detach()
        doubt = torch.full_like(fixed[:, :1], math.log(1000))  # as in the authors' code
        return entropy(torch.cat([fixed, doubt], 1))


class EATA(Tent):
    """Entropy of reliable and new samples, weighted, and a penalty that holds each weight near its source."""

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        *,
        fisher: Sequence[Tensor],
        alpha: float = 1.0,
        entropy_margin: float = 0.4,
        diversity_margin: float = 0.05,
        **options: float,
    ) -> None:
        super().__init__(net, names, **options)
        self.fisher, self.alpha, self.source = fisher, alpha, [weight.detach().clone() for weight in self.weights]
        self.entropy_margin, self.diversity_margin = entropy_margin, diversity_margin
        self.average: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        entropies, bound = entropy(logits), self.entropy_margin * math.log(logits.shape[1])
        reliable = torch.where(entropies < bound)[0]
        entropies, probabilities = entropies[reliable], logits[reliable].softmax(1).detach()
        if self.average is not None:
            similarity = F.cosine_similarity(self.average[None], probabilities, dim=1)
            new = torch.where(similarity < self.diversity_margin)[0]
            entropies, probabilities = entropies[new], probabilities[new]
        if len(entropies) == 0:
            return logits.detach()
        loss = ((bound - entropies.detach()).exp() * entropies).mean()
        for weight, source, fisher in zip(self.weights, self.source, self.fisher, strict=True):
            loss = loss + self.alpha * (fisher * (weight - source) ** 2).sum()
        self.descend(loss)
        mean = probabilities.mean(0)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        return logits.detach()


class SAR(Tent):
    """Entropy of reliable samples where it is largest within a ball of weights; back to the source after collapse."""

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        *,
        entropy_margin: float = 0.4,
        rho: float = 0.05,
        reset_threshold: float = 0.2,
        **options: float,
    ) -> None:
        super().__init__(net, names, **options)
        self.entropy_margin, self.rho, self.reset_threshold = entropy_margin, rho, reset_threshold
        self.source = copy.deepcopy((net.state_dict(), self.optimizer.state_dict()))
        self.average: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        entropies, bound = entropy(logits), self.entropy_margin * math.log(logits.shape[1])
        reliable = torch.where(entropies < bound)[0]
        if len(reliable) == 0:
            return logits.detach()
        entropies[reliable].mean().backward()
        norm = torch.stack([weight.grad.norm() for weight in self.weights if weight.grad is not None]).norm()
        here = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight in self.weights:
                if weight.grad is not None:
                    weight.add_(weight.grad * (self.rho / (norm + 1e-12)))
        self.optimizer.zero_grad()
        entropies = entropy(self.net(x))[reliable]
        entropies = entropies[torch.where(entropies < bound)[0]]
        loss = entropies.mean()
        loss.backward()
        with torch.no_grad():
            for weight, value in zip(self.weights, here, strict=True):
                weight.copy_(value)
        if not math.isnan(loss.item()):
            self.optimizer.step()
            self.average = loss.item() if self.average is None else 0.9 * self.average + 0.1 * loss.item()
        self.optimizer.zero_grad()
        if self.average is not None and self.average < self.reset_threshold:
            self.net.load_state_dict(self.source[0])
            self.optimizer.load_state_dict(self.source[1])
            self.average = None
        return logits.detach()


class DeYO(Tent):
    """Entropy of samples that are sure because of the object's shape, weighted."""

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        *,
        entropy_margin: float = 0.5,
        weight_margin: float = 0.4,
        plpd_threshold: float = 0.2,
        patches: int = 4,
        **options: float,
    ) -> None:
        super().__init__(net, names, **options)
        self.entropy_margin, self.weight_margin = entropy_margin, weight_margin
        self.plpd_threshold, self.patches = plpd_threshold, patches

    def shuffled(self, x: Tensor) -> Tensor:
        """The images with their patches in another order, each its own."""
        (count, channels, height, width), n = x.shape, self.patches
        size = (height // n * n, width // n * n)
        if size != (height, width):
            x = F.interpolate(x, size, mode="bilinear")
        rows, columns = size[0] // n, size[1] // n
        tiles = x.view(count, channels, n, rows, n, columns).permute(0, 2, 4, 1, 3, 5).reshape(count, n * n, -1)
        order = torch.rand(count, n * n, device=x.device).argsort(-1)
        tiles = tiles.gather(1, order[..., None].expand_as(tiles)).view(count, n, n, channels, rows, columns)
        x = tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, *size)
        return x if size == (height, width) else F.interpolate(x, (height, width), mode="bilinear")

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        entropies, scale = entropy(logits), math.log(logits.shape[1])
        sure = torch.where(entropies < self.entropy_margin * scale)[0]
        if len(sure) == 0:
            return logits.detach()
        with torch.no_grad():
            after = self.net(self.shuffled(x[sure])).softmax(1)
        before, label = logits[sure].detach().softmax(1).max(1)
        plpd = before - after.gather(1, label[:, None]).squeeze(1)
        kept = torch.where(plpd > self.plpd_threshold)[0]
        entropies, plpd = entropies[sure][kept], plpd[kept]
        if len(kept) == 0:
            return logits.detach()
        weights = (self.weight_margin * scale - entropies.detach()).exp() + plpd.exp()
        self.descend((weights * entropies).mean())
        return logits.detach()


class CoTTA:
    """A student under its moving average, as long as the anchor is sure, so that no views are made.

    Teacher and anchor are nets of their own, and the masks of the stochastic restore are drawn on the CPU.
    """

    def __init__(self, net: nn.Module, *, lr: float = 1e-2, decay: float = 0.999, restore: float = 0.001) -> None:
        self.student = without_running_statistics(net).requires_grad_(True)
        self.teacher, self.anchor = (copy.deepcopy(self.student).requires_grad_(False) for _ in range(2))
        self.source = copy.deepcopy(dict(self.student.named_parameters()))
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=lr, momentum=0.9)
        self.decay, self.restore = decay, restore

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.student(x)
        with torch.no_grad():
            confidence = self.anchor(x).softmax(1).max(1).values
            target = self.teacher(x)
        assert confidence.mean() > 1e-6  # sure; the authors make 32 views otherwise
        loss = -0.5 * (target.softmax(1) * logits.log_softmax(1)).sum(1)
        loss = loss - 0.5 * (logits.softmax(1) * target.log_softmax(1)).sum(1)
        loss.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.copy_(self.decay * average + (1 - self.decay) * weight)
            for name, weight in self.student.named_parameters():
                if self.restore:
                    mask = (torch.rand(weight.shape) < self.restore).float().to(weight.device)
                    weight.copy_(self.source[name] * mask + weight * (1 - mask))
        return target


class Least:
    """Tent with nothing beside it: batch statistics, gradients of the norm parameters, SGD on one flat buffer.

    Args:
        net: As above.
        names: As above.
        autocast: To bfloat16; the frozen weights of convolutions and linear layers are kept in it.
        channels_last: Layout of the net; give images of the same.
        lr: Learning rate.
        momentum: Of SGD.
    """

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        *,
        autocast: bool = False,
        channels_last: bool = False,
        lr: float = 2.5e-4,
        momentum: float = 0.9,
    ) -> None:
        self.net = without_running_statistics(net).requires_grad_(False)
        if channels_last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in net.modules() if autocast else ():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.bfloat16()
        parameters = dict(net.named_parameters())
        self.weights = [parameters[name] for name in names]
        self.flat = torch.cat([weight.detach().flatten() for weight in self.weights])
        parts = self.flat.split([weight.numel() for weight in self.weights])
        for weight, part in zip(self.weights, parts, strict=True):
            weight.data = part.view(weight.shape)
            weight.requires_grad_()
        self.velocity = torch.zeros_like(self.flat)
        self.autocast, self.lr, self.momentum = autocast, lr, momentum

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            logits = self.net(x).float()
        log_p = logits.log_softmax(1)
        gradients = torch.autograd.grad(-(log_p.exp() * log_p).sum(1).mean(), self.weights)
        with torch.no_grad():
            self.velocity.mul_(self.momentum).add_(torch.cat([gradient.flatten() for gradient in gradients]))
            self.flat.sub_(self.velocity, alpha=self.lr)
        return logits.detach()


class Recorded:
    """A step as one CUDA graph, for batches of one shape."""

    def __init__(self, step: Call, x: Tensor, warm_ups: int = 3) -> None:
        self.x = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                step(self.x)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.logits.clone()


LOOPS: dict[str, Any] = {"tent": Tent, "come": COME, "eata": EATA, "sar": SAR, "deyo": DeYO}
