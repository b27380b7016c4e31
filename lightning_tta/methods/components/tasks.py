"""``task=``: what a net takes and gives, and so what a method adapts on: images, tokens, pixels, regression."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from lightning_tta.backbones.dense import DenseModel
from lightning_tta.backbones.language import TokenModel, takes_tokens
from lightning_tta.backbones.values import PixelModel, ValueModel
from lightning_tta.errors import ConfigError, UnsupportedModelError
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.tokens import Tokens
from lightning_tta.methods.base.values import TASKS as KINDS
from lightning_tta.methods.components import adapters
from lightning_tta.methods.components.wanted import Wanted, read


def _images(net: nn.Module) -> nn.Module:
    return net


def _tokens(net: nn.Module, loss_on: str = "auto", chunk: int = 64) -> nn.Module:
    model = TokenModel(net, loss_on=loss_on, chunk=chunk)
    Tokens(model, **model.settings)  # refuses what is wrong
    if model.sees_later_tokens():
        raise UnsupportedModelError(
            f"{type(net).__name__} is no causal language model: its logits depend on tokens that come later, as those "
            "of a masked language model do, so that it cannot write an answer, and the entropy of its tokens says "
            "nothing of the next one. Give a causal one; of transformers such as LlamaForCausalLM (BERT and its kin "
            "need is_decoder=True, and a training for it)."
        )
    return model


def _pixels(net: nn.Module) -> nn.Module:
    return PixelModel(net)


def _regression(net: nn.Module) -> nn.Module:
    return ValueModel(net)


TASKS: dict[str, Callable[..., nn.Module]] = {
    "images": _images,
    "tokens": _tokens,
    "pixels": _pixels,
    "regression": _regression,
}
"""What wraps a net for each kind of input."""


def as_task(net: nn.Module, task: Wanted, loss_on: str = "auto") -> nn.Module:
    """The net as a method takes it.

    Args:
        net: The user's; or one that is wrapped already, which stays as it is with ``auto``.
        task: ``auto``: tokens where the net's forward has an argument ``input_ids``, else images; a kind of
            :data:`TASKS`; or a dict of ``kind`` and its options, of tokens those of
            :class:`~lightning_tta.methods.base.tokens.Tokens`.
        loss_on: Over tokens, which count in the loss where the task does not say it.

    Raises:
        ConfigError: If there is no such task, or option.
        UnsupportedModelError: If the net is none for it.
    """
    if not isinstance(net, nn.Module):
        return net  # whoever makes the method says so
    if task == "auto":
        return net if isinstance(net, DenseModel) or not takes_tokens(net) else _tokens(net, loss_on)
    kind, options = read(task, "task", TASKS)
    if kind == "tokens":
        options = {"loss_on": loss_on, **options}
    return TASKS[kind](net.net if isinstance(net, DenseModel) else net, **options)


def task_kind(net: nn.Module) -> str:
    """The kind of input that a net takes."""
    return net.kind if isinstance(net, DenseModel) else "images"


def settings_of(net: nn.Module) -> dict[str, Any]:
    """The options of the task of a net."""
    return dict(net.settings) if isinstance(net, DenseModel) else {}


def check_additions(net: nn.Module, additions: Collection[str]) -> None:
    """Refuse what goes with images alone.

    Raises:
        ConfigError: With the names.
    """
    if isinstance(net, DenseModel):
        allowed = Tokens.additions if isinstance(net, TokenModel) else KINDS[net.kind].additions
        wrong = [name for name in additions if name not in allowed]
        if wrong:
            raise ConfigError(
                f"{', '.join(f'{name}=' for name in wrong)} is for images with one class each, and the task of "
                f"{type(net.net).__name__} is {net.kind!r}. Leave it out."
            )


def default_select(kind: type[TTAMethod], net: nn.Module) -> adapters.Select | None:
    """What learns where the user does not say it: of a language model LoRA of the query and value projections.

    Rank 8 and alpha 16 (TLM's; ZeroSiam's paper says LoRA, and not which), on linear layers whose names end in
    ``q_proj`` or ``v_proj``, ``query`` or ``value``, ``q`` or ``v``, ``wq`` or ``wv``. ``None``: what the method itself
    selects; so of a net without such layers.
    """
    if not isinstance(net, TokenModel) or not issubclass(kind, GradientMethod) or not kind.selects:
        return None
    leaves = {name.rpartition(".")[2] for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    for pair in (("q_proj", "v_proj"), ("query", "value"), ("q", "v"), ("wq", "wv")):
        if leaves.issuperset(pair):
            return {"kind": "lora", "rank": 8, "alpha": 16.0, "targets": rf".*\.({'|'.join(pair)})"}
    return None
