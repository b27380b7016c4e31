"""The plain net that predicts as a method does after the stream."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_tta.backbones.copying import copy_net
from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import UnsupportedModelError


def plain_net(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, tuple[Tensor, Tensor]],
    required: Collection[str],
    finish: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """A copy of a net in eval mode, with other weights and running statistics.

    Args:
        model: The net.
        weights: Values of some of its parameters, by name.
        statistics: Running mean and variance of BatchNorm layers, by name.
        required: Names of the parameters that are to require gradients.
        finish: Changes the copy in the end, in place.

    Raises:
        UnsupportedModelError: If the net cannot be copied, or a value has no place in it.
    """
    untracked = [name for name, layer in batch_norm_layers(model).items() if layer.running_mean is None]
    if statistics and untracked:
        raise UnsupportedModelError(
            f"BatchNorm layer '{untracked[0]}' keeps no running statistics (track_running_stats=False), so a plain net "
            "has no place for those of the stream. Build the net with track_running_stats=True, load the same weights "
            "(strict=False), and adapt that."
        )
    with outside_inference_mode():
        net = copy_net(model).eval()
    vars(net).pop("_tta_flags", None)
    parameters = dict(net.named_parameters(remove_duplicate=False))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in required)
    with outside_inference_mode(), torch.no_grad():
        for name, value in weights.items():
            if name not in parameters:
                raise UnsupportedModelError(
                    f"'{name}' of {type(net).__name__} is computed from other parameters, so that nothing can be "
                    "written there. Remove the parametrisation (torch.nn.utils.parametrize) before adapting."
                )
            parameters[name].copy_(value)
        layers = batch_norm_layers(net)
        for name, (mean, var) in statistics.items():
            for buffer, value in ((layers[name].running_mean, mean), (layers[name].running_var, var)):
                assert buffer is not None
                buffer.copy_(value)
        if finish is not None:
            finish(net)
    return net
