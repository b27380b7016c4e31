"""Nets as users bring them: computed weights, wrappers, hidden layers, outputs that are no logits; 16 x 16 pixels."""

import copy
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from nets import make_images


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make()


def randomized(make):
    """A net from ``make``, with random statistics and affine parameters, in eval mode."""

    def build():
        net = make()
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.3, 1.0)
        return net.eval()

    return seeded(build)


def plain(channels=3, classes=5):
    """Layers 0 and 3 are convolutions, 1 and 4 BatchNorm, 8 the head."""
    net = randomized(
        lambda: nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 12, 3, 2, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, classes),
        )
    )
    with torch.no_grad():
        net[-1].weight.mul_(4)
    return net


class Through(nn.Module):
    """A net that runs another one in its own way."""

    def __init__(self, net=None, run=lambda net, x: net(x)):
        super().__init__()
        self.net, self.run = plain() if net is None else net, run

    def forward(self, x):
        return self.run(self.net, x)


def checkpointed(reentrant):
    def run(net, x):
        for part in (net[:3], net[3:6], net[6:8]):
            x = checkpoint(part, x, use_reentrant=reentrant)
        return net[8](x)

    return lambda: (Through(run=run), Through())


def timm_checkpointed():
    timm, narrow = pytest.importorskip("timm"), {"channels": (8, 8, 12, 12), "stem_width": 8}
    nets = [randomized(lambda: timm.create_model("resnet10t", num_classes=5, **narrow)) for _ in range(2)]
    nets[0].set_grad_checkpointing(True)
    return nets


def memory_efficient():
    models = pytest.importorskip("torchvision.models")
    return [
        randomized(lambda m=m: models.DenseNet(4, (1, 1), 8, num_classes=5, memory_efficient=m)) for m in (True, False)
    ]


def old_weight_norm():
    net = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age
        nn.utils.weight_norm(net[3])
    net(make_images(2))
    twin = plain()
    parametrizations.weight_norm(twin[3])
    return net, twin


class KeepsOutput(Through):
    def forward(self, x):
        self.last = [super().forward(x)]
        return self.last[0]


def keeps_output():
    net = KeepsOutput()
    net(make_images(2))
    return net, Through()


class Note:
    def __call__(self, module, inputs, output):
        self.features = output


def noted_by_a_hook():
    net = Through()
    net.net[5].register_forward_hook(Note())
    net(make_images(2))
    return net, Through()


class Normalize(nn.Module):
    """Pixels, with the mean and std as parameters, or as buffers."""

    def __init__(self, kind):
        super().__init__()
        for name, values in (("mean", [0.4, 0.5, 0.6]), ("std", [0.2, 0.2, 0.3])):
            value = torch.tensor(values)
            if kind == "buffers":
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x):
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class ClampedNormalize(Normalize):
    def forward(self, x):
        return super().forward(x.clamp(0.1, 0.9))


def write(net, x):
    x -= 0.5
    return net(x.mul_(2))


class Times(nn.Module):
    def forward(self, w):
        return w * 1


def parametrized():
    net = plain()
    parametrize.register_parametrization(net[1], "weight", Times())
    return net, plain()


class Walks(nn.Module):
    """Goes through a plain list of its layers."""

    def __init__(self):
        super().__init__()
        self.net = plain()
        self.order = list(self.net)

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


class HoldsTwice(nn.Module):
    """Holds a layer under two names, and another one in a tuple too."""

    def __init__(self):
        super().__init__()
        self.net = plain()
        self.first, self.other = self.net[1], (self.net[4],)

    def forward(self, x):
        net = self.net
        return net[5:](self.other[0](net[3](net[2](self.first(net[0](x))))))


class SharesParameters(nn.Module):
    def __init__(self, share=True):
        super().__init__()
        self.net, self.last = plain(), nn.BatchNorm2d(12)
        self.last.weight, self.last.bias = self.net[4].weight, self.net[4].bias

    def forward(self, x):
        return self.net[6:](self.last(self.net[:6](x)))


class TwoTowers(nn.Module):
    """A text tower that does not run, and a vision tower that is registered last."""

    def __init__(self, text=True):
        super().__init__()
        if text:
            self.text = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(4)])
        self.vision = randomized(
            lambda: nn.Sequential(
                *[
                    nn.Sequential(nn.Conv2d(c, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
                    for c in (3, 6, 6)
                ],
                *[nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))],
            )
        )
        self.head = seeded(lambda: nn.Linear(6, 5))

    def forward(self, x, tokens=None):
        x = self.vision(x).mean((2, 3))
        return self.head(x if tokens is None else x + self.text(tokens))


def vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        **{"image_size": 16, "patch_size": 8, "num_labels": 5},
    )
    nets = [randomized(lambda: transformers.ViTForImageClassification(config)) for _ in range(2)]
    return nets[0], Through(nets[1], lambda net, x: net(x).logits)


def resnet_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5
    )
    nets = [randomized(lambda: transformers.ResNetForImageClassification(config)) for _ in range(2)]
    return nets[0], Through(nets[1], lambda net, x: net(x).logits)


def wrapped_forwards():
    """As a patch does it: by a closure, by a default, and on the net itself."""
    net = Through()

    def wrap(layer):
        inner = layer.forward
        layer.forward = lambda x: inner(x)

    wrap(net.net[3])
    net.net[8].forward = lambda x, inner=net.net[8].forward: inner(x)
    wrap(net)
    return net, Through()


def weakly_referred():
    net = Through()
    net.at, net.run = weakref.ref(net.net[4]), None
    net.forward = lambda x: net.net[5:](net.at()(net.net[:4](x)))
    return net, Through()


def hooked_batch_norm():
    net, twin = Through(), Through(run=lambda net, x: net[1:](net[0](x) * 2))
    net.net[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return net, twin


class ParametersInAList(Through):
    """Takes a convolution's parameters from a list."""

    def __init__(self):
        super().__init__()
        self.taken = [self.net[3].weight]

    def forward(self, x):
        return self.net[4:](F.conv2d(self.net[:3](x), *self.taken, stride=2, padding=1))


class OddParameters(Through):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)
        self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


def untracked():
    net = plain()
    for number in (1, 4):
        net[number] = nn.BatchNorm2d(net[number].num_features, track_running_stats=False)
    return net.eval(), copy.deepcopy(net).eval()


def with_dropout():
    net = plain()
    net.insert(8, nn.Dropout(0.5))
    return net.train(), Through()


RIGHT = {  # a net, and a plain one whose numbers a method must give
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
    "timm, checkpointed": timm_checkpointed,
    "DenseNet, memory efficient": memory_efficient,
    "old weight norm": old_weight_norm,
    "keeps its output": keeps_output,
    "a hook keeps features": noted_by_a_hook,
    "pixels normalised by parameters": lambda: [
        nn.Sequential(Normalize(k), plain()) for k in ("parameters", "buffers")
    ],
    "all frozen": lambda: [
        nn.Sequential(Normalize("parameters"), plain()).requires_grad_(False),
        nn.Sequential(Normalize("buffers"), plain()),
    ],
    "clamped pixels, normalised, all frozen": lambda: [
        nn.Sequential(ClampedNormalize(k), plain()).requires_grad_(False) for k in ("parameters", "buffers")
    ],
    "an autocast of its own": lambda: (
        Through(run=torch.autocast("cpu", torch.bfloat16)(lambda net, x: net(x))),
        Through(run=torch.autocast("cpu", torch.bfloat16)(lambda net, x: net[1:](net[0](x)))),
    ),
    "writes into its input": lambda: (Through(run=write), Through(run=lambda net, x: net((x - 0.5) * 2))),
    "parametrised BatchNorm": parametrized,
    "a plain list of layers": lambda: (Walks(), Through()),
    "a layer held twice": lambda: (HoldsTwice(), Through()),
    "shared parameters": lambda: (SharesParameters(), SharesParameters()),
    "two towers": lambda: (TwoTowers(), TwoTowers(text=False)),
    "DataParallel": lambda: (nn.DataParallel(plain()), plain()),
    "a part in DataParallel": lambda: (nn.Sequential(nn.DataParallel(plain()[:6]), *plain()[6:]), plain()),
    "wrapped forwards": wrapped_forwards,
    "a weak reference to a layer": weakly_referred,
    "a hook at BatchNorm": hooked_batch_norm,
    "parameters in a list": lambda: (ParametersInAList(), Through()),
    "an output with logits": lambda: (Through(run=lambda net, x: SimpleNamespace(logits=net(x))), Through()),
    "transformers' ViT": vit,
    "transformers' ResNet": resnet_of_transformers,
    "integer and complex parameters": lambda: (OddParameters(), Through()),
    "BatchNorm without statistics": untracked,
    "dropout, in train mode": with_dropout,
}
HEAVY = {"timm, checkpointed", "DenseNet, memory efficient", "transformers' ViT", "transformers' ResNet"}


class TwoInputs(Through):
    def forward(self, x, mask):
        return self.net(x) * mask


class OptionalMask(Through):
    def forward(self, x, mask=None):
        return self.net(x) * mask


class Asks(Through):
    def forward(self, x, prompt_ids=None):
        raise ValueError("You have to specify prompt_ids")


class Keyword(Through):
    def forward(self, *, pixel_values):
        return self.net(pixel_values)


class TakesDict(Through):
    def forward(self, batch):
        return self.net(batch["image"])


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()


def lazy():
    net = plain()
    net[1] = nn.LazyBatchNorm2d()
    return net


def not_a_number():
    net = plain()
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")
    return net


def no_number_in_statistics():
    net = plain()
    net[4].running_var[2] = float("nan")
    return net


REFUSED = {  # by every method, with words of the reason and the remedy
    "lazy": (lazy, r"lazy layer.*net\(images\)"),
    "meta": (lambda: plain().to("meta"), "device 'meta'"),
    "NaN": (not_a_number, r"contain NaN: '3.weight'.*load other weights"),
    "NaN statistics": (no_number_in_statistics, r"contain NaN: '4.running_var'"),
    "two inputs": (TwoInputs, r"images alone.*'mask'.*Wrap it"),
    "a mask that is None": (OptionalMask, r"images alone.*Wrap it"),
    "asks for another input": (Asks, r"images alone.*prompt_ids.*Wrap it"),
    "keyword": (Keyword, r"images alone.*Wrap it"),
    "dict": (TakesDict, r"images alone.*Wrap it"),
    "no forward": (NoForward, r"images alone"),
    "one output": (lambda: plain(classes=1), r"one output an image.*two logits|no linear layer"),
    "one squeezed output": (lambda: nn.Sequential(plain(), nn.Flatten(0)), r"logits"),
    "a tuple": (lambda: Through(run=lambda net, x: (net(x), x)), r"tuple of a tensor.*Wrap it"),
    "a dictionary": (lambda: Through(run=lambda net, x: {"out": net(x)}), r"keys 'out'.*Wrap it"),
    "maps": (lambda: Through(run=lambda net, x: net[:3](x)[:, :, None]), r"tensor of shape .*Wrap it"),
}


def functional(net, x):
    norm = net[1]
    x = F.batch_norm(net[0](x), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)
    return net[2:](x)


def pruned():
    net = plain()
    prune.l1_unstructured(net[1], "weight", 0.5)
    net(make_images(2))  # the weight is computed, and kept
    return net
