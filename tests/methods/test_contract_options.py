"""What every method must do with its options: each is used, wrong ones are refused, source data comes first."""

import inspect
from contextlib import suppress

import pytest
import torch

from contract import FIRST, IMAGE_METHODS, SUPPORTED, build, case_id, every_setting, options_of, run
from lightning_tta import ConfigError, LightningTTAError, NotPreparedError, available_methods
from lightning_tta.methods.components.additions import OPTIONS
from nets import kind_for, make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = {"lr_batch_size": 2, "steps": 3, "weight_decay": 0.5, "momentum": 0.3}
NO_EFFECT = {("memo", "momentum")}  # of one step from nothing
USED = {  # in one setting of each method
    (case[0], option): (case, option)
    for case in reversed(FIRST)
    for option in OTHER
    if {option, "steps"} <= set(options_of(case[0])) and (case[0], option) not in NO_EFFECT
    if not case[1].get("source_filter")  # which may keep nothing
}.values()


@pytest.mark.parametrize(("case", "option"), USED, ids=[f"{case_id(*case)}-{option}" for case, option in USED])
def test_options_of_the_steps_are_used(case, option):
    name, options, kind = case
    method, other = build(*case), build(name, {**options, option: OTHER[option]}, kind)
    stream = make_stream(3)
    assert not same(run(method, stream), run(other, stream))


@every_setting
def test_unknown_option(case):
    name, options, kind = case
    with pytest.raises(ConfigError, match="learning_rat") as caught:
        build(name, options, kind, learning_rat=1)
    assert "options:" in str(caught.value)


RANGES = {
    "lr": [-1e-3, float("nan"), float("inf"), "fast", True],
    "predictor_lr": [-1.0, float("inf")],
    "momentum": [-0.1, 1.5],
    "weight_decay": [-1.0],
    "steps": [0, 1.5, 1.0, float("inf"), float("nan")],
    "alpha": [-1.0, float("nan")],
    "lr_batch_size": [0, -64, 0.5],
    "source_weight": [-0.1, 1.1],
    "optimizer": ["lion"],
    "predictor": ["none"],
    "affinity": ["cosine"],
    "neighbours": [0, 1.5],
    "filter_k": [0, -2, 1.5],
    "ema_decay": [-0.1, 1.1],
    "class_weight": [-1.0, float("nan")],
    "diversity_weight": [-1.0, float("inf")],
    "queue_size": [0, 1.5],
    "fisher_decay": [-0.1, 1.1],
    "preserve": [-0.1, 1.1],
    "prior_weight": [-1.0, float("nan")],
    "restore_by": ["rank"],
    "start": ["teacher"],
    "swag_epochs": [1, 2.5],
    "swag_lr": [-1e-3, float("inf")],
    "temperature": [0, -0.1, float("nan")],
    "target_weight": [-1.0, float("nan")],
    "contrast_weight": [-1.0, float("inf")],
    "replay_weight": [-1.0, float("nan")],
    "replay_images": [0, 1.5],
    "warmup": [-1, 0.5],
    "projector": [0, 1.5],
    "source_free": ["false", None],
    "anchor_threshold": [-0.1, 1.1, float("nan")],
    "restore": [-0.1, 1.1],
    "views": [0, 1.5],
    "entropy": ["shannon"],
    "entropy_margin": [0, -0.4, float("nan"), "0.4"],
    "diversity_margin": [0.0, float("inf")],
    "fisher_alpha": [-1.0, float("nan")],
    "rho": [-0.05, float("nan")],
    "reset_threshold": [-0.2, float("inf")],
    "frozen_fraction": [-0.1, 1.1],
    "plpd_threshold": [-1.5, 1.5],
    "weight_margin": [-0.1, float("nan")],
    "patches": [0, 1.5],
    "seed": [-1, 0.5, 2**64],
    "source_filter": ["false", None, 0.5],
    "symmetric": ["false", None],
    "kl_detach": ["false", None],
    "episodic": ["false", None],
}


def refused_by(kind):
    """Names of options that a base class has, and the class sets itself."""
    fixed = {option for base in kind.__mro__ for option in vars(base).get("fixed_options", ())}
    return sorted(fixed - set(inspect.signature(kind).parameters))


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_options_out_of_range(name):
    options, kind = next((o, k) for n, o, k in SUPPORTED if n == name)
    for option in options_of(name):
        for value in RANGES.get(option, []):
            with pytest.raises(ConfigError, match=r"must be .*; got"):
                build(name, {**options, option: value}, kind)


@pytest.mark.parametrize("name", [n for n, kind in available_methods().items() if refused_by(kind)])
def test_options_that_a_base_has_and_a_method_has_not(name):
    """Whoever makes the class itself, as the command line does, is refused them too."""
    kind = available_methods()[name]
    for option in refused_by(kind):
        with pytest.raises(ConfigError, match=f"has no option '{option}'"):
            kind(make_net(kind_for(name, "bn")), **{option: 1})


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_options_of_a_wrong_type(name):
    """An option of another kind is refused in words, or does no harm; there is no error from inside."""
    options, kind = next((o, k) for n, o, k in SUPPORTED if n == name)
    for option in options_of(name)[1:]:
        for value in (-1, "?", []):
            with suppress(LightningTTAError):
                build(name, {**options, option: value}, kind, prepare=False)


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_no_option_hides_what_every_method_takes(name):
    hidden = {"single_image_bn": {"prior"}}  # which has no other one
    assert set(options_of(name)) & set(OPTIONS) == hidden.get(name, set())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_whole_numbers_are_numbers(optimizer):
    method, other = (build("rpl", {"lr": 1, "optimizer": optimizer, "momentum": m}, "gn") for m in (0, 0.0))
    assert same(run(method, make_stream(2)), run(other, make_stream(2)))


@every_setting
def test_source_data_first(case):
    method = build(*case, prepare=False)
    if not method.needs_source:
        method.prepare([])  # allowed, and does nothing
        assert torch.isfinite(method(make_images(2))).all()
        return
    for call in (method, method.predict):
        with pytest.raises(NotPreparedError, match="prepare"):
            call(make_images(2))
