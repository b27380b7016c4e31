"""Conjugate pseudo-labels against the authors' linear system, autograd and SGD written out."""

import pytest
import torch

from lightning_tta import adapt
from lightning_tta.losses import conjugate_poly, entropy
from nets import KINDS, make_images, make_net, make_stream, max_difference
from plain import TOLERANCE, PlainMethod, assert_same_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def poly(u, label, epsilon):
    """The training loss of logits and a soft label."""
    p = u.softmax(1)
    return torch.logsumexp(u, 1) - (label * u).sum(1) + epsilon * (label * (1 - p)).sum(1)


def label_by_system(p, epsilon):
    """(I + epsilon diag(p) - epsilon p p') y = p, sample by sample."""
    rows = [torch.eye(len(q), dtype=q.dtype) + epsilon * (torch.diag(q) - torch.outer(q, q)) for q in p]
    return torch.stack([torch.linalg.solve(matrix, q) for matrix, q in zip(rows, p, strict=True)])


class PlainConjugate(PlainMethod):
    def __init__(self, net, lr, loss, temperature, epsilon):
        super().__init__(net, lr)
        self.loss, self.temperature, self.epsilon = loss, temperature, epsilon

    def __call__(self, images):
        before = self.net(images)
        u = before / self.temperature
        p = u.softmax(1)
        epsilon = self.epsilon if self.loss == "poly" else 0.0
        label = label_by_system(p, epsilon) if self.loss == "poly" else p
        loss = poly(u, label, epsilon).mean()
        self.sgd.step(self.sgd.gradients(loss))
        return before.detach(), self.net(images).detach(), loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["cross_entropy", "poly"])
@pytest.mark.parametrize("after", [True, False])
def test_three_steps(kind, loss, after):
    net = make_net(kind).double()
    options = {"source_loss": loss, "temperature": 1.7, "poly_epsilon": 6.0}
    method = adapt(net, "conjugate_pl", lr=0.1, predict_after=after, **options)
    reference = PlainConjugate(net, 0.1, loss, 1.7, 6.0)
    assert method.returns == ("after the step" if after else "before the step")
    for images in make_stream(3, batch=6, dtype=torch.float64):
        *logits, value = reference(images)
        assert max_difference(method(images), logits[after]) < TOLERANCE
        assert method.stats["loss"] == pytest.approx(value, rel=1e-10)
        assert method.stats["forwards"] == 1 + after
        assert_same_sgd(method, reference.sgd)


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_the_label_takes_the_gradient_of_the_training_loss_away(classes):
    u = torch.randn(4, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(3)
    p = u.softmax(1)
    label = p / (1 + 6 * p)
    label = label / label.sum(1, keepdim=True)
    assert max_difference(label, label_by_system(p, 6.0)) < TOLERANCE
    u.requires_grad_()
    (gradient,) = torch.autograd.grad(poly(u, label, 6.0).sum(), u)
    assert gradient.abs().max() < TOLERANCE
    assert max_difference(conjugate_poly(u, 6.0).detach(), poly(u, label, 6.0).detach()) < TOLERANCE
    assert max_difference(conjugate_poly(u, 0.0), entropy(u)) < TOLERANCE


def test_extreme_logits_are_finite():
    u = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    values = conjugate_poly(u, 8.0)
    (gradient,) = torch.autograd.grad(values.sum(), u)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()


def test_with_cross_entropy_it_is_tent():
    tent = adapt(make_net("bn"), "tent", lr=0.1, optimizer="sgd")
    method = adapt(make_net("bn"), "conjugate_pl", lr=0.1, predict_after=False)
    for number in range(3):
        images = make_images(6, seed=number)
        assert torch.equal(method(images), tent(images))
