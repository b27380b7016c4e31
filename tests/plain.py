"""What the references of several methods share: SGD by hand, and comparisons. Plain torch, no code of the package."""

import copy
import io

import torch

from nets import max_difference, norm_weights, same, without_running_statistics

TOLERANCE = 1e-10  # float64
FROZEN = {"bn": ["norm2"], "gn": ["norm2"], "ln": ["norm"], "user": ["hidden.1"]}  # the last of 2 or 3 norm layers


class PlainSGD:
    """SGD with momentum, or with Nesterov's, by hand, on tensors by name."""

    def __init__(self, tensors, lr, momentum=0.9, nesterov=False):
        self.tensors, self.lr, self.momentum, self.nesterov = tensors, lr, momentum, nesterov
        self.source = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.forget()

    def forget(self):
        self.buffers = {name: torch.zeros_like(tensor) for name, tensor in self.source.items()}

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.tensors.values()))

    @torch.no_grad()
    def step(self, gradients, lr_factor=1.0):
        for (name, tensor), gradient in zip(self.tensors.items(), gradients, strict=True):
            self.buffers[name] = self.momentum * self.buffers[name] + gradient
            ahead = gradient + self.momentum * self.buffers[name] if self.nesterov else self.buffers[name]
            tensor -= self.lr * lr_factor * ahead

    @torch.no_grad()
    def restart(self):
        self.forget()
        for name, tensor in self.tensors.items():
            tensor.copy_(self.source[name])

    def moved(self):
        """How far the tensor that moved least has moved."""
        return min((tensor - self.source[name]).abs().max().item() for name, tensor in self.tensors.items())


class PlainMethod:
    """A copy of ``net`` with batch statistics, whose norm layers, but the frozen ones, learn with SGD."""

    def __init__(self, net, lr, momentum=0.9, frozen=()):
        self.net = without_running_statistics(copy.deepcopy(net))
        weights = {n: w for n, w in norm_weights(self.net).items() if n.rpartition(".")[0] not in frozen}
        self.sgd = PlainSGD(weights, lr, momentum)

    @property
    def weights(self):
        return self.sgd.tensors


def assert_same_sgd(method, sgd, optimizer="model", prefix="model."):
    """The method's tensors and momenta of one optimizer are those of a :class:`PlainSGD`."""
    held = [p for group in method.optimizers[optimizer].param_groups for p in group["params"]]
    assert len(held) == len(sgd.tensors)
    for name, tensor in sgd.tensors.items():
        ours = method.adaptable[f"{prefix}{name}"]
        assert any(ours is p for p in held)
        assert max_difference(ours.detach(), tensor.detach()) < TOLERANCE
        state = method.optimizers[optimizer].state.get(ours, {})
        buffer = state.get("momentum_buffer", torch.zeros_like(tensor))
        assert max_difference(buffer, sgd.buffers[name]) < TOLERANCE


def assert_goes_on_after_loading(method, other, stream, same_options=True):
    """A state that ``other`` loads from a file in the middle of a stream goes on bit by bit; a reset starts anew.

    Args:
        method: As built.
        other: As built, around another net.
        stream: Batches of images.
        same_options: Whether ``other`` has the same options, so that it has the same start.

    Returns:
        The state as it was saved.
    """
    initial, middle = copy.deepcopy(method.state_dict()), len(stream) // 2
    first = [method(images) for images in stream[:middle]]
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    rest = [method(images) for images in stream[middle:]]
    end = copy.deepcopy(method.state_dict())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(copy.deepcopy(saved))
    assert same(other.state_dict(), saved)
    assert same([other(images) for images in stream[middle:]], rest)
    assert same(other.state_dict(), end)
    for each in (method, other) if same_options else (method,):
        each.reset()
        assert same(each.state_dict(), initial)
        assert same([each(images) for images in stream], first + rest)
    return saved
