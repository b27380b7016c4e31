"""Nets as users bring them: computed weights, wrappers, layers that hide, outputs that are no logits; and their twins.

Each entry of :data:`RIGHT` gives a net and a plain net with the same function, whose numbers a method must give. Those
of :data:`REFUSED` cannot be adapted, or not at all, with a word of the reason; those of :data:`WARNED` can.
"""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from nets import make_net


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make()


def randomized(net):
    """Random statistics and affine parameters; returns the net in eval mode."""

    def change():
        for module in net.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
                if module.weight is not None:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.2)
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.normal_(std=0.2)
                    module.running_var.uniform_(0.3, 1.0)
        return net.eval()

    return seeded(change)


def layers(channels=3, classes=5):
    return [
        nn.Conv2d(channels, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 12, 3, 2, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, classes),
    ]


def plain(channels=3, classes=5):
    def make():
        net = randomized(nn.Sequential(*layers(channels, classes)))
        with torch.no_grad():
            net[-1].weight.mul_(4)
        return net

    return seeded(make)


class Through(nn.Module):
    """Runs a Sequential's layers in a way of its own."""

    def __init__(self, net, run=lambda net, x: net(x)):
        super().__init__()
        self.net, self.run = net, run

    def forward(self, x):
        return self.run(self.net, x)


def _checkpointed(reentrant):
    def run(net, x):
        for layer in net[:-1].split(3) if hasattr(net[:-1], "split") else [net[:3], net[3:6], net[6:8]]:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return net[-1](x)

    return lambda: (Through(plain(), run), Through(plain()))


def _timm_checkpointed():
    import timm

    nets = [seeded(lambda: timm.create_model("resnet10t", num_classes=5)) for _ in range(2)]
    nets = [randomized(net) for net in nets]
    nets[0].set_grad_checkpointing(True)
    return nets


def _densenet():
    from torchvision.models import DenseNet

    return [
        randomized(seeded(lambda: DenseNet(8, (2, 2), 16, num_classes=5, memory_efficient=m))) for m in (True, False)
    ]


def _weight_norm_old():
    import warnings

    net, twin = plain(), plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(net[3])
    net(torch.rand(2, 3, 16, 16))
    return net, twin


def _spectral_norm_old():
    net, twin = plain(), plain()
    seeded(lambda: torch.nn.utils.spectral_norm(net[3]))
    with torch.no_grad():
        net.train()(torch.rand(2, 3, 16, 16))
    net.eval()(torch.rand(2, 3, 16, 16))
    with torch.no_grad():
        twin[3].weight.copy_(net[3].weight)
    for one, other in zip(net.buffers(), twin.buffers()):
        pass
    for i in (1, 4):
        twin[i].load_state_dict(net[i].state_dict())
    return net, twin


class KeepsTensor(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        self.last = self.net(x)
        return self.last


def _keeps_tensor():
    net = KeepsTensor(plain())
    net(torch.rand(2, 3, 16, 16))
    return net, KeepsTensor(plain())


class Hook:
    def __call__(self, module, inputs, output):
        self.features = output


def _hook():
    net = Through(plain())
    net.net[5].register_forward_hook(Hook())
    net(torch.rand(2, 3, 16, 16))
    return net, Through(plain())


class UserNormalize(nn.Module):
    def __init__(self, trains=False):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.4, 0.5, 0.6]), requires_grad=trains)
        self.std = nn.Parameter(torch.tensor([0.2, 0.2, 0.3]), requires_grad=trains)

    def forward(self, x):
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class BufferNormalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))
        self.register_buffer("std", torch.tensor([0.2, 0.2, 0.3]))

    forward = UserNormalize.forward


def _normalize():
    return nn.Sequential(UserNormalize(), plain()), nn.Sequential(BufferNormalize(), plain())


def _normalize_inference():
    net = nn.Sequential(UserNormalize(), plain())
    return net.requires_grad_(False), nn.Sequential(BufferNormalize(), plain())


def _writes(net, x):
    x -= 0.5
    x *= 2
    return net(x)


def _writes_into_input():
    return Through(plain(), _writes), Through(plain(), lambda net, x: net((x - 0.5) * 2))


def _parametrized():
    net, twin = plain(), plain()

    class Same(nn.Module):
        def forward(self, w):
            return w * 1

    parametrize.register_parametrization(net[1], "weight", Same())
    return net, twin


def _orthogonal():
    net, twin = plain(), plain()
    parametrizations.weight_norm(net[3])
    return net, twin


def _pruned():
    net, twin = plain(), plain()
    prune.l1_unstructured(net[3], "weight", 0.5)
    net(torch.rand(2, 3, 16, 16))
    with torch.no_grad():
        twin[3].weight.copy_(net[3].weight)
    return net, twin


def _pruned_norm():
    net, twin = plain(), plain()
    prune.l1_unstructured(net[1], "weight", 0.5)
    with torch.no_grad():
        twin[1].weight.copy_(net[1].weight)
    return net, twin


class ListNet(nn.Module):
    """Goes through a plain list of its layers."""

    def __init__(self):
        super().__init__()
        self.net = plain()
        self.order = list(self.net)

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


class TwiceHeld(nn.Module):
    """Holds a layer under two names, and a third time in a tuple."""

    def __init__(self):
        super().__init__()
        self.net = plain()
        self.first = self.net[1]
        self.also = (self.net[4],)

    def forward(self, x):
        net = self.net
        x = self.also[0](net[3](net[2](self.first(net[0](x)))))
        return net[5:](x)


class BoundForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()
        self.call = self.net.forward

    def forward(self, x):
        return self.call(x)


class TwoTowers(nn.Module):
    """A text tower that does not run, and a vision tower registered last."""

    def __init__(self, text=True):
        super().__init__()
        if text:
            self.text = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(4)])
        self.vision = randomized(
            seeded(
                lambda: nn.Sequential(
                    *[
                        nn.Sequential(
                            nn.Conv2d(3 if i == 0 else 6, 6, 3, 1 if i else 2, 1),
                            nn.BatchNorm2d(6),
                            nn.ReLU(),
                            nn.Conv2d(6, 6, 1),
                            nn.BatchNorm2d(6),
                        )
                        for i in range(4)
                    ]
                )
            )
        )
        self.head = seeded(lambda: nn.Linear(6, 5))

    def forward(self, x, tokens=None):
        x = self.vision(x).mean((2, 3))
        if tokens is not None:
            x = x + self.text(tokens)
        return self.head(x)


def _data_parallel():
    return nn.DataParallel(plain()), plain()


def _inner_data_parallel():
    net = nn.Sequential(nn.DataParallel(plain()[:6]), *plain()[6:])
    return net, Through(plain())


def _compiled():
    return torch.compile(plain(), backend="eager"), plain()


class Output(dict):
    def __init__(self, logits):
        super().__init__(logits=logits)
        self.logits = logits


def _model_output():
    return Through(plain(), lambda net, x: SimpleNamespace(logits=net(x), loss=None)), Through(plain())


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    nets = [randomized(seeded(lambda: ViTForImageClassification(config))) for _ in range(2)]
    return nets[0], Through(nets[1], lambda net, x: net(x).logits)


def _hf_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5)
    nets = [randomized(seeded(lambda: ResNetForImageClassification(config))) for _ in range(2)]
    return nets[0], Through(nets[1], lambda net, x: net(x).logits)


def _tied():
    net = plain()
    net[4] = net[4]

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()
            self.conv, self.norm = seeded(lambda: nn.Conv2d(12, 12, 1)), self.net[4]

        def forward(self, x):
            x = self.net[:6](x)
            return self.net[6:](self.norm(self.conv(x)))

    return Tied(), Tied()


def _tied_parameter():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()
            self.other = nn.BatchNorm2d(12)
            self.other.weight, self.other.bias = self.net[4].weight, self.net[4].bias

        def forward(self, x):
            return self.net[6:](self.other(self.net[:6](x)))

    return Shared().eval(), Shared().eval()


class Integers(nn.Module):
    def __init__(self, more=True):
        super().__init__()
        self.net = plain()
        if more:
            self.table = nn.Parameter(torch.arange(4), requires_grad=False)
            self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))

    def forward(self, x):
        return self.net(x)


def _untracked():
    net = plain()
    for i in (1, 4):
        net[i] = nn.BatchNorm2d(net[i].num_features, track_running_stats=False)
    return net.eval(), copy.deepcopy(net).eval()


def _dropout():
    net = plain()
    net.insert(8, nn.Dropout(0.5))
    return net.train(), Through(plain())


class Functional(nn.Module):
    """Reads its layers' weights with F., and does not call them."""

    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, x):
        n = self.net[1]
        x = self.net[0](x)
        x = torch.nn.functional.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)
        return self.net[2:](x)


RIGHT = {
    "checkpoint": _checkpointed(False),
    "checkpoint, reentrant": _checkpointed(True),
    "timm checkpoint": _timm_checkpointed,
    "densenet memory efficient": _densenet,
    "old weight norm": _weight_norm_old,
    "old spectral norm": _spectral_norm_old,
    "keeps a tensor": _keeps_tensor,
    "hook keeps a tensor": _hook,
    "user's normalize": _normalize,
    "user's normalize, inference": _normalize_inference,
    "writes into its input": _writes_into_input,
    "parametrized bn": _parametrized,
    "weight norm": _orthogonal,
    "pruned": _pruned,
    "pruned norm": _pruned_norm,
    "plain list": lambda: (ListNet(), Through(plain())),
    "layer held twice": lambda: (TwiceHeld(), Through(plain())),
    "bound forward": lambda: (BoundForward(), Through(plain())),
    "two towers": lambda: (TwoTowers(), TwoTowers(False)),
    "data parallel": _data_parallel,
    "inner data parallel": _inner_data_parallel,
    "compiled": _compiled,
    "model output": _model_output,
    "transformers vit": _vit,
    "transformers resnet": _hf_resnet,
    "tied layer": _tied,
    "tied parameters": _tied_parameter,
    "integer and complex parameters": lambda: (Integers(), Integers(False)),
    "untracked": _untracked,
    "dropout": _dropout,
    "functional": lambda: (Functional(), Through(plain())),
}


def _nan():
    net = plain()
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")
    return net


def _lazy():
    net = plain()
    net[1] = nn.LazyBatchNorm2d()
    return net


def _quantized():
    from torch.ao.quantization import QConfigMapping, get_default_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = torch.rand(2, 3, 16, 16)
    prepared = prepare_fx(plain(), QConfigMapping().set_global(get_default_qconfig("x86")), x)
    prepared(x)
    return convert_fx(prepared)


class TwoInputs(nn.Module):
    def __init__(self, keyword=False):
        super().__init__()
        self.net = plain()

    def forward(self, x, mask):
        return self.net(x) * mask


class Keyword(TwoInputs):
    def forward(self, *, pixel_values):
        return self.net(pixel_values)


class WantsDict(TwoInputs):
    def forward(self, batch):
        return self.net(batch["image"])


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()


def _detached():
    return Through(plain(), lambda net, x: net[6:](net[:6](x).detach()))


REFUSED = {
    "quantized dynamically": lambda: quantize_dynamic(plain(), {nn.Linear}),
    "quantized": _quantized,
    "detaches": _detached,
    "lazy": _lazy,
    "meta": lambda: plain().to("meta"),
    "two inputs": TwoInputs,
    "keyword": Keyword,
    "dict input": WantsDict,
    "no forward": NoForward,
    "one output": lambda: plain(classes=1),
    "features": lambda: plain()[:6],
    "tuple": lambda: Through(plain(), lambda net, x: (net(x), x)),
    "dict": lambda: Through(plain(), lambda net, x: {"out": net(x)}),
    "scripted": lambda: torch.jit.trace(plain(), torch.rand(2, 3, 16, 16)),
    "nan": _nan,
    "softmax": lambda: nn.Sequential(plain(), nn.Softmax(1)),
    "log softmax": lambda: nn.Sequential(plain(), nn.LogSoftmax(1)),
    "sigmoid": lambda: nn.Sequential(plain(), nn.Sigmoid()),
    "one channel": lambda: plain(1),
    "two channels": lambda: plain(2),
    "four channels": lambda: plain(4),
    "six channels": lambda: plain(6),
}
CHANNELS = {"one channel": 1, "two channels": 2, "four channels": 4, "six channels": 6}
