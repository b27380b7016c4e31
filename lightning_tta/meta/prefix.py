"""Several passes of one net on the same images, of which the first layers run once.

Worth its lines where few layers change, which is so in every max step of Meta-TTT (ResNet-18, 64 pixels, one core: an
outer step through it takes half the time); where nearly all layers change it saves 2 to 3 %.
"""

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

from lightning_tta.backbones.norms import replaced_forwards
from lightning_tta.backbones.passes import names_by_parameter
from lightning_tta.backbones.split import as_logits

Run = Callable[[Mapping[str, Tensor]], Tensor]


def _versions(output: Any) -> list[int]:
    """How often each tensor in a module's output has been written to."""
    return [leaf._version for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and not leaf.is_inference()]


@dataclass
class _Call:
    """A module's output, and whether something that runs again has written into it since."""

    module: nn.Module
    output: Any
    versions: list[int]
    overwritten: bool = False


class _Recorder:
    """Records modules' outputs until the first of ``layers`` runs, and returns them in later passes.

    A recorded module may write into another's output (an in-place ReLU does): both are returned as they ended. Where
    code between modules does, or a module that runs again, the output is computed anew.
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
                recorded = next(self.replay.get(module, iter(())), None)
                return forward(*args, **kwargs) if recorded is None or recorded.overwritten else recorded.output
            self._mark_overwritten()
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
        """Before each pass: what the first one has recorded is returned from now on."""
        self.recording = self.recording and not self.calls
        self._mark_overwritten()
        calls: dict[nn.Module, list[_Call]] = defaultdict(list)
        for call in self.calls:
            calls[call.module].append(call)
        self.replay = {module: iter(values) for module, values in calls.items()}

    def _mark_overwritten(self) -> None:
        for call in self.calls:
            call.overwritten = call.overwritten or _versions(call.output) != call.versions


@contextmanager
def shared_prefix(net: nn.Module, images: Tensor, changing: Collection[str]) -> Iterator[Run]:
    """Passes of ``net`` on ``images`` with other values of some parameters; what does not depend on them runs once.

    The modules that end, in the first pass, before one that owns a changing parameter starts give the same result in
    every pass: their outputs are kept, with their graph, and not computed again. Their hooks still run.
    Yields ``run(parameters) -> logits (B, K)``, whose ``parameters`` by name, those in ``changing``, replace the net's.
    """
    modules = dict(net.named_modules())
    named = dict(net.named_parameters())
    places = names_by_parameter(net)
    owners = {place.rpartition(".")[0] for name in changing for place in places[named[name]]}
    recorder = _Recorder([modules[name] for name in owners])
    writes = True  # into its input: each pass then gets a copy; the first one shows it

    def run(parameters: Mapping[str, Tensor]) -> Tensor:
        nonlocal writes
        recorder.start_pass()
        given = images.clone() if writes else images
        before = _versions(given)
        values = {place: value for name, value in parameters.items() for place in places[named[name]]}
        logits = as_logits(functional_call(net, values, (given,), tie_weights=False))
        writes = writes and _versions(given) != before
        return logits

    wrapped = [module for module in modules.values() if not isinstance(module, torch.jit.ScriptModule)]
    with replaced_forwards({module: recorder.wrap(module) for module in wrapped}):
        yield run
