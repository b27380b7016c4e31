"""Several passes of one net on the same images, of which the first layers run once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from lightning_tta.backbones.split import as_logits

Run = Callable[[Mapping[str, Tensor]], Tensor]


def _versions(output: Any) -> list[int]:
    """How often each tensor in what a module returned has been written to."""
    return [leaf._version for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@dataclass
class _Call:
    """What a module returned, and whether it has been overwritten since by something that runs again."""

    module: nn.Module
    output: Any
    versions: list[int]
    overwritten: bool = False


class _Recorder:
    """Keeps what modules return until the first of ``layers`` runs, and hands it out again in later passes.

    In-place operations: a kept module may write into what another one returned (an in-place ReLU does), for both are
    handed out as they ended. Where code between modules does, or one that runs again, the value is computed anew.
    """

    def __init__(self, layers: Collection[nn.Module]) -> None:
        self.layers = set(layers)
        self.calls: list[_Call] = []
        self.recording = True
        self.replay: dict[nn.Module, Iterator[_Call]] = {}

    def wrap(self, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.recording:
                kept = next(self.replay.get(module, iter(())), None)
                return forward(*args, **kwargs) if kept is None or kept.overwritten else kept.output
            self._find_overwritten()
            if module in self.layers:
                self.recording = False
                return forward(*args, **kwargs)
            start, before = len(self.calls), [call.overwritten for call in self.calls]
            output = forward(*args, **kwargs)
            if self.recording:  # it ended before any of the layers ran: it stands for all that ran inside it
                del self.calls[start:]
                for call, overwritten in zip(self.calls, before, strict=True):
                    call.versions, call.overwritten = _versions(call.output), overwritten
                self.calls.append(_Call(module, output, _versions(output)))
            return output

        return call

    def start_pass(self) -> None:
        """Hand out from the beginning."""
        self.recording = False
        self._find_overwritten()
        calls: dict[nn.Module, list[_Call]] = defaultdict(list)
        for call in self.calls:
            calls[call.module].append(call)
        self.replay = {module: iter(values) for module, values in calls.items()}

    def _find_overwritten(self) -> None:
        for call in self.calls:
            call.overwritten = call.overwritten or _versions(call.output) != call.versions


@contextmanager
def shared_prefix(net: nn.Module, images: Tensor, changing: Collection[str]) -> Iterator[Run]:
    """Passes of ``net`` on ``images`` with other values of some parameters; what does not depend on them runs once.

    The modules that end, in the first pass, before one that owns a changing parameter starts give the same result in
    every pass, as the images are the same: it is kept, with its graph, and not computed again. The modules' hooks
    still run. The net must be deterministic between passes (eval mode) up to there.

    Args:
        net: Any classifier.
        images: Its input (B, C, H, W).
        changing: Names of the parameters that differ between passes.

    Yields:
        ``run(parameters) -> logits (B, K)``; ``parameters`` by name replace the net's own (functional call).
    """
    modules = dict(net.named_modules())
    owners = [modules[name.rpartition(".")[0]] for name in changing]
    recorder = _Recorder(owners)
    wrapped = [module for module in modules.values() if not isinstance(module, torch.jit.ScriptModule)]
    own = {module: module.__dict__["forward"] for module in wrapped if "forward" in module.__dict__}
    first = True

    def run(parameters: Mapping[str, Tensor]) -> Tensor:
        nonlocal first
        if not first:
            recorder.start_pass()
        first = False
        return as_logits(functional_call(net, dict(parameters), (images,)))

    for module in wrapped:
        module.forward = recorder.wrap(module)
    try:
        yield run
    finally:
        for module in wrapped:
            del module.forward
            if module in own:
                module.forward = own[module]
