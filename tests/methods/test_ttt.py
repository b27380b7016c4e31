"""TTT against an encoder, a head and a branch written out; turns, crops, episodes, where heads are from."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn.functional import cross_entropy, silu

from lightning_tta import ConfigError, InputError, SourceClassifier, UnsupportedModelError, adapt
from lightning_tta.auxiliary.base import Trained, find_trained, note_trained
from lightning_tta.auxiliary.branch import Branch
from lightning_tta.auxiliary.rotation import Rotation, turn
from lightning_tta.modules.loading import load_source
from lightning_tta.views.crops import PADDING, crop_images
from nets import KINDS, make_images, make_net, make_stream, max_difference
from plain import TOLERANCE, PlainSGD

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = torch.tensor([3, 7])
FIXED = {"optimizer": "sgd", "augment": "none", "turns": "all"}


def with_branch(net, seed=1):
    """A net that says it was trained with a branch; its weights are random."""
    branch = Rotation(net).to(next(net.parameters()).dtype)
    generator = torch.Generator().manual_seed(seed)
    state = branch.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.1)
    note_trained(net, {"rotation": Trained({}, copy.deepcopy(state))})
    return net


class PlainTTT:
    """conv1, norm1 and conv2 are shared; the branch has a norm layer and a head of its own."""

    def __init__(self, net, branch, lr, momentum):
        self.net, self.branch = copy.deepcopy(net), copy.deepcopy(branch)
        shared = {n: p for n, p in self.net.named_parameters() if n.partition(".")[0] in ("conv1", "norm1", "conv2")}
        tensors = {**shared, **{f"branch.{n}": p for n, p in self.branch.named_parameters()}}
        self.sgd = PlainSGD({n: p.requires_grad_(True) for n, p in tensors.items()}, lr, momentum)

    def __call__(self, images, steps=1):
        for _ in range(steps):
            views = torch.cat([images, *(torch.rot90(images, k, (2, 3)) for k in (1, 2, 3))])
            z = self.net.conv2(silu(self.net.norm1(self.net.conv1(views))))
            z = silu(self.branch["norm2"](z)).mean((2, 3))
            logits = self.branch["head"](z)
            target = torch.arange(4).repeat_interleave(len(images))
            loss = -logits.log_softmax(1)[torch.arange(len(target)), target].mean()
            self.sgd.step(self.sgd.gradients(loss))
        return self.net(images).detach(), loss.item()


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_three_steps(kind):
    net = with_branch(make_net(kind).double())
    method = adapt(net, "ttt", lr=0.1, momentum=0.5, **FIXED)
    assert not method.needs_source
    reference = PlainTTT(net, method.auxiliary.branch.tail, 0.1, 0.5)
    for images in make_stream(3, batch=6, dtype=torch.float64):
        expected, loss = reference(images)
        assert max_difference(method(images), expected) < TOLERANCE
        assert abs(method.stats["loss"] - loss) < TOLERANCE
        for name, tensor in reference.sgd.tensors.items():
            own = name.replace("branch.", "auxiliary.branch.tail.") if "branch" in name else f"model.{name}"
            assert max_difference(method.adaptable[own].detach(), tensor.detach()) < TOLERANCE
        assert max_difference(method.predict(images), expected) < TOLERANCE
    assert reference.sgd.moved() > 1e-6


def test_episodic_steps_start_from_the_source():
    net = with_branch(make_net("gn").double())
    method = adapt(net, "ttt", lr=0.1, momentum=0.5, episodic=True, steps=3, **FIXED)
    before = copy.deepcopy(method.adaptable)
    for images in make_stream(2, dtype=torch.float64):
        expected, _ = PlainTTT(net, method.auxiliary.branch.tail, 0.1, 0.5)(images, steps=3)
        assert max_difference(method(images), expected) < TOLERANCE
        assert max_difference(expected, net(images).detach()) > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in method.adaptable.items())
    with pytest.raises(UnsupportedModelError, match="episodic=False"):
        method.export()


def test_the_branch_may_be_left_as_it_is():
    method = adapt(with_branch(make_net("gn")), "ttt", lr=0.1, fix_branch=True, **FIXED)
    before = copy.deepcopy(method.auxiliary.state_dict())
    method(make_images(4))
    assert all(torch.equal(value, before[name]) for name, value in method.auxiliary.state_dict().items())
    assert not torch.equal(method.model.conv1.weight, make_net("gn").conv1.weight)


def test_views_are_drawn_anew_for_each_step_and_again_after_a_reset():
    method = adapt(with_branch(make_net("gn")), "ttt", lr=0.1, views=3)
    images = make_images(4)
    first, second = method(images), method(images)
    moved = copy.deepcopy(method.adaptable)
    assert method.value("steps_taken") == 2
    method.reset()
    assert torch.equal(method(images), first)
    assert torch.equal(method(images), second)
    assert all(torch.equal(value, moved[name]) for name, value in method.adaptable.items())


def test_turns():
    images = torch.arange(8.0).view(2, 1, 2, 2)
    turned, quarters = turn(images, "all", KEY)
    assert quarters.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert turned[::2, 0].tolist() == [[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]
    many = make_images(400, size=4)
    turned, quarters = turn(many, "random", KEY)
    for image, result, number in zip(many, turned, quarters.tolist(), strict=True):
        assert torch.equal(torch.rot90(image, number, (1, 2)), result)
    assert quarters.bincount().min() > 60
    with pytest.raises(InputError, match="square"):
        turn(images[..., :1], "all", KEY)


def test_crops():
    images = make_images(300, size=6) + 0.1
    assert crop_images(images, "none", KEY) is images
    places = set()
    for image, view in zip(images, crop_images(images, "crop_flip", KEY), strict=True):
        padded = torch.nn.functional.pad(image, (PADDING,) * 4)
        windows = {
            (top, left, flip): window if not flip else window.flip(-1)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            for window in [padded[:, top : top + 6, left : left + 6]]
        }
        found = [place for place, window in windows.items() if torch.equal(window, view)]
        assert found
        places.update(found)
    assert len(places) > 100
    assert {flip for _, _, flip in places} == {False, True}
    kept = crop_images(images, "crop", KEY)
    assert kept.shape == images.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_at_its_start_is_the_net(kind):
    """With the net's own head in place of the four outputs, and shares every module before its stage."""
    net, images = make_net(kind), make_images(3)
    for at in (0.3, 0.67):
        branch = Branch(net, at, 5).eval()
        owner = branch.tail[branch.names[-1].replace(".", "/")]
        assert isinstance(owner, torch.nn.Linear)
        owner.load_state_dict(net.head.state_dict())
        with branch.running(net):
            assert torch.equal(net(images), make_net(kind)(images))
        own = {id(p) for p in branch.parameters()}
        assert not own & {id(p) for p in net.parameters()}
        assert sum(branch.is_shared(name) for name, _ in net.named_parameters()) > 0
    assert torch.equal(net(images), make_net(kind)(images))


def test_prepare_trains_a_branch_and_leaves_the_net():
    net = make_net("gn")
    ramp = torch.linspace(0, 1, 16)  # else an image says nothing of its turn
    source = [{"image": (make_images(16, seed=i) + 3 * ramp) / 4} for i in range(3)]
    method = adapt(net, "ttt", head_epochs=20, head_lr=0.05)
    assert method.needs_source
    before = copy.deepcopy(method.state_dict())
    turned, quarters = turn(torch.cat([b["image"] for b in source]), "all", KEY)

    def loss():
        with torch.no_grad(), method.auxiliary.running(method.model):
            return cross_entropy(method.model(turned), quarters).item()

    start = loss()
    with pytest.warns(UserWarning, match=r"--model\.auxiliary rotation"):
        method.prepare(iter(source))  # an iterator gives its batches once
    assert loss() < start - 0.05
    moved = {n for n, v in method.state_dict().items() if torch.is_tensor(v) and not torch.equal(v, before[n])}
    assert moved
    assert all(name.startswith("auxiliary.") for name in moved)
    after = copy.deepcopy(method.auxiliary.state_dict())
    method(make_images(4))
    method.reset()
    assert all(torch.equal(value, after[name]) for name, value in method.auxiliary.state_dict().items())


def test_refusals():
    with pytest.raises(UnsupportedModelError, match=r"--model\.auxiliary rotation"):
        adapt(make_net("gn"), "ttt", head_from="trained")
    with pytest.raises(ConfigError, match="rotation"):
        SourceClassifier("cifar/resnet20", 5, auxiliary="rotations")
    with pytest.raises(ConfigError, match="deepness"):
        SourceClassifier("cifar/resnet20", 5, auxiliary={"kind": "rotation", "deepness": 1})
    with pytest.raises(ConfigError, match="twice"):
        SourceClassifier("cifar/resnet20", 5, auxiliary=["rotation", {"kind": "rotation"}])
    with pytest.raises(UnsupportedModelError, match="lower at"):
        Branch(make_net("gn"), 1.0, 4)


def train(tmp_path, **options):
    model = SourceClassifier("cifar/resnet20", 5, optimizer=partial(torch.optim.SGD, lr=0.1), **options)
    batch = {"image": make_images(6, size=32), "label": torch.arange(6) % 5}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(model, loader)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    return model, trainer


def test_a_source_that_was_trained_with_it(tmp_path, recwarn):
    model, trainer = train(tmp_path, auxiliary={"kind": "rotation", "weight": 0.5, "turns": "all"})
    assert trainer.callback_metrics["source/rotation_loss"] > 0
    net = load_source(str(tmp_path))
    assert not any("left out" in str(warning.message) for warning in recwarn)
    found = find_trained(net, Rotation)
    assert found.weight == 0.5
    assert found.turns == "all"
    for name, value in model.auxiliary["rotation"].state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    method = adapt(net, "ttt", lr=0.1, head_from="trained")
    assert not method.needs_source
    assert method.auxiliary.branch.names == ["net.layer3", "net.head"] or "net.layer3" in method.auxiliary.branch.names
    before = net.state_dict()
    method(make_images(4, size=32))
    now = method.model.state_dict()
    assert not torch.equal(now["net.conv1.weight"], before["net.conv1.weight"])
    assert not any(torch.is_tensor(v) and not torch.equal(v, now[n]) for n, v in before.items() if "layer3" in n)


def test_the_gradient_of_the_training_has_both_losses(tmp_path):
    """The encoder moves by both, the net's last stage by the cross-entropy alone, the branch by the turns alone."""
    torch.manual_seed(0)
    plain, _ = train(tmp_path)
    torch.manual_seed(0)
    both, _ = train(tmp_path, auxiliary={"kind": "rotation", "turns": "all", "weight": 1.0})
    start = Rotation(both.backbone).branch.tail["net/layer3"].state_dict()
    for name, p in both.backbone.named_parameters():
        same = torch.allclose(p, plain.backbone.get_parameter(name), atol=1e-6)
        assert same == any(part in name for part in ("layer3", "fc", "head", "linear")), name
    tail = both.auxiliary["rotation"].branch.tail["net/layer3"].state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in tail.items() if "conv" in name)
