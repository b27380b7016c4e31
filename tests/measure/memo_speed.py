"""MEMO's time against a plain loop over images, on the same maths.

    python tests/measure/memo_speed.py --net cifar/resnet26_gn --pixels 32 --views 32
    python tests/measure/memo_speed.py --net torchvision/resnet50 --pixels 224 --views 16 --images 2

The plain loop makes its views with PIL, one by one in the main process, deep-copies the net to restore it, and
differentiates all weights. Rounds take turns, so that a busy machine slows all alike; medians of the time per image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from lightning_tta.backbones import create_backbone
from lightning_tta.losses import marginal_entropy
from lightning_tta.methods import adapt
from lightning_tta.views.augmix import make_views
from plumbing import arguments, medians, take_turns

BILINEAR = Image.Resampling.BILINEAR
Timed = Callable[[], object]


def pil_chain(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """One to three of MEMO's operations at severity 1."""
    width, height = image.size
    for _ in range(random.integers(1, 4)):
        kind, level, sign = int(random.integers(9)), random.uniform(0.1, 1), int(random.choice([-1, 1]))
        affine: dict[int, tuple[float, ...]] = {
            4: (1, sign * level * 0.03, 0, 0, 1, 0),
            5: (1, 0, 0, sign * level * 0.03, 1, 0),
            6: (1, 0, sign * int(level * width / 30), 0, 1, 0),
            7: (1, 0, 0, 0, 1, sign * int(level * height / 30)),
        }
        if kind in affine:
            image = image.transform(image.size, Image.Transform.AFFINE, affine[kind], resample=BILINEAR)
        else:
            match kind:
                case 0:
                    image = ImageOps.autocontrast(image)
                case 1:
                    image = ImageOps.equalize(image)
                case 2:
                    image = image.rotate(sign * int(level * 3), resample=BILINEAR)
                case 3:
                    image = ImageOps.solarize(image, 256 - int(level * 25.6))
                case _:
                    image = ImageOps.posterize(image, 4)
    return image


def pil_views(image: Tensor, views: int, crop: Any, random: np.random.Generator) -> Tensor:
    """Crop, flip and AugMix, one view after the other: (V, C, H, W)."""
    picture, result = functional.to_pil_image(image), []
    for _ in range(views):
        start = v2.functional.horizontal_flip(crop(picture)) if random.random() < 0.5 else crop(picture)
        weights, share = random.dirichlet([1.0] * 3), random.beta(1.0, 1.0)
        chains = sum(w * np.asarray(pil_chain(start, random), np.float32) for w in weights)
        result.append(torch.from_numpy(share * np.asarray(start, np.float32) + (1 - share) * chains))
    return torch.stack(result).permute(0, 3, 1, 2).contiguous().float() / 255


def main(args: list[str] | None = None) -> None:
    """Time whole episodes, and their parts."""
    options = arguments(
        __doc__,
        args,
        net="cifar/resnet26_gn",
        pixels=32,
        views=32,
        images=(4, "in a batch, and in a round"),
        rounds=7,
        bf16=(False, "also under bfloat16 autocast"),
    )
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    net: nn.Module = create_backbone(options.net).eval()
    images = torch.rand(options.images, 3, options.pixels, options.pixels)
    small = options.pixels <= 64
    crop = v2.RandomCrop(options.pixels, padding=4) if small else v2.RandomResizedCrop(options.pixels)
    augment = "augmix_crop" if small else "augmix"

    def plain() -> None:
        for image in images:
            views = pil_views(image, options.views, crop, random)
            model = copy.deepcopy(net)
            optimizer = torch.optim.SGD(model.parameters(), lr=5e-3)
            marginal_entropy(model(views)[None]).sum().backward()
            optimizer.step()
            with torch.no_grad():
                model(image[None])

    methods = {
        "ours, all": adapt(net, "memo", views=options.views, augment=augment),
        "ours, norm": adapt(net, "memo", views=options.views, augment=augment, params="norm"),
    }

    def ours(name: str, bf16: bool = False, layout: torch.memory_format = torch.contiguous_format) -> Timed:
        batch = images.contiguous(memory_format=layout)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                methods[name](batch)

        return run

    weights = list(methods["ours, all"].adaptable.values())
    source = [value.detach().clone() for value in weights]

    @torch.no_grad()
    def restore() -> None:
        with methods["ours, all"].hold():
            torch._foreach_copy_(weights, source)

    runs: dict[str, Timed] = {"plain": plain, **{name: ours(name) for name in methods}}
    runs |= {f"{name}, channels last": ours(name, layout=torch.channels_last) for name in methods}
    if options.bf16:
        runs |= {f"{name}, bf16": ours(name, True) for name in methods}
    runs |= {
        "augmentation, plain": lambda: [pil_views(image, options.views, crop, random) for image in images],
        "augmentation, ours": lambda: make_views(images, options.views, augment, range(len(images))),
        "restore, plain": lambda: copy.deepcopy(net),
        "restore, ours": restore,
    }
    times = medians(take_turns(runs, options.rounds))
    times = {name: value if "restore" in name else value / len(images) for name, value in times.items()}
    size = f"{options.pixels} px, {options.views} views, batches of {len(images)}"
    print(f"{options.net}, {size}, torch {torch.__version__}")
    for name, value in times.items():
        part = name.split(",")[0]
        base = times["plain" if part in ("plain", "ours") else f"{part}, plain"]
        print(f"{name:26} {1000 * value:9.2f} ms an image  {value / base:5.2f}x plain")


if __name__ == "__main__":
    main()
