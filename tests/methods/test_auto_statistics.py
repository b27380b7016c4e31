"""``statistics="auto"`` against its equations in plain loops, in float64."""

# ruff: noqa: B023  # each function is called in its own turn of the loop

import math

import pytest
import torch
from torch import nn

from lightning_tta import adapt
from nets import make_images, make_net


def plain_auto(net, batches, *, groups=None, r=5.0, s=None, limit=0.8, least=0.18, horizon=1000, change=0.4):
    """Logits of each batch, by equations written out for each layer, class and image."""
    net = net.eval()
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    sources = [(m.running_mean.clone(), m.running_var.clone()) for m in layers]
    classes = 5 if groups is None else max(groups) + 1
    s = min(8.0, 0.8 * classes) if s is None else s
    numbers = [0.0] * classes
    sums = [[(torch.zeros_like(mean), torch.zeros_like(mean)) for _ in range(classes)] for mean, _ in sources]
    stored, results = list(sources), []
    for x in batches:
        rows = list(stored)
        inputs = {}

        def normalised(number, value):
            mean, var = rows[number]
            layer = layers[number]
            y = (value - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + layer.eps).sqrt()
            return y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

        for number, layer in enumerate(layers):
            layer.forward = lambda value, number=number: normalised(number, value)
        for number, layer in enumerate(layers):
            layer.forward = lambda value, number=number: (inputs.update({number: value}), normalised(number, value))[1]
        labels = net(x).argmax(1).tolist()
        changes = []
        for number in range(max(1, len(layers) // 4)):
            if sum(numbers) > 0:
                first, second = (sum(each[i] for each in sums[number]) / sum(numbers) for i in (0, 1))
                value = inputs[number]
                mean, square = value.mean((2, 3)).mean(0), (value**2).mean((2, 3)).mean(0)
                pairs = zip((square - mean**2).tolist(), (second - first**2).tolist(), strict=True)
                eps = layers[0].eps
                ratios = [min(abs(math.log((a + eps) / (b + eps))), 2.0) for a, b in pairs]
                changes.append(sum(ratios) / len(ratios))
        bound = change * (1 + 2 / math.sqrt(len(labels)))
        kept_before = 1 / (1 + (sum(changes) / len(changes) / bound) ** 8) if changes else 1.0
        numbers = [n * kept_before for n in numbers]
        for layer_sums in sums:
            for k, pair in enumerate(layer_sums):
                layer_sums[k] = tuple(each * kept_before for each in pair)
        labels = [label if groups is None else groups[label] for label in labels]
        new = [n + labels.count(k) for k, n in enumerate(numbers)]
        total, size = sum(new), len(labels)
        same = (sum(n * n for n in new) / total - 1) / max(total - 1, 1)
        same = min(max(same, 0.0), 1.0)
        own = sum((labels.count(k) / size) ** 2 for k in range(classes))
        trust = min((same + (1 - same) / size) / own, 1.0) ** 2
        after = [None] * len(layers)

        def taking_in(number, value):
            source_mean, source_var = sources[number]
            for k in range(classes):
                first, second = sums[number][k]
                for label, image in zip(labels, value, strict=True):
                    if label == k:
                        first = first + image.mean((1, 2))
                        second = second + (image**2).mean((1, 2))
                sums[number][k] = (first, second)
            seen = sum(n / (n + r) for n in new)
            alpha = limit * seen**2 / (seen**2 + s**2)
            mean = sum(first / (n + r) for n, (first, _) in zip(new, sums[number], strict=True)) / seen
            square = sum(second / (n + r) for n, (_, second) in zip(new, sums[number], strict=True)) / seen
            var = square - mean**2
            distance = (mean - source_mean) ** 2
            eps = layers[number].eps
            ratios = [abs(math.log((v.item() + eps) / (o.item() + eps))) for v, o in zip(var, source_var, strict=True)]
            shift = sum(min(ratio, 2.0) for ratio in ratios) / len(ratios)
            alpha *= shift**8 / (shift**8 + least**8)
            after[number] = (
                (1 - alpha) * source_mean + alpha * mean,
                (1 - alpha) * source_var + alpha * var + alpha * (1 - alpha) * distance,
            )
            rows[number] = tuple(
                (1 - trust) * b + trust * a for b, a in zip(stored[number], after[number], strict=True)
            )
            return normalised(number, value)

        for number, layer in enumerate(layers):
            layer.forward = lambda value, number=number: taking_in(number, value)
        results.append(net(x).detach())
        stored = after
        room = max(horizon / classes, r)
        for k, n in enumerate(new):
            kept = min(room / max(n, 1), 1.0)
            numbers[k] = n * kept
            for layer_sums in sums:
                layer_sums[k] = tuple(each * kept for each in layer_sums[k])
    return results, stored


BATCHES = [make_images(size, seed=number).double() for number, size in enumerate([8, 1, 5, 8, 3])]


@pytest.mark.parametrize(
    "options", [{}, {"horizon": 10, "images": 1.0, "classes_needed": 1.0}, {"least_change": 0.05}], ids=str
)
def test_against_plain_loops(options):
    net = make_net("bn", seed=0).double()
    method = adapt(net, "norm", statistics={"kind": "auto", **options})
    names = {"horizon": "horizon", "images": "r", "classes_needed": "s", "least_change": "change"}
    expected, stored = plain_auto(net, BATCHES, **{names[name]: value for name, value in options.items()})
    for x, logits in zip(BATCHES, expected, strict=True):
        assert torch.allclose(method(x), logits, rtol=1e-10, atol=1e-10)
    plain = method.export()
    layers = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer, (mean, var) in zip(layers, stored, strict=True):
        assert torch.allclose(layer.running_mean, mean, rtol=1e-10, atol=1e-10)
        assert torch.allclose(layer.running_var, var, rtol=1e-10, atol=1e-10)


def test_classes_that_share_rows():
    net = make_net("bn", seed=0).double()
    method = adapt(net, "norm", statistics={"kind": "auto", "groups": 2})
    groups = method.value("statistics.groups").tolist()
    assert sorted(set(groups)) == [0, 1]
    expected, _ = plain_auto(net, BATCHES, groups=groups)
    for x, logits in zip(BATCHES, expected, strict=True):
        assert torch.allclose(method(x), logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("seen", "share"), [(1, 0.8 / 65), (4, 0.8 * 16 / 80), (10, 0.8 * 100 / 164)])
def test_the_share_of_the_stream_follows_the_number_of_classes_seen(seen, share):
    method = adapt(make_net("bn", seed=0), "norm", statistics={"kind": "auto", "classes": 10, "groups": 10})
    seen = torch.tensor(float(seen))
    source, stream = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [40.0 + 9.0]])  # mean 3, variance 40
    mean, var = method.account.shrunk(stream * seen, seen, source, 0.0)
    assert torch.allclose(mean, torch.tensor(1 + share * 2), atol=1e-4)
    assert torch.allclose(var, torch.tensor(2 + share * 38 + share * (1 - share) * 4), atol=1e-4)


@pytest.mark.parametrize(("shift", "kept"), [(0.09, 256 / 257), (0.18, 0.5), (0.36, 1 / 257)])
def test_a_layer_whose_variances_are_those_of_the_source_stays_there(shift, kept):
    method = adapt(make_net("bn", seed=0), "norm", statistics={"kind": "auto", "classes": 10, "groups": 10})
    seen = torch.tensor(10.0)
    source = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    stream = torch.tensor([[1.0, 1.0], [1 + math.exp(shift), 1 + math.exp(-shift)]])  # mean 1
    mean, _ = method.account.shrunk(stream * seen, seen, source, 0.0)
    assert torch.allclose(mean, torch.tensor((1 - kept) * 0.8 * 100 / 164), atol=1e-4)


def test_what_a_batch_is_trusted_with():
    """All of a batch that is as diverse as the stream; little of one of a single class in a stream of many."""
    method = adapt(make_net("bn", seed=0), "norm", statistics="auto")
    with torch.no_grad():
        method.value("statistics.counts").fill_(40.0)
    account = method.account
    account.look(method, torch.cat([make_images(8, seed=n) for n in range(4)]))
    labels = account.cells
    counts = torch.bincount(labels, minlength=5) + 40.0
    n = counts.sum()
    same = (counts.square().sum() / n - 1) / (n - 1)
    expected = (same + (1 - same) / 32) / (torch.bincount(labels) / 32.0).square().sum()
    assert torch.allclose(account.batch.trust, expected.clamp(max=1) ** 2)
