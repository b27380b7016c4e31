"""The plain net that predicts as a method does after the stream."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from lightning_tta.methods.base.method import TTAMethod


def plain_net(method: TTAMethod) -> nn.Module:
    """See :meth:`~lightning_tta.methods.base.method.TTAMethod.export`."""
    if method.no_plain_net:
        raise UnsupportedModelError(f"No plain net predicts as '{method.name}' does: {method.no_plain_net}.")
    statistics = method.stream_statistics()
    if statistics is not None and not statistics:
        raise ConfigError(
            f"'{method.name}' has seen no batch since it was made or reset, so there are no statistics of the stream "
            "for the BatchNorm layers. Stream some batches through it first: method(images)."
        )
    untracked = [n for n, layer in batch_norm_layers(method.model).items() if layer.running_mean is None]
    if statistics is not None and untracked:
        raise UnsupportedModelError(
            f"BatchNorm layer '{untracked[0]}' keeps no running statistics (track_running_stats=False), so a plain net "
            "has no place for those of the stream. Build the net with track_running_stats=True, load the same weights "
            "(strict=False), and adapt that."
        )
    net = _copy(method.model)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in method.required)
    parameters = dict(net.named_parameters(remove_duplicate=False))
    with torch.inference_mode(False), torch.no_grad():
        for name, value in method.stream_weights().items():
            if name not in parameters:
                raise UnsupportedModelError(
                    f"'{name}' of {type(net).__name__} is computed from other parameters, so that nothing can be "
                    "written there. Remove the parametrisation (torch.nn.utils.parametrize) before adapting."
                )
            parameters[name].copy_(value)
        layers = batch_norm_layers(net)
        for name, (mean, var) in (statistics or {}).items():
            for buffer, value in ((layers[name].running_mean, mean), (layers[name].running_var, var)):
                assert buffer is not None
                buffer.copy_(value)
    return net


def _copy(model: nn.Module) -> nn.Module:
    """The net as its user had it, apart from the values."""
    try:
        with torch.inference_mode(False):
            net = copy.deepcopy(model)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied: {reason} Take out what it keeps beside parameters and buffers."
        ) from error
    net.__dict__.pop("_tta_flags", None)
    return net.eval()
