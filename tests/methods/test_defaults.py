"""The published settings, written out once more: the constructors' defaults (CIFAR), the ImageNet configurations."""

import inspect
from pathlib import Path

import pytest
import yaml

from lightning_tta import available_methods
from lightning_tta.views import jitter as _jitter

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
ADAM, SGD = {"optimizer": "adam", "lr": 1e-3}, {"optimizer": "sgd", "momentum": 0.9}
EATA = {"entropy_margin": 0.4, "entropy": "softmax", "source_filter": False}
SAR = {**EATA, "rho": 0.05, "reset_threshold": 0.2}
DEYO = {"entropy_margin": 0.5, "weight_margin": 0.4, "plpd_threshold": 0.2, "patches": 4}
COTTA = {"ema_decay": 0.999, "views": 32}
PUBLISHED = {
    "norm": {"source_weight": 0.0, "momentum": None},
    "tent": ADAM,
    "come": ADAM,
    "ostta": {**ADAM, "alpha": 0.5},
    "eata": {**SGD, **EATA, "lr": 5e-3, "diversity_margin": 0.4, "fisher_alpha": 1.0},
    "eta": {**SGD, **EATA, "lr": 5e-3, "diversity_margin": 0.4},
    "sar": {**ADAM, **SAR},
    "deyo": {**ADAM, **DEYO},
    "lame": {"neighbours": 5},
    "t3a": {"filter_k": 100},
    "neo": {"center": "raw", "momentum": None, "balanced": False},
    "output_shift": {"gamma": 1.0, "momentum": 0.1},
    "cotta": {**ADAM, **COTTA, "anchor_threshold": 0.92, "restore": 0.01, "symmetric": False},
    "zerosiam": {"alpha": 1.0, "momentum": 0.9, "lr_batch_size": 64, "predictor": "learned"},
    "memo": {"optimizer": "sgd", "lr": 5e-3, "weight_decay": 0.0, "kl_weight": 0.0, "views": 32, "bn_prior": None},
    "single_image_bn": {"prior": 16},
}
PUBLISHED_IMAGENET = {
    "petta": {"pull_weight": 10.0, "anchor_weight": 1.0, "loss": "view", "regularizer": "cosine"},
    "sotta": {"threshold": 0.33, "rho": 0.05, "bn_momentum": 0.2},
    "tribe": {"entropy_margin": 0.4, "weight": 0.5, "eta": 0.5, "gamma": 0.5},
    "tent": {**SGD, "lr": 2.5e-4},
    "come": {**SGD, "lr": 2.5e-4},
    "ostta": {**SGD, "lr": 2.5e-4, "alpha": 0.5},
    "eata": {**SGD, **EATA, "lr": 2.5e-4, "diversity_margin": 0.05, "fisher_alpha": 2000.0},
    "eta": {**SGD, **EATA, "lr": 2.5e-4, "diversity_margin": 0.05},
    "sar": {**SGD, **SAR, "lr": 2.5e-4},
    "deyo": {**SGD, **DEYO, "lr": 2.5e-4},
    "t3a": {"filter_k": 20},
    "cotta": {**SGD, **COTTA, "lr": 1e-2, "anchor_threshold": 0.1, "restore": 0.001, "symmetric": True},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_constructor(name):
    parameters = inspect.signature(available_methods()[name]).parameters
    assert {option: parameters[option].default for option in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize(
    "name", sorted(path.stem.removesuffix("_imagenet") for path in CONFIGS.glob("*_imagenet.yaml"))
)
def test_imagenet(name):
    options = yaml.safe_load((CONFIGS / f"{name}_imagenet.yaml").read_text())["init_args"]
    expected = PUBLISHED_IMAGENET[name]
    assert {option: options[option] for option in expected} == expected


def test_views_of_cotta():
    """Brightness to gamma as factors, hue in turns, degrees, share of the image, factor, pixels, share, share of 1."""
    expected = {
        "BRIGHTNESS": (0.6, 1.4),
        "CONTRAST": (0.7, 1.3),
        "SATURATION": (0.5, 1.5),
        "HUE": (-0.06, 0.06),
        "GAMMA": (0.7, 1.3),
        "DEGREES": (-15, 15),
        "SHIFT": (-0.125, 0.125),  # 1/16 of an image padded to twice its size
        "SCALE": (0.9, 1.1),
        "BLUR": (0.001, 0.5),
        "FLIP": 0.5,
        "NOISE": 0.005,
    }
    assert {name: getattr(_jitter, name) for name in expected} == expected
