"""A recorder for CPUs that does what a CUDA graph does: it repeats the same operations on the same addresses.

So that what a captured step must not do shows without a GPU: to ask the host, to branch on a value, to bake in what
changes, or to write to tensors that the next replay does not read.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_tta.methods.base import recorder as recorders

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name.startswith(ASKS) or any(m is not None and m.dtype == torch.bool for m in masks):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Tape:
    """Records on a CPU. Unlike a CUDA graph it also runs what it records; a method puts its state back."""

    def reason_against(self, device):
        return ""

    def record(self, run, device):
        tape = _Tape()
        with tape:
            result = run()
        calls = [(f, a, k, r) for f, a, k, r in tape.calls if not f.is_view]

        def replay():
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # casts are among what was recorded
                for func, args, kwargs, result in calls:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return result, replay


def use_tape(monkeypatch):
    """Methods made from here on record on a CPU."""
    monkeypatch.setattr(recorders, "make_recorder", Tape)
