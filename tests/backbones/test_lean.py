"""Lean passes: the same bits as plain ones, forwards and backwards, and less that the graph keeps."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from contract import VARIANTS
from lightning_tta import adapt
from lightning_tta.backbones import lean as lean_module
from lightning_tta.backbones.lean import cut, lean_backward, pack_bits, unpack_bits
from lightning_tta.backbones.passes import safe_checkpoints
from nets import TOKENS_ONLY, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """What residual nets are made of, with a stem."""

    def __init__(self, norm=nn.BatchNorm2d, inplace=True, classes=5):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.relu = nn.ReLU(inplace=inplace)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=2), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), norm(8)
        self.average = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.relu6 = nn.ReLU6(inplace=inplace)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.stem(x))))
        x = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)
        return self.head(self.relu6(self.average(x)).mean((2, 3)) * 3)


def norm_only(net):
    """Norm parameters learn, in the order of registration; BatchNorm takes the statistics of the batch."""
    net.requires_grad_(False)
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))]
    for module in norms:
        module.train()
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.normal_(module.bias, std=0.2)
    return [p.requires_grad_() for module in norms for p in module.parameters()]


def kept(run):
    """What ``run`` returns, and the tensors that its graph keeps, one a memory."""
    tensors = {}

    def pack(tensor):
        tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, list(tensors.values())


def size(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def passes(net, x, learned, contexts):
    """Logits, gradients of an entropy, and what the graph keeps, of a pass in each context."""
    results = []
    for context in contexts:
        with safe_checkpoints(), context:  # as a method's passes: GroupNorm ends the process in older torch
            logits, tensors = kept(lambda: net(x))
            entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
            results.append((logits.detach(), torch.autograd.grad(entropy, learned), tensors))
    return results


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 17)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 8, (3, 1), (2, 1), (1, 0), (2, 1), groups=4, bias=False), (2, 4, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1, groups=2), (2, 2, 5, 6, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (2, 4, 9, 8)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, 3, dilation=2), (2, 4, 9)),
    "relu": (nn.ReLU, (2, 4, 9, 8)),
    "relu, odd number": (nn.ReLU, (3, 5, 7)),
    "relu6": (nn.ReLU6, (2, 4, 9, 8)),
    "hardtanh": (lambda: nn.Hardtanh(-1, 2), (2, 4, 9, 8)),
    "leaky": (lambda: nn.LeakyReLU(0.1), (2, 4, 9, 8)),
    "max": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 4, 9, 8)),
    "max, dilated": (lambda: nn.MaxPool2d((2, 3), dilation=(1, 2)), (2, 4, 9, 8)),
    "max 3d": (lambda: nn.MaxPool3d(2), (2, 4, 9, 8, 6)),
    "average": (lambda: nn.AvgPool2d(3, 2, 1), (2, 4, 9, 8)),
    "average 3d": (lambda: nn.AvgPool3d(2, divisor_override=3), (2, 4, 9, 8, 6)),
}
KEEPS_NOTHING = ("conv", "grouped", "pointwise", "transposed", "average")


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "one image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_same_bits_and_keeps_less(name, dtype, layout):
    make, shape = LAYERS[name]
    if name == "average 3d" and dtype == torch.bfloat16:
        pytest.skip("torch has no such kernel")
    layer = nn.Sequential(make().to(dtype)).requires_grad_(False)
    source = (6 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
    results = []
    for context in (nullcontext(), lean_backward(layer)):
        x = source * 1
        if layout == "channels last" and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "transposed":
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout == "one image":
            x = x[0]
        with context:
            y, tensors = kept(lambda x=x: layer(x))
        weight = torch.arange(y.numel()).view(y.shape).to(dtype).sin()
        (gradient,) = torch.autograd.grad((y * weight).sum(), source)
        tensors = [t for t in tensors if not any(t is p for p in layer.parameters())]
        results.append((y.detach(), gradient, y.stride(), size(tensors)))
    (y, gradient, strides, plain), (lean_y, lean_gradient, lean_strides, lean) = results
    assert torch.equal(y, lean_y)
    assert torch.equal(gradient, lean_gradient)
    assert gradient.abs().sum() > 0
    assert strides == lean_strides
    if layout != "one image" or "relu" in name:
        assert lean < plain
        assert lean == 0 or not name.startswith(KEEPS_NOTHING)


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_values_at_the_kinks(slope):
    kind = nn.LeakyReLU(slope) if slope else nn.ReLU()
    net = nn.Sequential(nn.Identity(), kind)
    source = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, 1.0, -1.0], requires_grad=True)
    gradients = []
    for context in (nullcontext(), lean_backward(net)):
        with context:
            y = net(source)
        gradients.append(torch.autograd.grad(y, source, torch.tensor([torch.inf] * 8))[0])
    assert same(*gradients)


@pytest.mark.parametrize("layer", [nn.Hardtanh(-1, 0.7), nn.LeakyReLU(-0.1)])
def test_where_the_output_does_not_tell_the_layer_runs_as_it_is(layer):
    """0.7 is 0.6992 in bfloat16, which is also a value that passes; a negative slope turns signs around."""
    net = nn.Sequential(layer)
    source, gradients = torch.tensor([0.699, 0.7, 0.75, -2.0, 3.0]).bfloat16().requires_grad_(), []
    for context in (nullcontext(), lean_backward(net)):
        with context:
            gradients.append(torch.autograd.grad(net(source).sum(), source)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda width: nn.GroupNorm(2, width)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_net_keeps_norm_inputs_bits_and_little_else(norm, inplace, channels_last):
    net = Block(norm, inplace)
    learned = norm_only(net)
    x = torch.rand(4, 3, 16, 16)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    (logits, gradients, plain), (lean_logits, lean_gradients, lean) = passes(
        net, x, learned, [nullcontext(), lean_backward(net)]
    )
    assert torch.equal(logits, lean_logits)
    assert all(map(torch.equal, gradients, lean_gradients))
    stem, small = 4 * 8 * 16 * 16, 4 * 8 * 8 * 8  # values
    norms = 4 * (stem + 2 * small)  # bytes: each norm layer's input
    bits = (stem + 2 * small + small // 4) // 8
    places = 2 * small
    maps = [t for t in lean if not any(t is p for p in net.parameters()) and t.ndim not in (0, 2) and t.numel() > 8]
    assert size(maps) == norms + bits + places
    assert size(lean) < 0.62 * size(plain)


def test_second_derivatives():
    net = Block(inplace=False).double()
    learned = norm_only(net)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for context in (nullcontext(), lean_backward(net)):
        with context:
            loss = net(x).softmax(-1).square().sum()
            first = torch.autograd.grad(loss, learned, create_graph=True)
            results.append(torch.autograd.grad(sum(g.sin().sum() for g in first), learned))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*results, strict=True))
    with lean_backward(net):
        bias = net.bn1.bias
        run = lambda value: functional_call(net, {"bn1.bias": value}, x)  # noqa: E731
        assert torch.autograd.gradgradcheck(run, (bias.detach().clone().requires_grad_(),))


def test_autocast():
    """In bfloat16, with its gradients; the copies of frozen weights that autocast makes are not kept."""
    net = Block(lambda width: nn.GroupNorm(2, width))
    learned, x = norm_only(net), torch.rand(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        (logits, gradients, _), (lean_logits, lean_gradients, lean) = passes(
            net, x, learned, [nullcontext(), lean_backward(net)]
        )
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, lean_logits)
    assert all(map(torch.equal, gradients, lean_gradients))
    weights = {net.conv1.weight.shape, net.conv2.weight.shape}
    assert all(t.dtype == torch.float32 for t in lean if t.shape in weights)


@pytest.mark.parametrize("learns", [False, True])
def test_other_weights(learns):
    """``functional_call``: a layer runs with the weights that it has then, and their gradients come out."""
    net = Block()
    learned = [net.bn1.weight, net.bn1.bias]
    norm_only(net)
    weight = torch.randn_like(net.conv2.weight).requires_grad_(learns)
    wanted = [*learned, weight] if learns else learned
    x, results = torch.rand(4, 3, 16, 16), []
    for context in (nullcontext(), lean_backward(net)):
        with context:
            logits = functional_call(net, {"conv2.weight": weight}, x)
        results.append((logits, torch.autograd.grad(logits.square().sum(), wanted)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))
    assert not torch.equal(results[0][0], net(x))


def test_a_bias_that_learns_needs_no_input():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).requires_grad_(False)
    bias = net[0].bias.requires_grad_()
    x, results = torch.rand(2, 3, 8, 8), []
    for context in (nullcontext(), lean_backward(net)):
        with context:
            y, tensors = kept(lambda: net(x))
        results.append(torch.autograd.grad(y.square().sum(), bias)[0])
    assert torch.equal(*results)
    assert [t.shape for t in tensors] == [net[0].weight.shape]


def test_checkpointed_layers():
    net = Block()
    learned, x = norm_only(net), torch.rand(4, 3, 16, 16)
    plain = torch.autograd.grad(net(x).square().sum(), learned)
    with lean_backward(net):
        lean = torch.autograd.grad(checkpoint(net, x, use_reentrant=False).square().sum(), learned)
    assert all(map(torch.equal, plain, lean))


def test_where_a_convolution_learns_the_net_runs_as_it_is():
    net = Block()
    norm_only(net)
    net.conv2.weight.requires_grad_()
    with lean_backward(net):
        assert not any("forward" in vars(module) for module in net.modules())


class Functional(Block):
    """The same with functions."""

    def forward(self, x):
        x = self.pool(F.relu(self.bn(self.stem(x)), inplace=True))
        x = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_())) + x)
        return self.head(self.average(F.relu(x - 0.5)).mean((2, 3)) * 3)


def test_relu_as_a_function():
    net, x = Functional(), torch.rand(4, 3, 16, 16)
    learned = norm_only(net)
    (logits, gradients, plain), (lean_logits, lean_gradients, lean) = passes(
        net, x, learned, [nullcontext(), lean_backward(net)]
    )
    assert torch.equal(logits, lean_logits)
    assert all(map(torch.equal, gradients, lean_gradients))
    assert size(lean) < 0.62 * size(plain)


def test_only_what_is_free(monkeypatch):
    """Large inputs that no ReLU keeps: what follows SiLU, but nothing of a net with ReLU."""
    monkeypatch.setattr(lean_module, "LARGE", 4 * 8 * 8 * 8)
    x = torch.rand(4, 3, 16, 16)
    for activation, factor in ((nn.SiLU, 0.85), (nn.ReLU, 1)):
        net = Block()
        net.relu = activation()
        learned = norm_only(net)
        (logits, gradients, plain), (lean_logits, lean_gradients, lean) = passes(
            net, x, learned, [nullcontext(), lean_backward(net, only_free=True)]
        )
        assert torch.equal(logits, lean_logits)
        assert all(map(torch.equal, gradients, lean_gradients))
        assert size(lean) <= factor * size(plain)
    monkeypatch.setattr(lean_module, "LARGE", 4 * 8 * 16 * 16 + 1)  # larger than any
    net = Block()
    net.relu = nn.SiLU()
    norm_only(net)
    sizes = []
    for context in (nullcontext(), lean_backward(net, only_free=True)):
        with context:
            sizes.append(size(kept(lambda net=net: net(x))[1]))
    assert sizes[0] == sizes[1]


def test_forwards_come_back_and_those_of_others_stay():
    net = Block()
    norm_only(net)
    mine = lambda x: F.conv2d(x, net.conv2.weight) + 1  # noqa: E731
    net.conv2.forward = mine
    with lean_backward(net):
        assert net.conv2.forward is mine
        with lean_backward(net):
            assert "forward" in vars(net.relu)
        assert "forward" in vars(net.relu)
    with pytest.raises(ZeroDivisionError), lean_backward(net):
        1 / ("forward" not in vars(net.relu))
    assert [module for module in net.modules() if "forward" in vars(module)] == [net.conv2]


def test_a_copy_has_layers_of_its_own():
    net, x = Block(), torch.rand(4, 3, 16, 16)
    norm_only(net)
    with lean_backward(net):
        net(x)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.conv1.weight.mul_(2)
    with lean_backward(twin):
        assert torch.equal(twin(x), copy.deepcopy(twin)(x))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 4, 5), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_bits(shape, dtype):
    values = torch.rand(shape) < 0.5
    values = values.t() if values.ndim == 2 else values
    bits = pack_bits(values.clone())
    back = unpack_bits(bits, values.shape, values.stride(), dtype)
    assert torch.equal(back, values.to(dtype))
    assert bits.numel() == (values.numel() if values.numel() % 8 else values.numel() // 8)


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_cut_a_gradient(slope, dtype):
    """On a CPU and on other devices."""
    x, gradient = torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 3, 4, 4).to(dtype)
    gradient[0, 0, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    bits = pack_bits(x > 0)
    results = [cut(gradient, bits, x.shape, x.stride(), slope, select=select) for select in (False, True)]
    assert same(*results)
    assert same(
        results[0],
        torch.ops.aten.leaky_relu_backward(gradient, x, slope, False)
        if slope
        else torch.ops.aten.threshold_backward(gradient, x, 0),
    )


def test_the_host_reads_nothing():
    """Tensors without values, on a device that is no CPU: reading one raises."""
    with torch.device("meta"):
        net, x = Functional(), torch.rand(4, 3, 16, 16)
    learned = norm_only(net)
    with lean_backward(net):
        gradients = torch.autograd.grad(net(x).sum(), learned)
    assert [g.shape for g in gradients] == [p.shape for p in learned]


LEARN = [
    (name, o)
    for name in sorted(VARIANTS)
    for o in VARIANTS[name]
    if name not in ("norm", "t3a", "adanpc", "lame", "neo", "output_shift", "pea", "zero", *TOKENS_ONLY)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), LEARN, ids=[f"{n}-{i}" for i, (n, _) in enumerate(LEARN)])
def test_every_method_takes_the_same_steps(name, options):
    torch.manual_seed(0)
    net = Block().eval()
    norm_only(net)
    net.eval()
    plain, lean = (adapt(net, name, lean=flag, **options) for flag in (False, True))
    source = [{"image": images, "label": torch.arange(4) % 5} for images in make_stream(3, seed=7)]
    for images in make_stream(3):
        for method in (plain, lean):
            if not method.prepared:
                method.prepare(source)
        assert torch.equal(plain(images), lean(images))
    assert same(plain.state_dict(), lean.state_dict())


def test_methods_that_learn_norm_layers_keep_less():
    net, images = Block().eval(), make_stream(1)[0]
    sizes = {}
    for lean in (False, "auto", True):
        method = adapt(net, "tent", lean=lean)
        sizes[lean] = size(kept(lambda method=method: method(images))[1])
    assert sizes[True] < 0.7 * sizes[False]
    assert sizes["auto"] == sizes[False]  # small, and after ReLUs


def test_kept_casts_and_lean_layers_go_together():
    """Under bf16 a frozen convolution runs with a kept cast; it keeps no input either, and no cast of its own."""
    net, stream = Block().eval(), make_stream(3)
    methods = {lean: adapt(net, "tent", lr=0.1, lean=lean, precision="bf16") for lean in (False, True)}
    sizes = {}
    for images in stream:
        logits = {}
        for lean, method in methods.items():
            logits[lean], saved = kept(lambda method=method, images=images: method(images))
            sizes[lean] = size(saved)
        assert torch.equal(logits[False], logits[True])
    assert same(methods[False].state_dict(), methods[True].state_dict())
    assert sizes[True] < 0.8 * sizes[False]
    assert methods[True]._casts.nbytes > 0
