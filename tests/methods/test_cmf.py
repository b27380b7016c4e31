"""CMF against the plain net of ROID's test, with the Kalman filter written out."""

import pytest
import torch
from test_roid import TOLERANCE, PlainROID, assert_same_weights, views  # noqa: F401  # a fixture

from lightning_tta import adapt
from nets import KINDS, make_images, make_net, make_stream, max_difference

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainCMF(PlainROID):
    def __init__(self, net, alpha, noise, **options):
        super().__init__(net, **options)
        self.alpha, self.hidden, self.variance = alpha, {n: w.clone() for n, w in self.source.items()}, 0.0
        self.q = None
        self.noise = noise * sum(w.numel() for w in self.weights.values()) / 38400

    def merge(self):
        a, r = self.alpha, 1 - min(self.noise, 1)
        self.variance = a * a * self.variance + 1 - r
        self.beta = r / (self.variance + r)
        self.beta = max(self.beta, 0.89)
        self.beta = self.beta if self.beta < 0.9999 else 1.0
        self.variance *= self.beta
        for name, weight in self.weights.items():
            hidden = a * self.hidden[name] + (1 - a) * self.source[name]
            self.hidden[name] = self.beta * hidden + (1 - self.beta) * weight
            weight.copy_(self.keep * weight + (1 - self.keep) * self.hidden[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("noise", "expected"), [(0.01, [1.0, 1.0]), (20.0, [0.9, 0.995]), (1e6, [0.89, 0.89])], ids=["tiny", "some", "huge"]
)
def test_three_steps(kind, noise, expected, views):  # noqa: F811
    net = make_net(kind).double()
    method = adapt(net, "cmf", lr=1e-2, keep=0.8, hidden_keep=0.9, process_noise=noise)
    reference = PlainCMF(net, 0.9, noise, keep=0.8)
    for images in make_stream(3, batch=10, dtype=torch.float64):
        logits, loss = reference(images, images.mul(0.7).roll(1, -1))
        assert max_difference(method(images), logits) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(loss, rel=1e-9)
        assert method.stats["beta"] == pytest.approx(reference.beta)
        assert expected[0] <= reference.beta <= expected[1]
        assert_same_weights(method, reference)
        assert method.value("variance").item() == pytest.approx(reference.variance)
        for name, hidden in reference.hidden.items():
            assert max_difference(method.value(f"hidden.model.{name}"), hidden) < TOLERANCE
    method.reset()
    assert method.value("variance") == 0
    for name, weight in reference.source.items():
        assert torch.equal(method.value(f"hidden.model.{name}"), weight)


def test_layers_that_do_not_run_do_not_count():
    net = make_net("gn")
    method = adapt(net, "cmf", process_noise=5.0)
    method(make_images(4))
    net.unused = torch.nn.LayerNorm(1000)
    other = adapt(net, "cmf", process_noise=5.0)
    other(make_images(4))
    assert 0 < other.q == method.q


def test_the_hidden_net_stays_precise():
    with pytest.warns(UserWarning, match="to learn bfloat16 weights"):
        method = adapt(make_net("gn"), "cmf").bfloat16()
    assert {method.value(name).dtype for name in ("variance", "hidden.model.norm1.weight")} == {torch.float32}
