"""Read checkpoints of several makes without running code in them, fit them to a net by name, and identify weights."""

import hashlib
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_tta.backbones.quantized import contents
from lightning_tta.errors import WeightsError

# Where checkpoints keep their state dict, in order of preference: plain weights before their moving averages.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
_MEAN_NAMES = ("mu", "mean", "new_mean")
_STD_NAMES = ("sigma", "std", "new_std")
_LISTED = 10  # names of each kind in a message
_MARK = "lightning_tta"  # in the metadata of a .safetensors file: written by this package
PACKAGE = "package"
"""In the metadata of a ``.safetensors`` file: the package of the Python index that its weights are from."""


class CodeInFileError(WeightsError):
    """To read a file, code in it would have to run."""


def state_digest(module: nn.Module) -> str:
    """Return 16 hex digits that identify the values in ``module.state_dict()``.

    SHA-256 over the sorted names, dtypes, shapes and bytes: the same on any device and after save and load, another
    one when a single value changes. Non-persistent buffers (a backbone's mean and std) are not part of it.
    """
    return digest_of(module.state_dict())


def digest_of(state: Mapping[str, Any]) -> str:
    """:func:`state_digest` of a state dict."""
    digest = hashlib.sha256()
    parts = ((f"{name}{part}", value) for name, entry in sorted(state.items()) for part, value in contents(entry))
    for name, value in parts:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:  # a module's get_extra_state
            digest.update(f"{name} {value};".encode())
    return digest.hexdigest()[:16]


def check_weights_file(path: str | Path) -> Path:
    """Return ``path`` as a :class:`~pathlib.Path` if it names a non-empty file, else raise :class:`WeightsError`."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
        raise WeightsError(f"Weights path {path} is a directory; name a file in it (there: {_some(files) or 'none'}).")
    if not path.is_file():
        where = "its folder exists" if path.parent.is_dir() else f"nor does its folder {path.parent}"
        raise WeightsError(f"Weights file {path} does not exist ({where}); check the path, or fetch the file first.")
    if path.stat().st_size == 0:
        raise WeightsError(f"Weights file {path} is empty; fetch or save it again.")
    return path


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> Any:
    """What a file holds, tensors on the CPU (with ``mmap`` on disk until used, not in ``.safetensors``).

    ``.safetensors`` files are read as such, all others with ``torch.load(weights_only=True)``: no code in them is run.

    Raises:
        CodeInFileError: The file holds more than tensors and plain values.
        WeightsError: The file is missing, a directory, damaged, or no checkpoint.
    """
    path = check_weights_file(path)
    _check_unpacked(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, "cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes can provoke any
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise CodeInFileError(
                f"{path} holds more than tensors: to read it, code would have to run ({blocked.group(1)}), which is "
                "refused. If you trust its source, load it once with torch.load(path, weights_only=False), and save "
                "its state dict alone with torch.save or safetensors."
            ) from error
        detail = str(error).strip().split("\n", 1)[0].partition(" In PyTorch")[0][:200]  # not torch's advice to run it
        raise WeightsError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {detail}). It may be cut short or of "
            f"another format than its name says ({', '.join(_SUFFIXES)}): fetch or save it again."
        ) from error


def _check_unpacked(path: Path) -> None:
    """Raise :class:`WeightsError` if a file would unpack to far more than it is: torch stores without compression."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:  # torch says what is wrong
        return
    size = path.stat().st_size
    if unpacked > 2 * size + 2**20:
        raise WeightsError(
            f"{path} has {size:,} bytes and would unpack to {unpacked:,}: torch.save does not write such files, and it "
            "is not read. Fetch or save it again."
        )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a file, also out of a container (``state_dict``, ``model``, ...); names stay as they are.

    Raises:
        WeightsError: As :func:`read_checkpoint`, and where the file has no state dict, or none that can be told apart.
    """
    content = read_checkpoint(path)
    _compare_with_name(Path(path))
    if _is_state_dict(content):
        return dict(content)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict; save net.state_dict() instead.")
    containers = [key for key, value in content.items() if _is_state_dict(value)]
    ranked = [key for key in _CONTAINERS if key in containers]
    if len(ranked) > 1:
        warnings.warn(f"{path} holds several sets of weights; {ranked[0]!r} is read, not {ranked[1:]}.", stacklevel=2)
    if ranked or len(containers) == 1:
        return dict(content[(ranked or containers)[0]])
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors and not containers:
        others = [str(key) for key in content if str(key) not in tensors]
        warnings.warn(f"{path} has entries that are not tensors, left out: {_some(others)}.", stacklevel=2)
        return tensors
    raise WeightsError(
        f"{path} has no state dict that can be told apart; its entries: {_some([str(key) for key in content])}. "
        f"Put the weights under one of {', '.join(_CONTAINERS)}, or save net.state_dict() alone."
    )


def read_description(path: str | Path) -> dict[str, Any]:
    """What a ``.safetensors`` file that this package wrote says of its net: ``net``, ``mean``, ``input_size``, ...

    Empty of any other file.

    Raises:
        WeightsError: The file is damaged, or was changed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
    except Exception as error:  # damaged bytes can provoke any
        raise WeightsError(f"{path} is not a readable checkpoint ({error}). Fetch or save it again.") from error
    if _MARK not in texts:
        return {}
    known = ("net", "num_classes", "mean", "std", "input_size", "interpolation", "crop_pct", PACKAGE)
    try:
        described = {name: json.loads(texts[name]) for name in known if name in texts}
        [float(value) for name in ("mean", "std") for value in described.get(name, ())]
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its metadata were changed ({error}). Fetch or save it again.") from error
    return described


def _compare_with_name(path: Path) -> None:
    """Warn where the digest that published weights have in their name (``resnet18-f37072fd.pth``) is another one."""
    named = re.fullmatch(r".*-((?=[0-9]*[a-f])[0-9a-f]{8,64})", path.stem)
    if named is None or path.suffix not in (".pth", ".pt", ".safetensors"):
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(named[1]):
        warnings.warn(
            f"{path}: its name ends in the first digits of the SHA-256 of the published file, but that of this file is "
            f"{digest[: len(named[1])]}: it is damaged or was changed. Fetch it again, or give it another name.",
            stacklevel=3,
        )


def _is_state_dict(value: object) -> bool:
    pairs = value.items() if isinstance(value, Mapping) else ()
    return bool(pairs) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in pairs)


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and std that a checkpoint carries beside its weights, in units of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, str]

    def __str__(self) -> str:
        mean, std = (tuple(round(value, 6) for value in values) for values in (self.mean, self.std))
        return f"{self.names[0]} {mean}, {self.names[1]} {std}"


def carried_by(description: Mapping[str, Any]) -> Normalization | None:
    """The mean and std in what :func:`read_description` gives."""
    if not {"mean", "std"} <= description.keys():
        return None
    return Normalization(tuple(description["mean"]), tuple(description["std"]), ("mean", "std"))


def fit_state(
    net: nn.Module, state: Mapping[str, Tensor], source: str, *, strict: bool = True, prefix: str | None = None
) -> tuple[dict[str, Tensor], Normalization | None]:
    """Match a state dict to a net's names without changing the net; ``source`` is the file's name, for messages.

    Arguments and errors as in :func:`~lightning_tta.backbones.create.load_weights`. Returns the tensors by the net's
    names, and the normalisation that lies beside them, if there is one.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # torch.compile's wrapper
    target = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    required = [name for name in target if name.rpartition(".")[2] != "num_batches_tracked"]
    if prefix is None:
        prefix = _find_prefix(state, set(required), source)
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    surplus = [prefix + name for name in inside if name not in target]
    surplus += [name for name in state if not name.startswith(prefix)]
    normalization = _find_normalization(state, surplus)
    surplus = [name for name in surplus if normalization is None or name not in normalization.names]
    shapes = {
        name: (tuple(inside[name].shape), tuple(value.shape))
        for name, value in target.items()
        if name in inside and inside[name].shape != value.shape
    }
    tensors = {name: inside[name] for name in target if name in inside and name not in shapes}
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise WeightsError(
            f"{source} has NaN or infinite values in {len(broken)} of {len(tensors)} tensors: {_some(broken)}. The net "
            "would predict one class or nothing; take an earlier checkpoint, or train again with a lower rate."
        )
    kinds = {
        "missing": [name for name in required if name not in inside],
        "unexpected": [name.removeprefix(prefix) for name in surplus if name.startswith(prefix)],
        "wrong shape": [f"{name} (checkpoint {old}, net {new})" for name, (old, new) in shapes.items()],
    }
    problems = [f"  {kind} ({len(names)}): {_some(names)}" for kind, names in kinds.items() if names]
    problems += _other_classes(shapes)
    title = f"{source} does not fit {type(net).__name__}" + (f" (prefix {prefix!r} stripped)" if prefix else "")
    if problems and (strict or not tensors):
        raise WeightsError("\n".join([f"{title}:", *problems]))
    if problems:
        title = f"{title} in full; {len(tensors)} entries loaded:"
        warnings.warn("\n".join([title, *problems]), stacklevel=3)
    outside = [name for name in surplus if not name.startswith(prefix)]
    if outside:
        others = f"{len(outside)} entries of {source} are not under {prefix!r} and are left out"
        warnings.warn(f"{others}: {_some(outside)}", stacklevel=3)
    return tensors, normalization


def _find_prefix(state: Mapping[str, Tensor], required: set[str], source: str) -> str:
    """Return the prefix under which most of the ``required`` names occur in ``state``; the shortest of equals."""
    counts: Counter[str] = Counter()
    for name in state:
        words = name.split(".")
        counts.update(
            "".join(f"{word}." for word in words[:i]) for i in range(len(words)) if ".".join(words[i:]) in required
        )
    best = max(counts.values(), default=0)
    candidates = sorted((prefix for prefix, count in counts.items() if count == best), key=len)
    first = candidates[0] if candidates else ""
    if best == len(required) and any(
        not torch.equal(state[prefix + name], state[first + name]) for prefix in candidates[1:] for name in required
    ):
        raise WeightsError(
            f"{source} holds the net more than once, with different values: under {candidates}. Choose one with "
            "load_weights(net, path, prefix=...)."
        )
    return first


def _find_normalization(state: Mapping[str, Tensor], surplus: list[str]) -> Normalization | None:
    """The one mean and the one std of up to four channels among the names that the net does not have."""
    small = [name for name in surplus if 1 <= state[name].numel() <= 4]
    means, stds = ([n for n in small if n.rpartition(".")[2] in ends] for ends in (_MEAN_NAMES, _STD_NAMES))
    if len(means) != 1 or len(stds) != 1:
        return None
    mean, std = (tuple(state[name].flatten().tolist()) for name in (*means, *stds))
    return Normalization(mean, std, (means[0], stds[0]))


def _other_classes(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """A hint where the wrong shapes look like another number of classes."""
    layers = {name.rpartition(".")[0] for name in shapes}
    rows = {(old[:1], new[:1]) for old, new in shapes.values()}
    if len(layers) != 1 or len(rows) != 1 or any(old[1:] != new[1:] for old, new in shapes.values()):
        return []
    (old, new) = rows.pop()
    return [
        f"  {layers.pop()!r} has {old[0]} rows in the checkpoint and {new[0]} in the net. If it is the classifier: "
        f"build the net with num_classes={old[0]}, or load all the rest with strict=False."
    ]


def _some(names: list[str]) -> str:
    more = f", ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
