"""Every method on nets as users bring them: the numbers of a plain twin, or a refusal that names the remedy."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from contract import IMAGE_METHODS, MECHANISMS, VARIANTS, build, spread
from lightning_tta import ConfigError, UnsupportedModelError, adapt, available_methods, save
from lightning_tta.errors import InputError, WeightsError
from nets import TOKENS_ONLY, make_images, make_net, same
from odd_nets import (
    HEAVY,
    REFUSED,
    RIGHT,
    OptionalMask,
    Through,
    Times,
    TwoInputs,
    TwoTowers,
    functional,
    noted_by_a_hook,
    plain,
    pruned,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

METHODS = IMAGE_METHODS
LEARN = [name for name in METHODS if hasattr(available_methods()[name], "descend") and name not in TOKENS_ONLY]
MAIN = {name for name, _ in MECHANISMS.values()}
PAIRS = [
    pytest.param(kind, name, marks=[pytest.mark.slow] * (name not in MAIN))
    for kind, name in spread(
        [(kind, name) for kind in RIGHT for name in METHODS if kind not in HEAVY or name in MAIN],
        4,
        lambda pair: pair[1],
    )
]


def make(net, name, *, in_place=False, **more):
    without_draws = {"cotta": {"restore": 0.0}, "vida": {"restore": 0.0, "pair_lr": 0.0}}  # by the order of the layers
    options = {**VARIANTS.get(name, [{}])[0], **without_draws.get(name, {})}
    return build(name, options, "bn", net=net, in_place=in_place, **more)


def outcome(net, name, **more):
    """Logits of two batches and a prediction; or the error that both nets must meet."""
    try:
        method = make(net, name, **more)
    except UnsupportedModelError as error:
        return type(error)
    logits = []
    for call, seed in ((method, 0), (method, 1), (method.predict, 2)):
        images = make_images(8, seed)
        before = images.clone()
        logits.append(call(images))
        assert torch.equal(images, before)
    return torch.cat(logits)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_numbers_of_the_plain_twin(kind, name):
    if kind == "parameters in a list" and name in ("ttt", "eco_tta", "itta"):
        pytest.skip("it changes modules between the stages, and one stage is no module there")
    net, twin = RIGHT[kind]()
    found, expected = outcome(net, name), outcome(twin, name)
    if isinstance(expected, type):
        assert found is expected or (kind, name) == ("parametrised BatchNorm", "meta_ttt")
    elif (kind, name) == ("parametrised BatchNorm", "meta_ttt"):
        assert found is UnsupportedModelError
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", ["checkpointed", "checkpointed, reentrant"])
def test_checkpoints_under_other_statistics_and_values(kind, number):
    """What is computed again in the backward pass sees what the first computation saw."""
    for name, options in (
        ("memo", VARIANTS["memo"][number]),
        ("meta_ttt", {"threshold": 0.4, "min_steps": 3, "max_lr": 9.0}),
    ):
        found, expected = (build(name, options, "bn", net=net)(make_images(6)) for net in RIGHT[kind]())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_reason_and_remedy(kind, name):
    net, words = REFUSED[kind]
    if name == "pea":  # which looks for blocks when it is made
        words += "|Two blocks or more .* Name them"
    with pytest.raises(
        (UnsupportedModelError, WeightsError), match=f"(?s){words}|must return logits|not the output of"
    ):
        make(net(), name)(make_images(4))


@pytest.mark.parametrize("name", LEARN)
def test_no_gradient_is_no_step(name):
    """Quantised behind, detached behind, or frozen after the method was made: refused at the first batch."""
    nets = {
        "No gradient reaches w": quantize_dynamic(nn.Sequential(plain(), nn.Linear(5, 5)), {nn.Linear}),
        "No gradient reaches": Through(run=torch.no_grad()(lambda net, x: net(x))),
        "No gradient reache.": Through(run=torch.inference_mode()(lambda net, x: net(x))),
    }
    if name == "actmad":  # whose loss does not come from the outputs
        nets.pop("No gradient reaches w")
    for words, net in nets.items():
        words += "|The head" if name == "petta" else ""  # of which it wants features first
        with pytest.raises(UnsupportedModelError, match=words):
            make(net, name)(make_images(8))
    method = make(plain(), name)
    before = {key: value.clone() for key, value in method.adaptable.items()}
    method.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"frozen after the method was made.*freeze\(\).*learned"):
        method(make_images(8))
    assert same(method.adaptable, before)
    for parameter in method.learned:
        parameter.requires_grad_()
    assert torch.isfinite(method(make_images(8))).all()


def test_meta_ttt_needs_gradients_too():
    for net in (
        quantize_dynamic(plain(), {nn.Linear}),
        Through(run=lambda net, x: net[6:](net[:6](x).detach())),
        Through(run=torch.inference_mode()(lambda net, x: net(x))),
    ):
        with pytest.raises(UnsupportedModelError, match="No gradient reaches"):
            adapt(net, "meta_ttt")(make_images(8))


@pytest.mark.filterwarnings("default")
def test_parameters_that_no_gradient_reaches_are_named_once():
    net = Through(run=lambda net, x: net[3:](net[:3](x).detach()))
    method = adapt(net, "tent", lr=0.1)
    with pytest.warns(UserWarning, match=r"reaches 2 of the 4.*net\.1\.weight, net\.1\.bias"):
        method(make_images(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(make_images(8))
        adapt(TwoTowers(), "tent")(make_images(8))  # what does not run is no loss


def test_two_towers_last_blocks_are_of_what_runs():
    for name in ("sar", "deyo"):
        learned = [n.removeprefix("model.") for n in adapt(TwoTowers(), name).adaptable if n.startswith("model.")]
        assert learned
        assert all(n.startswith(("vision.0", "vision.1", "vision.2")) for n in learned)


def test_batch_norm_without_its_module():
    """Its statistics cannot be the batch's: refused where a gradient shows it, warned of elsewhere."""
    for name in ("tent", "cotta", "zerosiam"):
        with pytest.raises(UnsupportedModelError, match=r"does not call its BatchNorm layer 'net.1'"):
            make(Through(run=functional), name)(make_images(8))
    for name in ("norm", "sar", "single_image_bn", "meta_ttt"):
        with pytest.warns(UserWarning, match=r"1 do not run as modules.*net\.1"):
            make(Through(run=functional), name)(make_images(8))


@pytest.mark.parametrize("name", ["tent", "cotta", "memo", "norm"])
def test_masks_of_pruning_stay(name):
    net = pruned()
    mask = net[1].weight_mask
    method = make(net, name)
    for seed in range(2):
        method(make_images(8, seed))
    method.predict(make_images(2))
    assert torch.equal(method.model[1].weight == 0, mask == 0)
    if name in ("tent", "cotta"):
        assert not torch.equal(method.model[1].weight_orig[mask == 1], net[1].weight_orig[mask == 1])
    with pytest.raises(UnsupportedModelError, match=r"Layer '1'.*prune\.remove"):
        adapt(net, "meta_ttt")


def logits_warnings(net, name="tent", images=None, calls=2):
    method = adapt(net, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            method(make_images(8) if images is None else images)
        method.predict(make_images(8) if images is None else images)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", ["tent", "eta", "cotta", "norm", "source"])
@pytest.mark.parametrize(
    ("last", "words"),
    [
        (nn.Softmax(1), "probabilities already"),
        (nn.Sigmoid(), "a sigmoid at its end"),
        (nn.LogSoftmax(1), "log-probabilities"),
    ],
)
def test_outputs_that_are_no_logits(name, last, words):
    (message,) = logits_warnings(nn.Sequential(plain(), last), name)
    assert words in message


def test_log_probabilities_are_as_good_as_logits():
    one, other = (adapt(net, "tent", lr=0.1) for net in (nn.Sequential(plain(), nn.LogSoftmax(1)), plain()))
    for seed in range(3):
        found, expected = (method(make_images(8, seed)) for method in (one, other))
        torch.testing.assert_close(found.softmax(1), expected.softmax(1), rtol=1e-4, atol=1e-5)


def test_features_in_the_place_of_logits():
    (message,) = logits_warnings(plain()[:8])
    assert "does it return features" in message
    assert not logits_warnings(plain())


def test_images_that_are_normalised_already():
    (message,) = logits_warnings(plain(), images=make_images(8) * 2 - 1)
    assert "lightning_tta.backbones.Backbone(net, mean, std)" in message
    assert not logits_warnings(plain(), images=make_images(8) * 1.2 - 0.1)  # resampling overshoots
    with pytest.raises(InputError, match=r"Backbone\(net, mean, std\)"):
        adapt(plain(), "tent")(make_images(8) * 6 - 3)


@pytest.mark.parametrize(
    ("name", "kind", "said"), [("tent", "bn", 1), ("norm", "bn", 1), ("tent", "gn", 0), ("memo", "bn", 0)]
)
def test_small_batches_under_batch_statistics(name, kind, said):
    messages = logits_warnings(make_net(kind), name, images=make_images(1))
    assert len([m for m in messages if "statistics of each batch" in m and "Give larger batches" in m]) == said
    assert not logits_warnings(make_net(kind), name, images=make_images(8), calls=1)


def test_a_net_that_writes_to_its_own_buffers():
    class Counts(Through):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    (message,) = logits_warnings(Counts())
    assert "writes to its own buffers" in message
    assert "passes" in message


def test_an_error_of_a_later_batch_is_the_batchs():
    class Sometimes(Through):
        def forward(self, x):
            if len(x) == 3:
                raise TypeError("three")
            return super().forward(x)

    method = adapt(Sometimes(), "tent")
    method(make_images(8))
    with pytest.raises(InputError, match="three"):
        method(make_images(3))
    with pytest.raises(UnsupportedModelError, match="three"):
        adapt(Sometimes(), "tent")(make_images(3))
    with pytest.raises(UnsupportedModelError):
        adapt(OptionalMask(), "tent").predict(make_images(3))


def test_a_copy_or_the_name_of_what_cannot_be_copied():
    net = plain()
    net[3].guard = threading.Lock()
    with pytest.raises(UnsupportedModelError, match=r"attribute 'guard' of module '3'.*in_place=True"):
        adapt(net, "tent")
    assert adapt(net, "tent", in_place=True)(make_images(8)).shape == (8, 5)
    net = plain()
    net.last = net(make_images(2))
    net.alias = {"of": net.last}
    copied = adapt(net, "source").model
    assert copied.last is copied.alias["of"]
    assert torch.equal(copied.last, net.last)
    assert copied.last.grad_fn is None
    assert net.last.grad_fn is not None


def test_a_net_made_in_inference_mode():
    with torch.inference_mode():
        net = plain()
    assert adapt(net, "tent")(make_images(8)).shape == (8, 5)
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        adapt(net, "tent", in_place=True)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize("name", ["memo", "cotta", "deyo", "view_averaging"])
def test_images_of_any_number_of_channels(name, channels):
    images = make_images(8)[:, [0] * channels].clone()
    options = {"augment": "augmix"} if name in ("memo", "view_averaging") else {}
    method = adapt(plain(channels), name, **{**VARIANTS[name][0], **options})
    assert torch.isfinite(method(images)).all()


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(plain())
        for name in ("tent", "cotta", "meta_ttt"):
            assert torch.equal(outcome(net, name), outcome(plain(), name))
        method = adapt(net, "tent", in_place=True)
        assert method.model is net.module
        method(make_images(8))
        assert list(method.export().state_dict()) == list(plain().state_dict())
    finally:
        torch.distributed.destroy_process_group()


def test_the_same_layers_in_other_wrappings():
    """Second members of each kind: nested checkpoints, layers in a dictionary, a wrapper that hides two inputs."""

    def nested(net, x):
        inner = lambda y: net[3:](checkpoint(net[:3], y, use_reentrant=True))  # noqa: E731
        return checkpoint(inner, x, use_reentrant=False)

    def sequential(net, x):
        return checkpoint_sequential(net, 3, x, use_reentrant=True)

    class InDictionary(Through):
        def __init__(self):
            super().__init__()
            self.layers = {"norms": [self.net[1], self.net[4]]}

        def forward(self, x):
            net, (first, second) = self.net, self.layers["norms"]
            return net[5:](second(net[3](net[2](first(net[0](x))))))

    for net in (Through(run=nested), Through(run=sequential), InDictionary()):
        for name in ("tent", "sar", "cotta", "meta_ttt", "norm"):
            torch.testing.assert_close(outcome(net, name), outcome(Through(), name), rtol=1e-5, atol=1e-6)

    class Passes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = TwoInputs()

        def forward(self, *images):
            return self.net(*images)

    with pytest.raises(UnsupportedModelError, match=r"images alone.*'mask'.*Wrap it"):
        adapt(Passes(), "tent")(make_images(4))


def test_a_layer_norm_whose_parameters_are_computed():
    net = make_net("ln")
    for leaf in ("weight", "bias"):
        parametrize.register_parametrization(net.norm1, leaf, Times())
    assert torch.equal(outcome(net, "tent"), outcome(make_net("ln"), "tent"))


def test_a_wrapped_batch_norm():
    """The copy's layer runs, not the original's; mixed batch norm cannot know what the function does."""

    def wrapped():
        net = plain()
        inner = net[1].forward
        net[1].forward = lambda x: inner(x) * 2
        return net

    twin = lambda: Through(run=lambda net, x: net[2:](net[1](net[0](x)) * 2))  # noqa: E731
    for name in ("norm", "tent", "cotta", "source", "memo"):
        torch.testing.assert_close(outcome(wrapped(), name), outcome(twin(), name), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedModelError, match=r"Layer '1': The forward of a BatchNorm2d was replaced"):
        adapt(wrapped(), "meta_ttt")
    method = adapt(wrapped(), "tent", lr=0.1)
    copied = copy.deepcopy(method)
    for seed in range(2):
        assert torch.equal(method(make_images(8, seed)), copied(make_images(8, seed)))


def test_functions_share_what_is_not_of_the_net():
    net, seen, count = plain(), [], 0

    def hook(module, inputs, output):
        nonlocal count
        count += 1
        seen.append(net)

    net[4].register_forward_hook(hook)
    method = adapt(net, "source")
    method(make_images(8))
    assert seen == [method.model]
    assert count == 1
    net(make_images(8))
    assert seen == [method.model, net]
    assert count == 2


def test_a_global_name_of_the_net_is_warned_of():
    space = {"net": plain()}
    exec("def replaced(x, inner=net[1].forward):\n    return inner(x) + net[1].bias.sum()", space)
    space["net"][1].forward = space["replaced"]
    with pytest.warns(UserWarning, match=r"'replaced'.*global name 'net'.*in_place=True"):
        adapt(space["net"], "tent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(noted_by_a_hook()[0], "tent")


def test_a_net_that_begins_to_write_into_its_input():
    class Later(Through):
        passes = 0

        def forward(self, x):
            self.passes += 1
            return self.net(x.sub_(0.5) if self.passes > 1 else x)

    method = adapt(Later(), "source")
    method(make_images(4))
    with pytest.warns(UserWarning, match=r"wrote into its input.*x\.clone"):
        method(make_images(4))
    images = make_images(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(images)
    assert torch.equal(images, make_images(4))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["tent", "norm"])
def test_an_auxiliary_head_that_does_not_run_is_no_matter(name):
    class Auxiliary(Through):
        def __init__(self, functional):
            super().__init__()
            self.aux = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
            self.functional = functional

        def forward(self, x):
            if self.functional:
                x = x + functional(self.aux, self.aux[0](x.mean(1, keepdim=True).expand(-1, 8, -1, -1)))
            return self.net(x)

    def functional(aux, y):
        norm = aux[1]
        y = nn.functional.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1)
        return y.mean(1, keepdim=True)

    assert not logits_warnings(Auxiliary(False), name)
    if name == "tent":
        with pytest.raises(UnsupportedModelError, match=r"does not call its BatchNorm layer 'aux\.1'"):
            adapt(Auxiliary(True), name)(make_images(8))
        return
    (message,) = logits_warnings(Auxiliary(True), name)
    assert "1 do not run as modules" in message
    assert "aux.1" in message


def test_outputs_that_are_not_finite():
    net = plain()
    with torch.no_grad():
        net[3].weight[0, 0] = float("inf")
    (message,) = logits_warnings(net, "source")
    assert "not all finite" in message

    def rule_out(net, x):
        return net(x).index_fill(1, torch.tensor([2]), -torch.inf)

    (message,) = logits_warnings(Through(run=rule_out))
    assert "-inf" in message
    assert "-1e4" in message
    assert not logits_warnings(Through(run=rule_out), "source")


def test_meta_ttt_adapts_the_last_layers_of_what_runs():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            net = plain()
            self.head, self.second, self.first = net[5:], net[3:5], net[:3]
            self.aux = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x):
            return self.head(self.second(self.first(x)))

    options = {"threshold": 0.4, "adapt_layers": 0.5}
    adapted = {n.rpartition(".")[0] for n in adapt(Backwards(), "meta_ttt", **options).adaptable}
    assert adapted == {"model.second.4"}
    assert torch.equal(outcome(Backwards(), "meta_ttt", **options), outcome(plain(), "meta_ttt", **options))


def test_what_is_no_state_and_what_is_no_method():
    for state in (None, [1]):
        with pytest.raises(ConfigError, match=r"what method\.state_dict"):
            adapt(plain(), "tent").load_state_dict(state)
    with pytest.raises(ConfigError, match=r"save\(\) writes the net of a method.*got a Sequential"):
        save(plain(), "net.safetensors")
