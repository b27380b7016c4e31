"""Every kind of statistics against its equations, once more in plain loops and float64: logits, gradients, state."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tta import adapt
from lightning_tta.methods.components.class_statistics import alike
from lightning_tta.methods.components.statistics import KINDS
from nets import make_images, make_net, max_difference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:statistics='instance' is for nets"),
    pytest.mark.filterwarnings("ignore:.*are too small for that"),
]


def over(x):
    """The dimensions of a batch but for the channels."""
    return [0, *range(2, x.ndim)]


def spread(value, x):
    """Channels in the layout of x."""
    return value.view(1, -1, *[1] * (x.ndim - 2))


class Layer(nn.Module):
    """A BatchNorm layer written out; subclasses say with which mean and variance, and what is kept."""

    def __init__(self, layer, options):
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.M, self.V = layer.running_mean.clone(), layer.running_var.clone()
        self.options, self.keeps = options, False
        self.start()

    def start(self):
        self.mean, self.var = self.M.clone(), self.V.clone()

    def affine(self, normed):
        return normed * spread(self.weight, normed) + spread(self.bias, normed)

    def by(self, x, mean, var):
        return (x - spread(mean, x)) / spread((var + self.eps).sqrt(), x)

    def forward(self, x):
        return self.affine(self.normalise(x))

    def state(self):
        return torch.stack([self.mean, self.var])


class BatchLayer(Layer):
    images = 0

    def normalise(self, x):
        mean, var = x.mean(over(x)), x.var(over(x), correction=0)
        if self.keeps:
            self.average(mean.detach(), var.detach(), len(x))
        return self.by(x, mean, var)

    def average(self, mean, var, images):
        w = images / (self.images + images)
        self.var = (1 - w) * self.var + w * var + w * (1 - w) * (mean - self.mean) ** 2
        self.mean = (1 - w) * self.mean + w * mean
        self.images += images


class SourceLayer(Layer):
    def normalise(self, x):
        return self.by(x, self.M, self.V)


class MixedLayer(BatchLayer):
    def normalise(self, x):
        mean, var = x.detach().mean(over(x)), x.detach().var(over(x), correction=0)
        if self.keeps:
            self.average(mean, var, len(x))
        w = self.options["source_weight"]
        cross = w * (1 - w) * (self.M - mean) ** 2 if self.options.get("cross_term") else 0
        return self.by(x, w * self.M + (1 - w) * mean, w * self.V + (1 - w) * var + cross)


class EMALayer(Layer):
    moves = False

    def move(self, x):
        m, x = self.options["momentum"], x.detach()
        if self.options.get("start") == "batch" and not self.moves:
            m = 1
        mean = (1 - m) * self.mean + m * x.mean(over(x))
        var = (1 - m) * self.var + m * x.var(over(x), correction=0)
        if self.keeps:
            self.mean, self.var, self.moves = mean, var, True
        return mean, var

    def normalise(self, x):
        return self.by(x, *self.move(x))


class RenormalizedLayer(EMALayer):
    def normalise(self, x):
        mean, var = self.move(x)
        batch, deviation = x.mean(over(x)), (x.var(over(x), correction=0) + self.eps).sqrt()
        r = (deviation / (var + self.eps).sqrt()).detach()
        d = ((batch - mean) / (var + self.eps).sqrt()).detach()
        if "rmax" in self.options:
            r = r.clamp(1 / self.options["rmax"], self.options["rmax"])
        if "dmax" in self.options:
            d = d.clamp(-self.options["dmax"], self.options["dmax"])
        return (x - spread(batch, x)) / spread(deviation, x) * spread(r, x) + spread(d, x)


class MedianLayer(BatchLayer):
    def normalise(self, x):
        columns = [x[:, c].detach().flatten().sort().values for c in range(x.shape[1])]
        median = torch.stack([column[(len(column) - 1) // 2] for column in columns])
        var = (x - spread(median, x)).square().mean(over(x))
        if self.keeps:
            self.average(median, var.detach(), len(x))
        return self.by(x, median, var)


class InstanceLayer(EMALayer):
    def normalise(self, x):
        M, V = self.mean, self.var
        self.move(x)
        n = x[0, 0].numel()
        if n == 1:
            return self.by(x, M, V)
        rows = []
        for image in x:
            values = image.detach().flatten(1)
            mean, var = values.mean(1), values.var(1)
            a = self.options["k"] * ((V + self.eps) / n).sqrt()
            b = self.options["k"] * (V + self.eps) * math.sqrt(2 / (n - 1))
            mean = M + (mean - M).sign() * ((mean - M).abs() - a).clamp(min=0)
            var = (V + (var - V).sign() * ((var - V).abs() - b).clamp(min=0)).clamp(min=0)
            rows.append(self.by(image[None], mean, var))
        return torch.cat(rows)


def class_step(mean, var, x, labels, eta, gamma):
    """TRIBE's update of mean and var (K, C) by images x with labels."""
    K = len(mean)
    delta, s, (n, m) = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros(2, K, dtype=torch.float64)
    for k in range(K):
        images = [image.reshape(len(image), -1) for image, label in zip(x, labels, strict=True) if label == k]
        n[k] = len(images)
        if not images:
            continue
        m[k] = 1 / n[k] if n[k] > 1 / eta else eta
        delta[k] = m[k] * sum(image.mean(1) - mean[k] for image in images)
        s[k] = sum((image - mean[k][:, None]).square().mean(1) for image in images)
    m, n = m[:, None], n[:, None]
    new_mean = mean + (1 - gamma) * delta + gamma * delta.mean(0)
    own = m * (s - n * var) - delta**2
    common = (m * s - delta**2).mean(0) - (m * n).mean() * var
    return new_mean, var + (1 - gamma) * own + gamma * common


def total(mean, var):
    return mean.mean(0), var.mean(0) + mean.var(0, correction=0)


class BalancedLayer(Layer):
    labels = None  # of the batch

    def start(self):
        K = self.options["K"]
        self.rows = self.M.repeat(K, 1), self.V.repeat(K, 1)

    def normalise(self, x):
        if self.labels is None:
            return self.by(x, *total(*self.rows))
        rows = class_step(*self.rows, x.detach(), self.labels, self.options["eta"], self.options.get("gamma", 0.0))
        if self.keeps:
            self.rows = rows
        return self.by(x, *total(*rows))

    def state(self):
        return torch.stack(total(*self.rows))


class DomainLayer(BalancedLayer):
    domains = opening = None

    def start(self):
        super().start()
        self.by_domain = [None if d else self.source_rows() for d in range(self.options["domains"])]

    def source_rows(self):
        return self.M.repeat(self.options["K"], 1), self.V.repeat(self.options["K"], 1)

    def normalise(self, x):
        if self.domains is None:
            if x.ndim > 2:
                self.moments = [(image.flatten(1).mean(1), image.flatten(1).var(1, correction=0)) for image in x]
            return super().normalise(x)
        by_domain = list(self.by_domain)
        if self.opening is not None:
            by_domain[self.opening] = self.source_rows()
        result = [None] * len(x)
        for d in sorted(set(self.domains)):
            members = [i for i, other in enumerate(self.domains) if other == d]
            labels = [self.labels[i] for i in members]
            by_domain[d] = class_step(*by_domain[d], x.detach()[members], labels, self.options["eta"], 0.0)
            for i in members:
                result[i] = self.by(x[i : i + 1], *total(*by_domain[d]))
        if self.keeps:
            self.by_domain = by_domain
        return torch.cat(result)


def distance(moments, mean, var):
    return float(((moments[0] - mean) ** 2 + (moments[1].sqrt() - var.sqrt()) ** 2).sum())


class Reference:
    """Tent by plain gradient descent, or the source, with layers written out."""

    def __init__(self, net, layers, lr, **options):
        self.net, self.lr = copy.deepcopy(net), lr
        self.layers = {}
        for name, module in list(self.net.named_modules()):
            if isinstance(module, _BatchNorm):
                self.layers[name] = layers(module, options)
                path, _, leaf = name.rpartition(".")
                setattr(self.net.get_submodule(path), leaf, self.layers[name])
        self.opened, self.used, self.at = {0: 1}, {0: 0}, options.get("layer")

    def set(self, **values):
        for layer in self.layers.values():
            for name, value in values.items():
                setattr(layer, name, value)

    def __call__(self, x):
        first = next(iter(self.layers.values()))
        if isinstance(first, BalancedLayer):
            self.set(labels=None, domains=None, keeps=False)
            with torch.no_grad():
                labels = self.net(x).argmax(1).tolist()
            self.set(labels=labels)
        if isinstance(first, DomainLayer):
            self.set(keeps=True)
            with torch.no_grad():
                self.net(x)
            self.find_domains(len(x))
        self.set(keeps=True)
        logits = self.net(x)
        self.set(keeps=False)
        if self.lr:
            loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            learned = [p for layer in self.layers.values() for p in (layer.weight, layer.bias)]
            gradients = torch.autograd.grad(loss, learned)
            with torch.no_grad():
                for parameter, gradient in zip(learned, gradients, strict=True):
                    parameter -= self.lr * gradient
        return logits.detach()

    def find_domains(self, images):
        layer = self.layers[self.at]
        room = layer.options["domains"]
        source = total(*layer.source_rows())
        known = {d: total(*layer.by_domain[d]) for d in self.opened}
        table = [{d: distance(layer.moments[i], *known[d]) for d in known} for i in range(images)]
        fresh = [distance(layer.moments[i], *source) < min(table[i].values()) for i in range(images)]
        opening = None
        if any(fresh):
            closed = [d for d in range(room) if d not in self.opened]
            oldest = sorted(self.opened, key=self.opened.get)[: room // 2]
            opening = closed[0] if closed else min(sorted(oldest), key=self.used.get)
            self.opened[opening], self.used[opening] = max(self.opened.values()) + 1, 0
        for row in table:
            row.pop(opening, None)
        domains = [opening if f else min(row, key=row.get) for f, row in zip(fresh, table, strict=True)]
        for d in domains:
            self.used[d] += 1
        self.set(domains=domains, opening=opening)


K = 5
CASES = {
    "batch": (BatchLayer, {}),
    "source": (SourceLayer, {}),
    "mixed": (MixedLayer, {"source_weight": 0.6}),
    "mixed cross": (MixedLayer, {"source_weight": 0.6, "cross_term": True}),
    "ema": (EMALayer, {"momentum": 0.2}),
    "ema from the batch": (EMALayer, {"momentum": 0.2, "start": "batch"}),
    "renormalized": (RenormalizedLayer, {"momentum": 0.2}),
    "renormalized from the batch": (RenormalizedLayer, {"momentum": 0.2, "start": "batch"}),
    "renormalized bounds": (RenormalizedLayer, {"momentum": 0.2, "rmax": 1.2, "dmax": 0.1}),
    "balanced": (BalancedLayer, {"eta": 0.3, "gamma": 0.0}),
    "balanced gamma": (BalancedLayer, {"eta": 0.4, "gamma": 0.3}),
    "domains": (DomainLayer, {"eta": 0.3, "domains": 3, "layer": "stem.0"}),
    "median": (MedianLayer, {}),
    "instance": (InstanceLayer, {"k": 0.7, "momentum": 0.0}),
    "instance moving": (InstanceLayer, {"k": 0.7, "momentum": 0.2}),
}


def stream(case="", sizes=(7, 5, 8, 6)):
    """Batches; for domains of different brightness, one of them with images of two."""
    if case != "domains":
        return [make_images(size, seed=number, dtype=torch.float64) for number, size in enumerate(sizes)]
    noise = [torch.rand(7, 3, 16, 16, dtype=torch.float64) for _ in range(7)]
    batches = [0.6 * (x - 0.5) + at for x, at in zip(noise, (0.3, 0.6, 0.45, 0.52, 0.3, 0.495, 0.68), strict=True)]
    batches[4][:3] += 0.3
    return batches


def pair(case, lr):
    layer, options = CASES[case]
    kind, net = case.split()[0], make_net("user", K).double()
    if kind == "domains":  # the source is in the middle of them
        net.stem[0].running_mean.fill_(0.5)
        net.stem[0].running_var.fill_(0.03)
    extra = {"K": K} if kind in ("balanced", "domains") else {}
    reference = Reference(net, layer, lr, **options, **extra)
    settings = {"lr": lr, "optimizer": "sgd", "momentum": 0.0} if lr else {}
    method = adapt(net, "tent" if lr else "source", statistics={"kind": kind, **options}, **settings)
    return method, reference


@pytest.mark.parametrize("lr", [0.0, 0.3], ids=["source", "tent"])
@pytest.mark.parametrize("case", CASES)
def test_reference(case, lr):
    method, reference = pair(case, lr)
    for x in stream(case):
        expected = reference(x)
        assert max_difference(method(x), expected) < 1e-11
    if lr:
        for name, layer in reference.layers.items():
            for leaf in ("weight", "bias"):
                found = method.adaptable[f"model.{name}.{leaf}"].detach()
                assert max_difference(found, getattr(layer, leaf).detach()) < 1e-11
    state = torch.cat([layer.state() for layer in reference.layers.values()], 1)
    kind = case.split()[0]
    if kind != "source":
        name = "stream.moments" if kind == "batch" else "statistics.moments"
        assert max_difference(method.value(name), state) < 1e-11
        assert max_difference(method.value(name), method.source_value(name).expand_as(state)) > 1e-3 or (
            case == "instance"
        )
    if kind in ("balanced", "domains"):
        rows = torch.cat([torch.stack(layer.rows) for layer in reference.layers.values()], 2)
        assert max_difference(method.value("statistics.classes"), rows) < 1e-11
    if kind == "domains":
        for d in range(3):
            tables = [layer.by_domain[d] or layer.source_rows() for layer in reference.layers.values()]
            rows = torch.cat([torch.stack(each) for each in tables], 2)
            found = method.value("statistics.domain_classes").view(2, 3, K, -1)[:, d]
            assert max_difference(found, rows) < 1e-11
        assert method.value("statistics.opened").tolist() == [reference.opened.get(d, 0) for d in range(3)]
        assert method.value("statistics.used").tolist() == [reference.used.get(d, 0) for d in range(3)]
        assert max(reference.opened.values()) > 3  # one made room


def test_every_kind_has_a_reference():
    assert {case.split()[0] for case in CASES} >= set(KINDS) - {"auto"}


def test_renormalized_is_ema_with_the_gradient_of_the_batch():
    net, x = make_net("user").double(), stream()[0]
    logits, weights = {}, {}
    for kind in ("ema", "renormalized", "batch"):
        method = adapt(net, "tent", lr=0.3, optimizer="sgd", statistics=kind)
        logits[kind], weights[kind] = method(x), method.adaptable["model.stem.0.weight"]
    assert torch.equal(logits["ema"], logits["renormalized"])
    assert max_difference(weights["ema"].detach(), weights["renormalized"].detach()) > 1e-3


@pytest.mark.parametrize("kind", ["renormalized", "median"])
def test_gradient_by_the_input(kind):
    """What comes before the first layer learns through the batch's moments: a shift of all inputs does nothing."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    method = adapt(net.double().eval(), "tent", lr=1.0, optimizer="sgd", momentum=0.0, statistics=kind)
    before = method.model[0].bias.detach().clone()
    method(stream()[0])
    moved = max_difference(method.model[0].bias.detach(), before)
    assert moved < 1e-12 if kind == "renormalized" else moved > 1e-6


def test_groups_are_alike():
    torch.manual_seed(0)
    centers = torch.randn(4, 16)
    weight = torch.cat([centers + 0.1 * torch.randn(4, 16) for _ in range(5)])  # class k is of center k % 4
    of = alike(weight, 4)
    assert torch.bincount(of).tolist() == [5] * 4
    assert all(len(set(of[k::4].tolist())) == 1 for k in range(4))
    assert sorted(torch.bincount(alike(weight, 6)).tolist()) == [3, 3, 3, 3, 4, 4]
    assert alike(weight, 20).sort().values.tolist() == list(range(20))


def test_shared_rows_are_those_of_a_net_with_fewer_classes():
    """With every label replaced by its group."""
    net = make_net("user", K).double()
    options = {"kind": "balanced", "eta": 0.3, "gamma": 0.1, "groups": 2}
    method, reference = adapt(net, "source", statistics=options), Reference(net, BalancedLayer, 0.0, **options, K=2)
    of = method.value("statistics.groups").tolist()
    assert sorted(set(of)) == [0, 1]
    plain = reference.net.forward
    reference.net.forward = lambda x: plain(x)
    for x in stream():
        reference.set(labels=None)
        with torch.no_grad():
            labels = [of[k] for k in reference.net(x).argmax(1).tolist()]
            reference.set(labels=labels, keeps=True)
            expected = reference.net(x)
        reference.set(keeps=False)
        assert max_difference(method(x), expected) < 1e-11


def test_memory_is_bounded_and_said():
    net = make_net("bn", 40)  # 20 channels
    account = adapt(net, "source", statistics={"kind": "balanced", "max_bytes": 1600}).account
    assert (account.groups, account.memory_bytes) == (10, 1600)
    method = adapt(net, "source", statistics={"kind": "domains", "max_bytes": 3200, "domains": 4})
    assert (method.account.groups, method.account.memory_bytes) == (4, 3200)
    held = sum(method.value(f"statistics.{name}").numel() * 4 for name in ("classes", "domain_classes"))
    assert held == 3200
    assert adapt(net, "source", statistics="balanced").account.memory_bytes == 40 * 20 * 2 * 4
