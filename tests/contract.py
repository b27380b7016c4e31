"""Cases of the shared tests: every method with every net. A new method file is found by itself."""

import copy
import inspect
from collections import Counter

import pytest
import torch

from lightning_tta import UnsupportedModelError, adapt, available_methods
from nets import kinds_of, make_images, make_net

# Options that make a method's updates visible on the small nets, one entry a variant; a method not named: one, {}.
VARIANTS = {
    "auto": [  # the nets are random, and no method is better than their source: it moves all the same
        {
            "candidates": [
                {"method": "tent", "lr": 0.1, "optimizer": "sgd"},
                {"method": "zerosiam", "lr": 0.5, "predictor_lr": 0.5},
            ],
            **{"every": 2, "recent": 4, "margin": -1.0, "hysteresis": 0.0, "fall": 1.0},
        }
    ],
    "norm": [{}, {"source_weight": 0.5}, {"momentum": 0.3}],
    "tent": [
        {"lr": 1e-2},
        {"lr": 1e-2, "optimizer": "sgd", "steps": 2, "lr_batch_size": 8},
        {"lr": 1e-2, "entropy": "come", "source_filter": True},
    ],
    "eata": [
        {"lr": 0.1, "entropy_margin": 0.9, "diversity_margin": 0.99},
        {"lr": 0.1, "entropy_margin": None, "fisher_alpha": 0.0, "steps": 2, "source_filter": True},
    ],
    "eata_c": [{"lr": 0.1, "entropy_margin": 0.95, "diversity_margin": 0.999, "drop_rate": 0.5}],
    "eta": [{"lr": 1e-2, "optimizer": "adam", "entropy_margin": 0.9, "diversity_margin": 0.95, "lr_batch_size": 8}],
    "poem": [{"lr": 0.5, "watched": 0, "entropy_margin": None, "diversity_margin": None}],
    "memo": [
        {"lr": 0.05, "views": 2, "augment": "none"},
        {
            "lr": 0.5,
            "views": 4,
            "params": "norm",
            "bn_prior": 16,
            "kl_weight": 0.5,
            "augment": "crop_flip",
            "together": True,
        },
        {
            "lr": 0.05,
            "views": 4,
            "optimizer": "adamw",
            "chunk_views": 2,
            "augment": "crop_flip",
        },
    ],
    "view_averaging": [{"views": 4}, {"views": 4, "augment": "augmix", "bn_prior": 16}],
    "zero": [{"views": 8}],
    "meta_ttt": [
        {"threshold": 0.4},
        {"threshold": 0.4, "episodic": False, "source_weight_lr": 0.5, "temperature": "gem_t"},
        {"episodic": False, "min_objective": "zerosiam", "min_steps": 2, "predictor_lr": 0.3},
    ],
    "lame": [{}, {"affinity": "rbf", "neighbours": 3}, {"affinity": "linear"}],
    "t3a": [{"filter_k": 2}, {"filter_k": None}],
    "adanpc": [{"k": 5, "temperature": 0.02, "threshold": 0.4, "stream_per_class": 2}],
    "neo": [{}, {"momentum": 0.3}, {"center": "source"}, {"balanced": True}, {"center": "source", "balanced": True}],
    "output_shift": [{"momentum": 0.3}],
    "foa": [{"population": 6}, {"prompts": 2, "covariance": "diagonal", "chunk": 4}],
    "cotta": [
        {"lr": 1e-2, "ema_decay": 0.7, "anchor_threshold": 1.0, "views": 2, "chunk_views": 4, "restore": 0.0},
        {"lr": 0.1, "optimizer": "sgd", "ema_decay": 0.7, "anchor_threshold": 1.0, "views": 3, "restore": 0.2},
    ],
    "rotta": [{"lr": 1e-2, "ema_decay": 0.5, "bn_momentum": 0.3, "capacity": 5, "update_every": 4}],
    "sotta": [{"lr": 1e-2, "threshold": 0.0, "bn_momentum": 0.3, "capacity": 5, "update_every": 4}],
    "note": [{"lr": 1e-2, "k": 1.0, "bn_momentum": 0.3, "capacity": 5, "update_every": 4}],
    "adacontrast": [{"lr": 1e-2, "ema_decay": 0.7, "queue_size": 10, "neighbours": 3, "warmup": 4}],
    "petal": [
        {
            "lr": 0.1,
            "optimizer": "sgd",
            "ema_decay": 0.7,
            "anchor_threshold": 1.0,
            "views": 2,
            "restore": 0.2,
            "prior_weight": 1e-4,
            "start": "source",
            "swag_epochs": 2,
        },
    ],
    "psmt": [{"lr": 1e-2, "ema_decay": 0.7, "fisher_alpha": 1e3, "preserve": 0.3}],
    "rmt": [{"lr": 1e-2, "ema_decay": 0.7, "projector": 6, "replay_images": 12}],
    "petta": [{"lr": 1e-2, "ema_decay": 0.5, "bn_momentum": 0.3, "capacity": 5}],
    "tribe": [{"lr": 1e-2, "entropy_margin": 0.99, "eta": 0.3}],
    "pea": [
        {"momentum": 0.3},
        {"views": 1, "group_size": 4, "tokens": "all", "drift_threshold": 0.5, "entropy_threshold": 0.0},
    ],
    "sar": [
        {"lr": 1e-2, "entropy_margin": 0.95, "reset_threshold": None},
        {"lr": 0.1, "optimizer": "sgd", "entropy_margin": None, "rho": 0.2, "frozen_fraction": 0.0, "steps": 2},
        {"lr": 0.1, "optimizer": "sgd", "entropy_margin": 0.9, "reset_threshold": 1.0, "source_filter": True},
    ],
    "deyo": [
        {"lr": 1e-2, "entropy_margin": 0.95, "plpd_threshold": -0.2, "patches": 2},
        {"lr": 0.1, "optimizer": "sgd", "entropy_margin": None, "plpd_threshold": -1.0, "patches": 3, "steps": 2},
    ],
    "come": [{"lr": 1e-2}, {"lr": 0.1, "optimizer": "sgd", "steps": 2, "source_filter": True, "uncertainty": None}],
    "ostta": [{"lr": 1e-2}, {"lr": 0.1, "optimizer": "sgd", "alpha": 0.0, "steps": 2, "entropy": "come"}],
    "conjugate_pl": [{"lr": 0.1, "source_loss": "poly", "temperature": 2.0}],
    "delta": [{"lr": 1e-2, "entropy_margin": 1.0}],
    "roid": [{"lr": 1e-2}],
    "cmf": [{"lr": 1e-2, "process_noise": 20.0, "keep": 0.8}],
    "rpl": [{"lr": 1e-2}],
    "shot": [{"lr": 0.05}],
    "cafa": [{"lr": 1e-2}],
    "spa": [{"lr": 0.1, "predictor_lr": 0.1, "noise_ratio": 0.4, "cells": 3, "auxiliary": "eta"}],
    "vida": [
        {
            **{"lr": 0.1, "pair_lr": 0.2, "optimizer": "sgd", "symmetric": True, "restore": 0.2},
            **{"ranks": [1, 3], "views": 2, "ema_decay": 0.7, "pair_decay": 0.5},
        }
    ],
    "actmad": [{"lr": 0.05}],
    "santa": [{"lr": 1e-2, "projector": 6}],
    "rem": [{"lr": 1e-2, "views": 3, "masked": 0.3, "frozen_fraction": 0.3, "margin": 0.1}],
    "ttt": [{"lr": 0.05, "optimizer": "sgd", "head_from": "prepare", "head_epochs": 1}],
    "ttt_pp": [  # without alignment: random nets, far from the statistics that they say they have, take no small steps
        {
            **{"lr": 0.05, "feature_scale": 0.0, "projection_scale": 0.0, "queue": 6},
            **{"head_from": "prepare", "head_epochs": 1},
        }
    ],
    "eco_tta": [{"lr": 0.05, "parts": 2, "entropy_margin": 0.9, "warmup_epochs": 1}],
    "itta": [{"lr": 0.5, "optimizer": "sgd", "head_from": "prepare", "head_epochs": 1}],
    "label_shift_adapter": [{"momentum": 0.3, "hidden": 5, "epochs": 3, "train_lr": 0.05}],
    "nhl": [{"lr": 0.5, "hebbian_lr": 0.1, "inverse_temperature": 2.0}],
    "zerosiam": [
        {"lr": 0.5, "predictor_lr": 0.5},
        {"lr": 0.5, "predictor": "random", "steps": 2, "entropy": "come"},
        {"lr": 0.5, "predictor_lr": 0.5, "source_filter": True},
    ],
}

IMAGE_METHODS = [name for name, kind in available_methods().items() if "images" in kind.tasks]
"""Those of language models have their own tests."""
SETTINGS = [(name, options) for name in IMAGE_METHODS for options in VARIANTS.get(name, [{}])]


def build(name, options, kind, *, seed=0, prepare=True, net=None, in_place=True, **more):
    """A method around its own net, or around ``net``, with source data where it needs them."""
    net = make_net(kind, seed=seed) if net is None else net
    method = adapt(net, name, in_place=in_place, **{**options, **more})
    if prepare and method.needs_source:
        classes = [5, *(module.out_features for module in net.modules() if isinstance(module, torch.nn.Linear))][-1]
        label = torch.arange(8) % min(5, classes)
        method.prepare([{"image": make_images(8, seed=50 + i), "label": label} for i in range(2)])
    return method


def refusal(name, options, kind):
    try:
        build(name, options, kind, prepare=False)
    except UnsupportedModelError as error:
        return str(error)
    except Exception:
        return None  # taken as supported: its tests fail and show it
    return None


def case_id(name, options, kind):
    return "-".join([name, *(f"{k}={v}" for k, v in options.items()), kind])


CASES = [(name, options, kind) for name, options in SETTINGS for kind in kinds_of(name)]
REFUSED = {case_id(*case): message for case in CASES if (message := refusal(*case))}
SUPPORTED = [case for case in CASES if case_id(*case) not in REFUSED]

# One net for what does not depend on its norm layers: the first one that the setting supports.
FIRST = list({(name, str(options)): (name, options, kind) for name, options, kind in reversed(SUPPORTED)}.values())
# One variant for each way in which a method holds what it changes, and one that changes nothing.
MECHANISMS = {
    "nothing": ("source", 0),
    "running statistics": ("norm", 2),
    "norm parameters": ("tent", 0),
    "norm parameters that are moved and put back": ("sar", 2),
    "norm parameters and a module of its own": ("zerosiam", 0),
    "memory of what it saw": ("eata", 0),
    "memory of features": ("t3a", 0),
    "a search": ("foa", 0),
    "all parameters and a teacher": ("cotta", 1),
    "an episode for each image": ("memo", 0),
    "an episode for each batch": ("meta_ttt", 0),
}
# Properties of the base: every setting on one net, every mechanism on all nets that support it.
BASE = FIRST + [
    case
    for name, number in MECHANISMS.values()
    for case in SUPPORTED
    if case[:2] == (name, VARIANTS.get(name, [{}])[number]) and case not in FIRST
]


CORE = {name for name, _ in MECHANISMS.values()}


def spread(cases, share, name=lambda case: case[0]):
    """All cases of the methods in MECHANISMS, whose mechanisms the others share; of each other one in ``share``.

    Methods take turns in which, so that every value of what is varied meets some, at a cost that does not grow with
    methods times values.
    """
    turn = {method: number for number, method in enumerate(available_methods())}
    cases = list(cases)
    counts = Counter(map(name, cases))
    seen = Counter()
    kept = []
    for case in cases:
        method = name(case)
        every = 1 if method in CORE else min(share, counts[method])
        if (seen[method] - turn.get(method, 0)) % every == 0:
            kept.append(case)
        seen[method] += 1
    return kept


def each(cases):
    """One test for each of these; those on further nets are ``slow``: one of many alike."""
    params = [pytest.param(case, id=case_id(*case), marks=[pytest.mark.slow] * (case not in FIRST)) for case in cases]
    return pytest.mark.parametrize("case", params)


every_case, every_setting, every_mechanism = each(SUPPORTED), each(FIRST), each(BASE)


def options_of(name):
    return list(inspect.signature(available_methods()[name]).parameters)


def state_of(method):
    return copy.deepcopy(method.state_dict())


def tensors_of(state):
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def run(method, stream):
    return [method(images) for images in stream]
