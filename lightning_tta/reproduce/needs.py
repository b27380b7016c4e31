"""What a claim needs: data sets and weights, whether they are there, and how to get them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import yaml

from lightning_tta.data.storage.download import CIFAR_C, IMAGENET, IMAGENET_C, Remote
from lightning_tta.errors import ConfigError

PLACES = {
    "cifar": ".",
    "imagenet": "imagenet",
    "imagenet_c": "imagenet-c",
    "imagenet_list": "imagenet_test_image_ids.txt",
    "imagenet_a": "imagenet-a",
    "imagenet_v2": "imagenetv2-matched-frequency-format-val",
    "pacs": "pacs",
    "office_home": "office_home",
}
"""Where data sets are, below the root."""
NETS = Path(__file__).parent / "nets.yaml"
PACS = ("art_painting", "cartoon", "photo", "sketch")
OFFICE_HOME = ("Art", "Clipart", "Product", "Real World")


@dataclass(frozen=True)
class DataSet:
    """A data set: its place, what is looked for there, and where it was published."""

    title: str
    place: str  # of PLACES
    where: str
    layout: str
    files: Callable[[list[str], int], list[str]]  # domains, severity -> paths of which each must be there
    archives: Mapping[str, Remote] = field(default_factory=dict)  # by domain; "": of all
    images: Mapping[str, int] = field(default_factory=dict)  # of a domain as published; "": of each
    fetched: bool = False  # whether the data module fetches it on request

    def missing(self, place: Path, domains: list[str], severity: int) -> list[str]:
        """What is not there, below its place; the place itself where it is a file."""
        if not place.exists() and PLACES[self.place] != ".":
            return [str(place)]
        return [str(place / name) for name in self.files(domains, severity) if not _is_there(place, name)]

    def how(self, domains: list[str]) -> str:
        """How to get it, or what of it has some domains."""
        remotes = dict.fromkeys(remote for name, remote in self.archives.items() if not name or name in domains)
        texts = [
            f" {remote.url.partition('?')[0]}{f', {remote.size:,} bytes' if remote.size else ''}, "
            f"{remote.checksum.replace(':', ' ')}."
            for remote in remotes
        ]
        fetch = " Or let this command fetch it: --download true." if self.fetched else ""
        return f"{self.where} Expected: {self.layout}.{''.join(texts)}{fetch}"


def _is_there(place: Path, name: str) -> bool:
    """Whether a path is there, be there a folder ``kfold`` between, or its name written otherwise."""
    if (place / name).exists():
        return True

    folders = [place, place / "kfold"]
    return "/" not in name and any(
        _plain(entry.name) == _plain(name) for folder in folders if folder.is_dir() for entry in folder.iterdir()
    )


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _nothing(domains: list[str], severity: int) -> list[str]:
    return []


SETS = {
    "cifar10": DataSet(
        "CIFAR-10",
        "cifar",
        "Published at cs.toronto.edu/~kriz/cifar.html (python version, 0.2 GB).",
        "ROOT/cifar-10-batches-py as torchvision unpacks it",
        lambda domains, severity: ["cifar-10-batches-py"],
        fetched=True,
    ),
    "cifar10_c": DataSet(
        "CIFAR-10-C",
        "cifar",
        "Published as Zenodo record 2535967.",
        "ROOT/CIFAR-10-C/<corruption>.npy and labels.npy",
        lambda domains, severity: [f"CIFAR-10-C/{name}.npy" for name in ("labels", *domains)],
        {"": CIFAR_C["cifar10"]},
        fetched=True,
    ),
    "cifar10_1": DataSet(
        "CIFAR-10.1",
        "cifar",
        "Published at github.com/modestyachts/CIFAR-10.1 (folder datasets), without a checksum.",
        "ROOT/CIFAR-10.1/cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy",
        lambda domains, severity: [f"CIFAR-10.1/cifar10.1_v6_{what}.npy" for what in ("data", "labels")],
    ),
    "imagenet": DataSet(
        "ImageNet (ILSVRC 2012)",
        "imagenet",
        "From image-net.org, after a registration.",
        "ROOT/imagenet/train/<synset>/* and ROOT/imagenet/val/<synset>/*",
        lambda domains, severity: ["train", "val"],
    ),
    "imagenet_c": DataSet(
        "ImageNet-C",
        "imagenet_c",
        "Published as Zenodo record 2235448; the sizes of its archives are not known here.",
        "ROOT/imagenet-c/<corruption>/<severity>/<synset>/*.JPEG",
        lambda domains, severity: [f"{name}/{severity}" for name in domains],
        IMAGENET_C,
        images={"": 50_000},
        fetched=True,
    ),
    "imagenet_list": DataSet(
        "The list of 5,000 images of RobustBench",
        "imagenet_list",
        "The file robustbench/data/imagenet_test_image_ids.txt of github.com/RobustBench/robustbench.",
        "ROOT/imagenet_test_image_ids.txt with lines <synset>/<file name>",
        _nothing,
        images={"": 5_000},
    ),
    "imagenet_a": DataSet(
        "ImageNet-A",
        "imagenet_a",
        "Published at github.com/hendrycks/natural-adv-examples.",
        "ROOT/imagenet-a/<synset>/*",
        _nothing,
        {"": IMAGENET["imagenet_a"]},
        images={"": 7_500},
        fetched=True,
    ),
    "imagenet_v2": DataSet(
        "ImageNet-V2 (matched frequency)",
        "imagenet_v2",
        "Published at imagenetv2.org.",
        "ROOT/imagenetv2-matched-frequency-format-val/<number>/*",
        _nothing,
        {"": IMAGENET["imagenet_v2"]},
        images={"": 10_000},
        fetched=True,
    ),
    "pacs": DataSet(
        "PACS",
        "pacs",
        "Published by Li et al. (ICCV 2017); 9,991 images; no address with a checksum is known here.",
        "ROOT/pacs/<domain>/<class>/*, or below ROOT/pacs/kfold",
        lambda domains, severity: list(PACS),
        images=dict(zip(PACS, (2048, 2344, 1670, 3929), strict=True)),
    ),
    "office_home": DataSet(
        "Office-Home",
        "office_home",
        "Published at hemanthdv.org/officeHomeDataset.html; no checksum is known here.",
        "ROOT/office_home/<domain>/<class>/*",
        lambda domains, severity: list(OFFICE_HOME),
        images=dict(zip(OFFICE_HOME, (2427, 4365, 4439, 4357), strict=True)),
    ),
}
"""Data sets by name."""


def published_images(needs: Iterable[str], domain: str) -> int | None:
    """How many images of a domain the published figures are of; ``None``: files of another number are refused anyway.

    Where a list of images is among the needs, the list's.
    """
    known = [{_plain(name): count for name, count in SETS[need].images.items()} for need in needs]
    counts = [images.get(_plain(domain), images.get("")) for images in known]
    return min((count for count in counts if count is not None), default=None)


@dataclass(frozen=True)
class Net:
    """A net with its weights as the papers used them.

    Attributes:
        title: What it is.
        backbone: Name for :func:`lightning_tta.create_backbone`.
        num_classes: Number of its classes; ``None``: its own.
        options: Arguments of the backbone; ``mean`` and ``std`` where the papers' differ from the weights' own.
        torchvision: Name of torchvision's weights.
        timm: Whether the weights are timm's, those that ``backbone`` names.
        file: Name of a weights file, which the user has to get.
        where: Where to get the file.
    """

    title: str
    backbone: str
    num_classes: int | None = None
    options: dict[str, Any] | None = None
    torchvision: str | None = None
    timm: bool = False
    file: str | None = None
    where: str = ""

    def weights(self, label: str, root: Path, given: Mapping[str, str], download: bool) -> str:
        """The weights: a path, or ``pretrained`` for timm's; fetched where that is asked for.

        Raises:
            FileNotFoundError: If they are not there: how to get them.
        """
        if label in given:
            path = Path(given[label]).expanduser()
            if not path.is_file():
                raise ConfigError(f"weights.{label}: {path} is no file. Give the weights of {self.title}.")
            return str(path)
        if self.file is not None:
            path = root / "weights" / self.file
            if path.is_file():
                return str(path)
            raise FileNotFoundError(f"{self.where} Put it at {path}, or give --weights.{label} FILE.")
        if self.torchvision is not None:
            return self._from_torchvision(label, download)
        if download or _in_hub_cache(self.backbone.removeprefix("timm/")):
            return "pretrained"
        raise FileNotFoundError(
            f"timm's weights {self.backbone.removeprefix('timm/')}, from the hub. Let this command fetch them "
            f"(--download true), or give --weights.{label} FILE."
        )

    def _from_torchvision(self, label: str, download: bool) -> str:
        from torchvision import models

        entry: Any = models.get_model_weights(self.backbone.removeprefix("torchvision/"))[self.torchvision or ""]
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
        if not path.is_file() and download:
            torch.hub.load_state_dict_from_url(entry.url, map_location="cpu", check_hash=True)
        if path.is_file():
            return str(path)
        size = f", {entry.meta['_file_size']} MB" if "_file_size" in entry.meta else ""
        raise FileNotFoundError(
            f"torchvision's weights {self.torchvision}: {entry.url}{size}. Let this command fetch them (--download "
            f"true), or give --weights.{label} FILE."
        )


def _in_hub_cache(arch: str) -> bool:
    """Whether timm's weights of an architecture were fetched before."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    recipe: Any = timm.get_pretrained_cfg(arch)
    names = ("model.safetensors", "pytorch_model.bin")
    found = [try_to_load_from_cache(recipe.hf_hub_id, name) for name in names] if recipe and recipe.hf_hub_id else []
    return any(isinstance(path, str) for path in found)


@cache
def nets() -> dict[str, Net]:
    """The nets of ``nets.yaml``."""
    return {label: Net(**entry) for label, entry in yaml.safe_load(NETS.read_text(encoding="utf-8")).items()}


def place_of(name: str, root: Path, paths: Mapping[str, str]) -> Path:
    """Where a data set is looked for."""
    return Path(paths[name]).expanduser() if name in paths else root / PLACES[name]


def check_places(paths: Mapping[str, str]) -> None:
    """Refuse names that are no place.

    Raises:
        ConfigError: With those that there are.
    """
    for name in paths:
        if name not in PLACES:
            raise ConfigError(f"paths.{name}: there is no such place. Places: {', '.join(PLACES)}.")
