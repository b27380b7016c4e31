"""Whether a saved state is one of this method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
            given = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
            self._check_fits(state_dict[prefix + "_extra_state"], {name for name in given if "." not in name})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_fits(self, state: Mapping[str, Any], tensors: set[str]) -> None:
        own = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        parts = (
            ("adapted tensors", _shapes(state["snapshot"]), _shapes(self._snapshot)),
            ("memory", set(state["memory"]), set(self.memory)),
            ("own tensors", tensors - {"_extra_state"}, {*self._buffers, *self._parameters}),
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
