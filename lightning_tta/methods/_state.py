"""Whether a saved state is one of this method, and whether an optimizer can learn weights of a precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tta.errors import ConfigError


class CheckedState(nn.Module):
    """Refuses a state of another method, or of other options, before anything of it is written."""

    optimizers: dict[str, Optimizer]
    memory: dict[str, Tensor | None]
    _snapshot: dict[str, Tensor]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "_extra_state" in state_dict:
            self._check_fits(state_dict[prefix + "_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_fits(self, state: Mapping[str, Any]) -> None:
        own = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        parts = (
            ("adapted tensors", _shapes(state["snapshot"]), _shapes(self._snapshot)),
            ("memory", set(state["memory"]), set(self.memory)),
            ("buffers", set(state.get("buffers", self._buffers)), set(self._buffers)),
            ("optimizers' settings", _settings(state["optimizers"]), _settings(own)),
        )
        for part, given, mine in parts:
            if given != mine:
                more, missing = (", ".join(sorted(names)[:3]) or "nothing" for names in (given - mine, mine - given))
                raise ConfigError(
                    f"This state does not fit {type(self).__name__}. Only the state has, among its {part}: {more}; "
                    f"only this method: {missing}. Build the method with the options that the state was saved with."
                )


def _shapes(tensors: Mapping[str, Tensor]) -> set[str]:
    return {f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def _settings(optimizers: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of the settings and of the moments' places of optimizers: other ones for another kind of optimizer."""
    return {
        f"{name}.{setting}"
        for name, state in optimizers.items()
        for number, group in enumerate(state["param_groups"])
        for setting in (*group, *(f"{number}.{position}" for position in group["params"]))
    }


def check_precision(optimizer: Optimizer, dtype: torch.dtype) -> None:
    """Refuse Adam on float16: its second moments and its epsilon vanish there, and a step of 0 / 0 ends all.

    Raises:
        ConfigError: With what to use.
    """
    if dtype == torch.float16 and "betas" in optimizer.defaults:
        raise ConfigError(
            f"{type(optimizer).__name__} cannot learn float16 weights: its second moments are too small for them, and "
            "the weights become NaN. Use optimizer='sgd', or keep the net in float32, with torch.autocast for speed, "
            "or in bfloat16."
        )
