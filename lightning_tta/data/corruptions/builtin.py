"""The embedded corruptions, made with torchvision.transforms.v2 wherever it has the operation."""

import io
import math
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from lightning_tta.data.threads import one_thread

VERSION = 1  # raise it whenever a pixel changes

# Each function below: image float (C, H, W) in [0, 1] and its parameter -> image, not necessarily inside [0, 1].


def _scale(image: Tensor) -> float:
    return min(image.shape[1:]) / 32


def _random_sign(angle: float) -> float:
    return angle if torch.rand(()) < 0.5 else -angle


def _gaussian_noise(image: Tensor, sigma: float) -> Tensor:
    return functional.gaussian_noise(image, sigma=sigma)  # type: ignore[no-any-return]


def _shot_noise(image: Tensor, photons: float) -> Tensor:
    return torch.poisson(image * photons) / photons


def _impulse_noise(image: Tensor, share: float) -> Tensor:
    hit, white = torch.rand_like(image) < share, torch.rand_like(image) < 0.5
    return torch.where(hit, white.float(), image)


def _speckle_noise(image: Tensor, sigma: float) -> Tensor:
    return image + image * torch.randn_like(image) * sigma


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve with a symmetric square kernel, reflecting at the border; by FFT, as kernels grow with the image."""
    half = kernel.shape[0] // 2
    padded = torch.nn.functional.pad(image, (half, half, half, half), mode="reflect")
    sides = padded.shape[1:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernel / kernel.sum(), s=sides)
    filtered: Tensor = torch.fft.irfft2(spectrum, s=sides)
    return filtered[:, 2 * half :, 2 * half :]


def _grid(reach: float) -> tuple[Tensor, Tensor]:
    half = math.ceil(reach)
    steps = torch.arange(-half, half + 1, dtype=torch.float32)
    return steps[:, None], steps[None, :]


def _defocus_blur(image: Tensor, radius: float) -> Tensor:
    radius *= _scale(image)
    y, x = _grid(radius)
    return _filter(image, (radius + 0.5 - (x**2 + y**2).sqrt()).clamp(0, 1))


def _motion_blur(image: Tensor, length: float) -> Tensor:
    reach = length * _scale(image) / 2
    angle = (torch.rand(()) - 0.5) * (math.pi / 2)  # within 45 degrees of the horizontal
    y, x = _grid(reach)
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    return _filter(image, (reach + 0.5 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(0, 1))


def _gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    sigma *= _scale(image)
    size = 2 * math.ceil(3 * sigma) + 1
    rows = functional.gaussian_blur(image, kernel_size=[size, 1], sigma=sigma)  # one direction at a time: faster
    return functional.gaussian_blur(rows, kernel_size=[1, size], sigma=sigma)  # type: ignore[no-any-return]


def _haze(image: Tensor, share: float) -> Tensor:
    haze = torch.zeros(1, *image.shape[1:])
    for cells in (2, 4, 8):  # coarse to fine, each half as strong
        haze = haze + functional.resize(torch.rand(1, cells, cells), list(image.shape[1:])) / cells
    haze = (haze - haze.min()) / (haze.max() - haze.min())
    return image * (1 - share) + haze * share


def _elastic(image: Tensor, displacement: float) -> Tensor:
    sides, scale = image.shape[1:], _scale(image)
    noise = torch.randn(2, *(round(side / scale) for side in sides))  # a field of 32 cells, at any image size
    field = functional.gaussian_blur(noise, kernel_size=19, sigma=3.0)
    field = functional.resize(field / field.std() * displacement * scale, list(sides))
    field = field * 2 / torch.tensor([sides[1], sides[0]])[:, None, None]  # pixels (x, y) to [-1, 1] coordinates
    return functional.elastic(image, field.permute(1, 2, 0)[None])  # type: ignore[no-any-return]


def _pixelate(image: Tensor, share: float) -> Tensor:
    small = functional.resize(image, [max(1, round(side * share)) for side in image.shape[1:]])
    return functional.resize(small, list(image.shape[1:]), interpolation=InterpolationMode.NEAREST_EXACT)  # type: ignore[no-any-return]


def _jpeg(image: Tensor, quality: float) -> Tensor:
    picture = functional.to_pil_image(image)
    coded = io.BytesIO()
    picture.save(coded, format="JPEG", quality=int(quality))  # torchvision's own coder is to be removed
    return functional.pil_to_tensor(Image.open(coded)).float() / 255  # type: ignore[no-any-return]


def _rotate(image: Tensor, angle: float) -> Tensor:
    return functional.rotate(image, _random_sign(angle), interpolation=InterpolationMode.BILINEAR)  # type: ignore[no-any-return]


def _shear(image: Tensor, angle: float) -> Tensor:
    shear = [_random_sign(angle), 0.0]
    return functional.affine(  # type: ignore[no-any-return]
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, interpolation=InterpolationMode.BILINEAR
    )


def _occlusion(image: Tensor, share: float) -> Tensor:
    height, width = (round(side * share) for side in image.shape[1:])
    top = int(torch.randint(image.shape[1] - height + 1, ()))
    left = int(torch.randint(image.shape[2] - width + 1, ()))
    return functional.erase(image, top, left, height, width, torch.full((1, 1, 1), 0.5))  # type: ignore[no-any-return]


# Function, parameter at severities 1 to 5, what the parameter is. Lengths are in pixels of a 32-pixel image and grow
# with the shorter side.
LEVELS = tuple[float, float, float, float, float]
TABLE: dict[str, tuple[Callable[[Tensor, float], Tensor], LEVELS]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # standard deviation
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),  # photons at white
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),  # share of values set to 0 or 1
    "defocus_blur": (_defocus_blur, (1.0, 1.5, 2.0, 2.75, 3.5)),  # radius
    "motion_blur": (_motion_blur, (3, 5, 7, 9, 12)),  # length
    "haze": (_haze, (0.3, 0.4, 0.5, 0.6, 0.7)),  # share of haze
    "brightness": (torch.add, (0.1, 0.2, 0.3, 0.4, 0.5)),  # added to each value
    "contrast": (functional.adjust_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),  # share of the contrast that is left
    "elastic": (_elastic, (0.75, 1.25, 1.75, 2.25, 3.0)),  # standard deviation of the displacement
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),  # share of the resolution that is left
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),  # quality
    "rotate": (_rotate, (8, 16, 24, 32, 40)),  # degrees, either way
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),  # standard deviation, times the value
    "gaussian_blur": (_gaussian_blur, (0.8, 1.2, 1.6, 2.2, 3.0)),  # standard deviation
    "occlusion": (_occlusion, (0.2, 0.28, 0.36, 0.44, 0.52)),  # side of a grey square, as a share of the image's
    "gamma": (functional.adjust_gamma, (1.5, 2.0, 2.75, 3.5, 5.0)),  # exponent
    "shear": (_shear, (8, 14, 20, 26, 32)),  # degrees, either way
}
HELD_OUT = ("speckle_noise", "gaussian_blur", "occlusion", "gamma", "shear")
REPORTED = tuple(name for name in TABLE if name not in HELD_OUT)


def apply(image: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Corrupt one uint8 image (C, H, W); torch's global random state is left as it was."""
    function, levels = TABLE[name]
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        corrupted = function(image.float() / 255, levels[severity - 1])
    return (corrupted * 255).round().clamp(0, 255).to(torch.uint8)
