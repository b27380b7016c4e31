"""The corruption functions of ImageNet-C, from the optional package ``imagecorruptions-imaug``."""

from importlib import metadata

import torch
from torch import Tensor

from lightning_tta.errors import ConfigError

REPORTED = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
HELD_OUT = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
_PACKAGE = "imagecorruptions-imaug"
_WITH_GENERATOR = ("impulse_noise", "glass_blur")  # draw from another generator, which takes a seed


def version_id() -> str:
    """Name and version of the function set, for the protocol."""
    try:
        return f"imagenet_c/{_PACKAGE}-{metadata.version(_PACKAGE)}"
    except metadata.PackageNotFoundError:
        raise ConfigError(
            'function_set="imagenet_c" needs an optional package: pip install "lightning-tta[corruptions]", '
            'or use function_set="builtin".'
        ) from None


def apply(image: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Corrupt one uint8 image (3, H, W); NumPy's global random state is left as it was."""
    version_id()
    if image.shape[0] != 3:
        raise ConfigError(f"imagenet_c wants images of 3 channels; got {image.shape[0]}. Repeat the channel.")
    import imagecorruptions
    import numpy as np
    from PIL import Image

    short_seed = seed % 2**32
    options = {"seed": short_seed} if name in _WITH_GENERATOR else {}
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    before = np.random.get_state()  # noqa: NPY002  the package draws from the global state only
    try:
        np.random.seed(short_seed)  # noqa: NPY002
        with np.errstate(invalid="ignore"):
            corrupted = imagecorruptions.corruption_dict[name](Image.fromarray(pixels), severity, **options)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    values = np.array(corrupted)
    if values.dtype != np.uint8:
        # spatter divides zero by zero where no drop falls on a small image: the image stays as it is
        values = np.where(np.isnan(values), pixels, values).astype(np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
