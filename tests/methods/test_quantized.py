"""Methods without gradients on nets quantised to int8: their steps, state and copies; the others refuse."""

import copy
import functools
import io
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.functional import linear, normalize

from lightning_tta import Backbone, UnsupportedModelError, adapt
from lightning_tta.backbones import state_digest
from lightning_tta.backbones.quantized import FORWARD_ONLY, has_quantized
from lightning_tta.backbones.split import HeadSplit, keep_classes
from lightning_tta.diagnosis import doctor
from nets import make_images, make_net, max_difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def static(net):
    """Convolutions and linear layers, by FX: no module with a float weight is left."""
    images = make_images(16)
    prepared = prepare_fx(net, get_default_qconfig_mapping(torch.backends.quantized.engine), (images,))
    prepared(images)
    return convert_fx(prepared)


def dynamic(net):
    """Linear layers alone."""
    return quantize_dynamic(net, {nn.Linear})


def graph(net):
    """PT2E: a graph of operations without modules."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    config = quantizer.get_default_x86_inductor_quantization_config()
    images = make_images(16)
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    prepared = pt2e.prepare_pt2e(program, quantizer.X86InductorQuantizer().set_global(config))
    prepared(images)
    return pt2e.convert_pt2e(prepared)


def weights(net):
    """torchao: weights of linear layers are a subclass of Tensor."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    return net


def activations(net):
    """torchao, with inputs quantised on the way."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(net, torchao.Int8DynamicActivationInt8WeightConfig())
    return net


MADE = {make.__name__: make for make in (static, dynamic, graph, weights, activations)}
CASES = [(kind, net) for kind in MADE for net in ("bn", "ln") if (kind, net) != ("static", "ln")]  # FX cannot trace it


@functools.cache
def make(kind, net, seed=0):
    """Not to be changed: the tests share it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what is deprecated
        return MADE[kind](make_net(net, seed=seed).requires_grad_(False))


def head_values(net, images):
    """Features that the head sees, its weight, bias and output, found without this package."""
    seen = []
    if not any(hasattr(module, "in_features") for module in net.modules()):  # a graph
        nodes = [n for n in net.graph.nodes if n.target == torch.ops.aten.linear.default]

        class Look(torch.fx.Interpreter):
            def run_node(self, node):
                if node is nodes[-1]:
                    seen.extend(self.fetch_args_kwargs_from_env(node)[0])
                return super().run_node(node)

        output = Look(net).run(images)
        return *(value.double() for value in seen), output
    hook = net.head.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    output = net(images)
    hook.remove()
    (features,) = seen
    weight, bias = (value() if callable(value) else value for value in (net.head.weight, net.head.bias))
    plain = features.dequantize() if features.is_quantized else features
    return plain.double(), weight.dequantize().double(), bias.double(), output


@pytest.mark.parametrize(("kind", "net"), CASES)
@torch.no_grad()
def test_split(kind, net):
    """Features are the values that the head gets, and g is linear with the values of the quantised weight."""
    quantized, images = make(kind, net), make_images(5, seed=3)
    features, weight, bias, output = head_values(quantized, images)
    split = HeadSplit(quantized)
    z, logits = split(images)
    assert type(split.head) is nn.Linear
    assert (split.num_features, split.num_classes) == (12, 5)
    assert torch.equal(z.double(), features)
    assert torch.equal(logits, output)
    shifted = z - z.mean(0)  # beyond the range that the head was calibrated for
    assert (split.head(shifted).double() - linear(shifted.double(), weight, bias)).abs().max() < 1e-5
    step = (logits.max() - logits.min()).item() / 40  # of the head's output or input, in 8 bits
    assert (split.head(z) - logits).abs().max() < step
    assert max_difference(copy.deepcopy(split)(images)[0], z) == 0
    assert has_quantized(quantized)
    assert not has_quantized(make_net(net))


@pytest.mark.parametrize(("kind", "net"), CASES)
@torch.no_grad()
def test_t3a_equals_reference(kind, net):
    quantized = make(kind, net)
    method = adapt(quantized, "t3a", filter_k=None)
    sums = normalize(head_values(quantized, make_images(1))[1], dim=1)
    for seed in range(3):
        images = make_images(6, seed=seed)
        features, _, _, output = head_values(quantized, images)
        for z, label in zip(normalize(features, dim=1), output.argmax(1), strict=True):
            sums[label] += z
        expected = features @ normalize(sums, dim=1).T
        assert (method(images).double() - expected).abs().max() < 1e-4
    with pytest.raises(UnsupportedModelError, match=r"shared, computed or quantised"):
        method.export()


@pytest.mark.parametrize("name", ["source", "t3a", "lame"])
@pytest.mark.parametrize(("kind", "net"), CASES)
def test_state_and_copies(kind, net, name):
    quantized, first, second = make(kind, net), make_images(5, seed=3), make_images(3, seed=4)
    before = state_digest(quantized)
    method = adapt(Backbone(quantized, [0.1] * 3, [0.9] * 3), name)
    logits = method(first)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    then = method.predict(second)
    method(second)
    method.reset()
    assert torch.equal(method(first), logits)
    twin = adapt(Backbone(make(kind, net), [0.1] * 3, [0.9] * 3), name)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=not kind.startswith(("weights", "activations"))))
    assert torch.equal(twin.predict(second), then)
    other = copy.deepcopy(method)
    other(second)
    assert torch.equal(method.predict(second), then)
    assert torch.equal(method.to("cpu").predict(second), then)
    assert state_digest(quantized) == before
    assert state_digest(make(kind, net, seed=1)) != before


LEARN = ["tent", "zerosiam", "memo", "cotta"]


@pytest.mark.parametrize("name", LEARN)
@pytest.mark.parametrize("kind", ["static", "dynamic", "graph", "activations"])
def test_gradient_methods_refuse(kind, name):
    """Where no gradient arrives: with the methods to use."""
    net = "bn" if kind == "static" else "ln"
    with pytest.raises(UnsupportedModelError, match=r"gradient.*'t3a', 'lame'"):
        adapt(make(kind, net), name)(make_images(4))


def test_gradients_pass_int8_weights():
    """torchao's kind that quantises weights alone has gradients: what is not quantised learns."""
    quantized, images = make("weights", "ln"), make_images(4)
    method = adapt(quantized.requires_grad_(False), "tent", lr=0.1)
    assert not torch.equal(method(images), method.predict(images))
    assert "model.qkv.weight" not in adapt(quantized, "memo").adaptable


def test_what_else_knows_of_it():
    quantized = make("dynamic", "bn")
    assert "quantised" in doctor(quantized, make_images(4)).facts["net"]
    with pytest.raises(UnsupportedModelError, match="quantised, and cannot be cut"):
        keep_classes(quantized, [0, 1])
    with pytest.raises(UnsupportedModelError, match="'t3a' or 'lame'"):
        adapt(make("static", "bn"), "norm")
    for name in ("t3a", "lame", "norm"):
        assert repr(name) in FORWARD_ONLY
        adapt(make("dynamic", "bn"), name)(make_images(4))


def test_packed_values_are_in_the_digest():
    """Also where a weight is so large that its text is shortened."""
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(768, 40)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    with torch.no_grad():
        nets[1][1].weight[20, 300] += 0.05  # in the middle
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, other = (state_digest(dynamic(net)) for net in nets)
    assert one != other


def test_a_parametrised_layer_is_not_quantised():
    net = make_net("gn")
    torch.nn.utils.parametrizations.weight_norm(net.conv1)
    assert not has_quantized(net)
