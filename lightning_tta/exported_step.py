"""A method's step as a function of tensors alone: (images, state) -> (logits, state), for programs that adapt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import UnsupportedModelError
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.account import IMAGES, MOMENTS
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.host import recording
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import put_back, take
from lightning_tta.methods.base.task import float_dtype
from lightning_tta.methods.components.additions import ADDITIONS

EXAMPLE = 7  # images: no other size of a usual net


class ExportedStep(nn.Module):
    """All steps of a method on a batch; its state comes in and goes out.

    The method's own step runs, while other tensors stand in for its declared state. It has no host: images are not
    looked at, and none is left out.

    Args:
        method: A method without gradients. A copy of it on the CPU is used.
        images: (B, C, H, W), to run the copy once; its state stays as it is.

    Attributes:
        state: By name, as it is now: all that the method declares, without the account of the stream's statistics,
            which serves ``predict`` and not a step.

    Raises:
        UnsupportedModelError: If a step needs gradients or the host.
        NotPreparedError: If the method needs source data and has not seen any.
    """

    def __init__(self, method: TTAMethod, images: Tensor) -> None:
        super().__init__()
        if isinstance(method, GradientMethod) or method.optimizers:
            raise UnsupportedModelError(
                f"'{method.name}' learns by gradients, which a program cannot compute, so it cannot be saved with its "
                "adaptation. Save the plain net that it has adapted (without adapting), or use a method without "
                "gradients: 'neo', 'output_shift', 't3a', 'lame', 'norm'."
            )
        added = [name for name in ADDITIONS if name in method.options]
        if added:
            raise UnsupportedModelError(
                f"A step of '{method.name}' alone can be saved with its adaptation, without {', '.join(added)}=. Leave "
                "that out; or save the plain net that it has adapted (without adapting)."
            )
        if method.step_on_host:
            raise UnsupportedModelError(
                f"A step of '{method.name}' needs the host ({method.step_on_host}), so it cannot be saved with its "
                "adaptation. Use 'neo', 'output_shift', 't3a', 'lame' or 'norm'."
            )
        with outside_inference_mode():
            self.method = copy.deepcopy(method).cpu()
        moment = take(self.method)
        self.method(images)  # what a first pass finds out is known then
        put_back(self.method, moment)
        self.dtype = float_dtype(self.method.model)
        states = {**self.method.adaptable, **self.method.rest}
        self.state = {name: tensor.detach() for name, tensor in states.items() if name not in (IMAGES, MOMENTS)}

    def forward(self, images: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K), at least float32, and the state after the batch."""
        method = self.method
        after = {name: tensor.clone() for name, tensor in state.items()}
        x = images.to(self.dtype, copy=True)
        with torch.no_grad(), method.standing_in(after), method.running():
            for _ in range(method.steps):
                method.set_batch(x)
                logits = method.step(x)
        return at_least_float32(logits), after

    @torch.no_grad()
    def export(self, images: Tensor) -> ExportedProgram:
        """As a program for batches of any size.

        Args:
            images: One or more, (B, C, H, W).

        Raises:
            UnsupportedModelError: If it would hold for some sizes of batches alone.
        """
        example = images[torch.arange(EXAMPLE) % len(images)]
        self.requires_grad_(False)
        shapes: Any = ({0: Dim.DYNAMIC}, {name: {} for name in self.state})
        with recording():
            program = torch.export.export(self, (example, self.state), dynamic_shapes=shapes)
        if any(bool(limits.upper < 1 << 20) for limits in program.range_constraints.values()):
            raise UnsupportedModelError(
                f"A step of '{self.method.name}' branches on the number of images, so that the program would take some "
                "numbers alone. Save the plain net (without adapting), or deploy the method itself."
            )
        return program


# What the ONNX exporter has no translation of ------------------------------------------------------------------------


def _foreach_copy(tensors: list[Tensor], values: list[Tensor], non_blocking: bool = False) -> list[Tensor]:
    return [value.to(tensor.dtype).expand_as(tensor).clone() for tensor, value in zip(tensors, values, strict=True)]


def _foreach_mul(tensors: list[Tensor], factors: list[float]) -> list[Tensor]:
    return [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]


def _cdist(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Euclidean; in float64, so that the difference of squares is exact enough."""
    if p != 2:
        return NotImplemented  # type: ignore[no-any-return]
    x, y = a.double(), b.double()
    squares = (x * x).sum(-1)[..., :, None] + (y * y).sum(-1)[..., None, :] - 2 * x @ y.transpose(-1, -2)
    return squares.clamp_min(0).sqrt().to(a.dtype)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._foreach_copy.default: _foreach_copy,
    torch.ops.aten._foreach_mul.ScalarList: _foreach_mul,
    torch.ops.aten.cdist.default: _cdist,
}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Of operations that have no decomposition, by ONNX operators. Needs onnxscript."""
    from onnxscript import opset18

    op: Any = opset18

    def sort(self: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
        number = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, number, axis=dim, largest=int(descending), sorted=1)  # of equal ones the first comes first

    return {torch.ops.aten.sort.stable: sort}
