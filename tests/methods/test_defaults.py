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
EATA_C = {"alpha": 0.1, "smoothing": 0.5, "drop_rate": 0.2}
SAR = {**EATA, "rho": 0.05, "reset_threshold": 0.2}
DEYO = {"entropy_margin": 0.5, "weight_margin": 0.4, "plpd_threshold": 0.2, "patches": 4}
COTTA = {"ema_decay": 0.999, "views": 32}
CONJUGATE = {"lr": 1e-3, "optimizer": "sgd", "source_loss": "cross_entropy", "temperature": 1.0, "predict_after": True}
DELTA = {"entropy_margin": 0.5, "frequency_decay": 0.95, "statistics_momentum": 0.05}
ROID = {
    "keep": 0.99,
    "temperature": 1 / 3,
    "diversity_momentum": 0.9,
    "clip": 0.99,
    "consistency": True,
    "weighting": True,
    "detach_target": False,
    "prior_correction": "probabilities",
}
RMT = {"target_weight": 1.0, "contrast_weight": 1.0, "temperature": 0.1, "projector": 128}
VIDA = {"scaled": "both", "views": 10, "ema_decay": 0.999}
PUBLISHED = {
    "norm": {"source_weight": 0.0, "momentum": None},
    "tent": ADAM,
    "come": {**ADAM, "uncertainty": 1000.0},  # the constant of the authors' code
    "ostta": {**ADAM, "alpha": 0.5},
    "shot": {**SGD, "lr": 1e-3, "label_weight": 0.3, "diversity_weight": 1.0},
    "cafa": {**ADAM, "covariance": "tied"},
    "actmad": {"optimizer": "nesterov", "lr": 1e-3, "weight_decay": 5e-4, "params": "all"},
    "santa": {**ADAM, "anchor_weight": 1.0, "contrast_weight": 1.0, "temperature": 0.1, "projector": 128},
    "rpl": {**ADAM, "q": 0.8, "params": "norm"},
    "eata": {**SGD, **EATA, "lr": 5e-3, "diversity_margin": 0.4, "fisher_alpha": 1.0},
    "eata_c": {**SGD, **EATA, **EATA_C, "lr": 5e-3, "diversity_margin": 0.4, "fisher_alpha": 1.0},
    "eta": {**SGD, **EATA, "lr": 5e-3, "diversity_margin": 0.4},
    "sar": {**ADAM, **SAR},
    "deyo": {**ADAM, **DEYO},
    "lame": {"neighbours": 5},
    "t3a": {"filter_k": 100},
    "adanpc": {"k": 100, "temperature": 0.1, "threshold": 0.1, "second_softmax": False},
    "neo": {"center": "auto", "momentum": None, "balanced": False},
    "output_shift": {"gamma": 1.0, "momentum": 0.1},
    "cotta": {**ADAM, **COTTA, "anchor_threshold": 0.92, "restore": 0.01, "symmetric": False},
    "petal": {**ADAM, **COTTA, "anchor_threshold": 0.92, "restore": 0.03, "prior_weight": 1e-9, "symmetric": False},
    "psmt": {**ADAM, "ema_decay": 0.999, "fisher_alpha": 500.0},
    "adacontrast": {**SGD, "lr": 2e-4, "weight_decay": 1e-4, "temperature": 0.07, "queue_size": 16384, "warmup": 1024},
    "rmt": {**ADAM, **RMT, "ema_decay": 0.999, "replay_weight": 1.0},
    "vida": {"optimizer": "adam", **VIDA, "lr": 1e-4, "pair_lr": 1e-5, "threshold": 0.05, "pair_decay": 0.999},
    "ttt": {"optimizer": "sgd", "lr": 1e-3, "momentum": 0.0, "steps": 1, "augment": "crop_flip", "turns": "random"},
    "ttt_pp": {**SGD, "lr": 1e-2, "feature_scale": 0.05, "projection_scale": 0.2, "queue": 1280},
    "eco_tta": {**SGD, "lr": 5e-3, "parts": 5, "entropy_margin": 0.4, "warmup_epochs": 10},
    "itta": {**ADAM, "lr": 5e-6},
    "label_shift_adapter": {"momentum": 0.9, "hidden": 64},
    "zerosiam": {"alpha": 1.0, "momentum": 0.9, "lr_batch_size": 64, "predictor": "learned"},
    "spa": {**SGD, "lr": 2.5e-3, "predictor_lr": 2.5e-2, "frequency_ratio": 0.1, "noise_ratio": 0.1, "low_share": 0.2},
    "rem": {**ADAM, "views": 3, "masked": 0.1, "weight": 1.0, "margin": 0.0, "frozen_fraction": 0.25},
    "memo": {"optimizer": "sgd", "lr": 5e-3, "weight_decay": 0.0, "kl_weight": 0.0, "views": 32, "bn_prior": None},
    "single_image_bn": {"prior": 16},
    "conjugate_pl": {**CONJUGATE, "poly_epsilon": 6.0},
    "delta": {**ADAM, **DELTA},
    "roid": {**ADAM, **ROID},
    "cmf": {**ADAM, **ROID, "hidden_keep": 0.99, "process_noise": 0.005},
}
PUBLISHED_IMAGENET = {
    "petta": {"pull_weight": 10.0, "anchor_weight": 1.0, "loss": "view", "regularizer": "cosine"},
    "sotta": {"threshold": 0.33, "rho": 0.05, "bn_momentum": 0.2},
    "tribe": {"entropy_margin": 0.4, "weight": 0.5, "eta": 0.5, "gamma": 0.5},
    "tent": {**SGD, "lr": 2.5e-4},
    "come": {**SGD, "lr": 2.5e-4, "uncertainty": 1000.0},
    "ostta": {**SGD, "lr": 2.5e-4, "alpha": 0.5},
    "eata": {**SGD, **EATA, "lr": 2.5e-4, "diversity_margin": 0.05, "fisher_alpha": 2000.0},
    "eata_c": {**SGD, **EATA, **EATA_C, "lr": 2.5e-4, "diversity_margin": 0.05, "fisher_alpha": 50.0},
    "eta": {**SGD, **EATA, "lr": 2.5e-4, "diversity_margin": 0.05},
    "sar": {**SGD, **SAR, "lr": 2.5e-4},
    "deyo": {**SGD, **DEYO, "lr": 2.5e-4},
    "t3a": {"filter_k": 20},
    "petal": {**SGD, **COTTA, "lr": 1e-2, "anchor_threshold": 0.1, "restore": 0.003, "prior_weight": 1e-11},
    "psmt": {**SGD, "lr": 1e-2, "ema_decay": 0.999, "fisher_alpha": 500.0},
    "rmt": {**SGD, **RMT, "lr": 1e-2, "ema_decay": 0.999, "replay_weight": 1.0},
    "actmad": {"optimizer": "nesterov", "momentum": 0.9, "lr": 2.5e-4, "weight_decay": 5e-4, "params": "all"},
    "santa": {**SGD, "lr": 1e-2, "anchor_weight": 1.0, "contrast_weight": 1.0, "temperature": 0.1},
    "rpl": {**SGD, "lr": 5e-4, "q": 0.8, "params": "norm"},
    "spa": {**SGD, "lr": 1e-2, "predictor_lr": 5e-2, "frequency_ratio": 0.2, "noise_ratio": 0.4, "cells": 14},
    "vida": {"optimizer": "sgd", **VIDA, "lr": 5e-7, "pair_lr": 2e-7, "threshold": 0.2, "pair_decay": 0.8},
    "cotta": {**SGD, **COTTA, "lr": 1e-2, "anchor_threshold": 0.1, "restore": 0.001, "symmetric": True},
    "conjugate_pl": {**SGD, **CONJUGATE, "poly_epsilon": 8.0},
    "delta": {**SGD, **DELTA, "lr": 2.5e-4},
    "roid": {**SGD, **ROID, "lr": 2.5e-4},
    "cmf": {**SGD, **ROID, "lr": 2.5e-4, "hidden_keep": 0.99, "process_noise": 0.005},
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
