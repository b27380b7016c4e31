"""Where the shifted sets are, and how to know that they are whole."""

import shutil
from pathlib import Path

from lightning_tta.data.storage.download import Remote, fetch, unpack
from lightning_tta.errors import ConfigError, DataError

_ZENODO, _BERKELEY = "https://zenodo.org/records", "https://people.eecs.berkeley.edu/~hendrycks"
CIFAR_C = {
    "cifar10": Remote(
        f"{_ZENODO}/2535967/files/CIFAR-10-C.tar?download=1", 2_918_471_680, "md5:56bf5dcef84df0e2308c6dcbcbbd8499"
    ),
    "cifar100": Remote(
        f"{_ZENODO}/3555552/files/CIFAR-100-C.tar?download=1", 2_918_473_216, "md5:11f0ed0f1191edbf9fa23466ae6021d3"
    ),
}
IMAGENET = {
    "imagenet_a": Remote(f"{_BERKELEY}/imagenet-a.tar", 687_552_512, "md5:c3e55429088dc681f30d81f4726b6595"),
    "imagenet_r": Remote(f"{_BERKELEY}/imagenet-r.tar", 2_191_079_936, "md5:a61312130a589d0ca1a8fca1f2bd3337"),
    "imagenet_v2": Remote(
        "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
        1_264_079_360,
        "sha256:f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c",
    ),
}
_GROUPS = {
    "blur": (("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"), "2d8e81fdd8e07fef67b9334fa635e45c"),
    "digital": (("contrast", "elastic_transform", "pixelate", "jpeg_compression"), "89157860d7b10d5797849337ca2e5c03"),
    "extra": (("speckle_noise", "gaussian_blur", "spatter", "saturate"), "d492dfba5fc162d8ec2c3cd8ee672984"),
    "noise": (("gaussian_noise", "shot_noise", "impulse_noise"), "e80562d7f6c3f8834afb1ecf27252745"),
    "weather": (("snow", "frost", "fog", "brightness"), "33ffea4db4d93fe4a428c40a6ce0c25d"),
}
IMAGENET_C = {
    corruption: Remote(f"{_ZENODO}/2235448/files/{group}.tar?download=1", None, f"md5:{checksum}")
    for group, (corruptions, checksum) in _GROUPS.items()
    for corruption in corruptions
}


def fetch_imagenet(name: str, folder: Path) -> None:
    """Put ImageNet-A, -R or -V2 into ``folder``, unless that is there."""
    if folder.is_dir():
        return
    if name not in IMAGENET:
        raise ConfigError(f"--data.download knows {', '.join(IMAGENET)}; fetch {name!r} by hand into {folder}.")
    archive = fetch(IMAGENET[name], folder.parent)
    partial = folder.with_name(f"{folder.name}.partial")
    unpack(archive, partial)
    inner = [entry for entry in partial.iterdir() if entry.is_dir()]
    if len(inner) != 1:
        raise DataError(f"{archive} unpacks to {len(inner)} folders, expected one of class folders. See {partial}.")
    inner[0].replace(folder)
    shutil.rmtree(partial)
