"""Read weights from files of several makes, fit them to a net by name, and identify them by a digest."""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_tta.errors import WeightsError

# Where checkpoints keep their state dict, in order of preference: plain weights before their moving averages.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
_MEAN_NAMES = ("mu", "mean", "new_mean")
_STD_NAMES = ("sigma", "std", "new_std")
_SHOWN = 10  # names of each kind in a message


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and std that a checkpoint carries beside its weights, in units of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.names[0]} {_round(self.mean)}, {self.names[1]} {_round(self.std)}"


@dataclass
class Fit:
    """How a state dict lies on a net: the tensors that fit, and by name everything that does not."""

    prefix: str
    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]  # under the prefix, but not in the net
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name: (shape in the checkpoint, in the net)
    outside: list[str]  # not under the prefix: other parts of a larger module
    normalisation: Normalisation | None = None

    def describe(self) -> str:
        """List what does not fit, with a hint where it looks like another number of classes."""
        shapes = [f"{name} (checkpoint {old}, net {new})" for name, (old, new) in self.misshaped.items()]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("wrong shape", shapes))
        lines = [f"  {kind} ({len(names)}): {_some(names)}" for kind, names in kinds if names]
        layers = {name.rpartition(".")[0] for name in self.misshaped}
        rows = {(old[:1], new[:1]) for old, new in self.misshaped.values()}
        if len(layers) == len(rows) == 1 and all(old[1:] == new[1:] for old, new in self.misshaped.values()):
            (old, new) = rows.pop()
            lines.append(
                f"  {layers.pop()!r} has {old[0]} rows in the checkpoint and {new[0]} in the net. If it is the "
                f"classifier: build the net with num_classes={old[0]}, or load all the rest with strict=False."
            )
        return "\n".join(lines)


def load_weights(net: nn.Module, path: str | Path, *, strict: bool = True, prefix: str | None = None) -> None:
    """Load a weights file into ``net``, in place; when an error is raised nothing has been changed.

    Prefixes such as ``module.`` or ``model.backbone.net.`` are found by structure: the one under which the net's
    names occur. Entries beside it (metrics, losses) are left out with a warning.

    Args:
        net: The net, or a :class:`~lightning_tta.backbones.Backbone` around it.
        path: A ``.safetensors``, ``.pt``, ``.pth`` or ``.ckpt`` file.
        strict: Whether every name and shape must fit (BatchNorm's ``num_batches_tracked`` may be missing). If
            ``False``, what fits is loaded and the rest is listed in a warning.
        prefix: The prefix to take, dot included, where several fit (a student and its teacher, say).

    Raises:
        WeightsError: The file cannot be read, does not fit (the names are listed), or carries another mean and std
            than the backbone applies.
    """
    from lightning_tta.backbones.create import Backbone  # create.py imports this module

    core = net.net if isinstance(net, Backbone) else net
    fit = fit_state(core, read_state_dict(path), str(path), strict=strict, prefix=prefix)
    if fit.normalisation and isinstance(net, Backbone):
        if not net.normalises_with(fit.normalisation.mean, fit.normalisation.std):
            raise WeightsError(
                f"{path} carries its own normalisation ({fit.normalisation}), but the backbone applies mean "
                f"{net.preprocessing['mean']}, std {net.preprocessing['std']}: build it with the file's mean and std."
            )
    elif fit.normalisation:
        warnings.warn(
            f"{path} carries its own normalisation ({fit.normalisation}), which {type(net).__name__} does not apply: "
            "wrap the net in a Backbone with this mean and std.",
            stacklevel=2,
        )
    core.load_state_dict(fit.tensors, strict=False)
    if isinstance(net, Backbone):
        net.weights = Path(path).name


def state_digest(module: nn.Module) -> str:
    """Return 16 hex digits that identify the values in ``module.state_dict()``.

    SHA-256 over the sorted names, dtypes, shapes and bytes: the same on any device and after save and load, another
    one when a single value changes. Non-persistent buffers (a backbone's mean and std) are not part of it.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:  # a module's get_extra_state
            digest.update(f"{name} {value!r};".encode())
    return digest.hexdigest()[:16]


def check_weights_file(path: str | Path) -> Path:
    """Return ``path`` as a :class:`~pathlib.Path` if it names a non-empty file, else raise :class:`WeightsError`."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
        raise WeightsError(f"Weights path {path} is a directory; name a file in it (there: {_some(found) or 'none'}).")
    if not path.is_file():
        where = "its folder exists" if path.parent.is_dir() else f"nor does its folder {path.parent}"
        raise WeightsError(f"Weights file {path} does not exist ({where}); check the path, or fetch the file first.")
    if path.stat().st_size == 0:
        raise WeightsError(f"Weights file {path} is empty; fetch or save it again.")
    return path


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a file; names stay as the file has them, tensors are on the CPU.

    A state dict inside a container (``state_dict``, ``model``, ``net``, ...) is unwrapped. Otherwise, and in what is
    raised, as :func:`read_checkpoint`.
    """
    return _unwrap(read_checkpoint(path), Path(path))


def read_checkpoint(path: str | Path) -> Any:
    """What a file holds, tensors on the CPU.

    Files ending in ``.safetensors`` are read as such, all others with ``torch.load(weights_only=True)``, so that no
    code in the file is run.

    Raises:
        WeightsError: The file is missing, a directory, damaged, no checkpoint, or would have to run code to be read.
    """
    path = check_weights_file(path)
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # damaged bytes can provoke any
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise WeightsError(
                f"{path} holds more than weights: to read it, code would have to run ({blocked.group(1)}), which is "
                "refused. If you trust its source, load it once with torch.load(path, weights_only=False), and save "
                "its state dict alone with torch.save or safetensors."
            ) from error
        detail = str(error).strip().split("\n", 1)[0][:200]
        raise WeightsError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {detail}). It may be cut short or of "
            f"another format than its name says ({', '.join(_SUFFIXES)}): fetch or save it again."
        ) from error


def fit_state(
    net: nn.Module, state: Mapping[str, Tensor], source: str, *, strict: bool = True, prefix: str | None = None
) -> Fit:
    """Match a state dict to a net's names without changing the net; raise if it does not fit and ``strict``.

    Arguments as in :func:`load_weights`; ``source`` names the file in messages.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # torch.compile's wrapper
    target = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    required = {name for name in target if name.rpartition(".")[2] != "num_batches_tracked"}
    if prefix is None:
        prefix = _find_prefix(state, required, source)
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    shared = {name: (tuple(inside[name].shape), tuple(target[name].shape)) for name in inside if name in target}
    fit = Fit(
        prefix=prefix,
        tensors={name: inside[name] for name, (old, new) in shared.items() if old == new},
        missing=[name for name in target if name in required and name not in inside],
        unexpected=[name for name in inside if name not in target],
        misshaped={name: shapes for name, shapes in shared.items() if shapes[0] != shapes[1]},
        outside=[name for name in state if not name.startswith(prefix)],
    )
    _take_normalisation(fit, state)
    title = f"{source} does not fit {type(net).__name__}" + (f" (prefix {prefix!r} stripped)" if prefix else "")
    if fit.missing or fit.unexpected or fit.misshaped:
        if strict or not fit.tensors:
            raise WeightsError(f"{title}:\n{fit.describe()}")
        warnings.warn(f"{title} in full; {len(fit.tensors)} entries loaded:\n{fit.describe()}", stacklevel=3)
    if fit.outside:
        others = f"{len(fit.outside)} entries of {source} are not under {prefix!r} and are left out"
        warnings.warn(f"{others}: {_some(fit.outside)}", stacklevel=3)
    return fit


def _find_prefix(state: Mapping[str, Tensor], required: set[str], source: str) -> str:
    """Return the prefix under which most of the ``required`` names occur in ``state``; the shortest of equals."""
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in required:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    best = max(counts.values(), default=0)
    candidates = sorted((p for p, count in counts.items() if count == best), key=len)
    complete = candidates if best == len(required) else []
    first, others = complete[:1], complete[1:]
    if any(not torch.equal(state[p + name], state[first[0] + name]) for p in others for name in required):
        raise WeightsError(
            f"{source} holds the net more than once, with different values: under {complete}. Choose one with "
            "load_weights(net, path, prefix=...)."
        )
    return candidates[0] if candidates else ""


def _take_normalisation(fit: Fit, state: Mapping[str, Tensor]) -> None:
    """Move a mean and std that lie beside the weights from the surplus names of ``fit`` to its ``normalisation``."""
    surplus = [fit.prefix + name for name in fit.unexpected] + fit.outside

    def only(endings: tuple[str, ...]) -> str | None:
        found = [n for n in surplus if n.rpartition(".")[2] in endings and 1 <= state[n].numel() <= 4]
        return found[0] if len(found) == 1 else None

    mean, std = only(_MEAN_NAMES), only(_STD_NAMES)
    if mean and std:
        values = [tuple(state[name].flatten().tolist()) for name in (mean, std)]
        fit.normalisation = Normalisation(values[0], values[1], (mean, std))
        fit.unexpected = [name for name in fit.unexpected if fit.prefix + name not in (mean, std)]
        fit.outside = [name for name in fit.outside if name not in (mean, std)]


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what ``torch.load`` returned."""
    if _is_state_dict(content):
        return dict(content)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict; save net.state_dict() instead.")
    inner = [key for key, value in content.items() if _is_state_dict(value)]
    ranked = [key for key in _CONTAINERS if key in inner]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if ranked or len(inner) == 1:
        chosen = ranked[0] if ranked else inner[0]
        if len(ranked) > 1:
            warnings.warn(f"{path} holds several sets of weights; {chosen!r} is read, not {ranked[1:]}.", stacklevel=3)
        return dict(content[chosen])
    if tensors and not inner:
        others = [str(key) for key in content if str(key) not in tensors]
        warnings.warn(f"{path} has entries that are not tensors, left out: {_some(others)}.", stacklevel=3)
        return tensors
    raise WeightsError(
        f"{path} has no state dict that can be told apart; its entries: {_some([str(key) for key in content])}. "
        f"Put the weights under one of {', '.join(_CONTAINERS)}, or save net.state_dict() alone."
    )


def _is_state_dict(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _some(names: list[str]) -> str:
    more = f", ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _round(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values)
