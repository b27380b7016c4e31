"""MEMO's time against a plain loop over images, on the same maths.

    python tests/measure/memo_speed.py --net cifar/resnet26_gn --pixels 32 --views 32
    python tests/measure/memo_speed.py --net torchvision/resnet50 --pixels 224 --views 16 --images 2

The plain loop makes its views with PIL, one by one in the main process, deep-copies the net to restore it, and
differentiates all weights. Rounds take turns, so that a busy machine slows all alike; medians of the time per image.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
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
    picture, made = functional.to_pil_image(image), []
    for _ in range(views):
        start = v2.functional.horizontal_flip(crop(picture)) if random.random() < 0.5 else crop(picture)
        weights, share = random.dirichlet([1.0] * 3), random.beta(1.0, 1.0)
        chains = sum(w * np.asarray(pil_chain(start, random), np.float32) for w in weights)
        made.append(torch.from_numpy(share * np.asarray(start, np.float32) + (1 - share) * chains))
    return torch.stack(made).permute(0, 3, 1, 2).contiguous().float() / 255


def main() -> None:
    """Time whole episodes, and their parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--net", default="cifar/resnet26_gn")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--images", type=int, default=4, help="in a batch, and in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="also under bfloat16 autocast")
    args = parser.parse_args()
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    net: nn.Module = create_backbone(args.net).eval()
    images = torch.rand(args.images, 3, args.pixels, args.pixels)
    small = args.pixels <= 64
    crop = v2.RandomCrop(args.pixels, padding=4) if small else v2.RandomResizedCrop(args.pixels)
    augment = "augmix_crop" if small else "augmix"

    def plain_step(own: nn.Module, views: Tensor) -> None:
        optimizer = torch.optim.SGD(own.parameters(), lr=5e-3)
        torch.autograd.backward(marginal_entropy(own(views)[None]).sum())
        optimizer.step()

    def plain() -> None:
        for image in images:
            views = pil_views(image, args.views, crop, random)
            own = copy.deepcopy(net)
            plain_step(own, views)
            with torch.no_grad():
                own(image[None])

    methods = {
        "ours, all": adapt(net, "memo", views=args.views, augment=augment),
        "ours, norm": adapt(net, "memo", views=args.views, augment=augment, params="norm"),
    }

    def ours(name: str, bf16: bool = False, layout: torch.memory_format = torch.contiguous_format) -> Timed:
        given = images.contiguous(memory_format=layout)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                methods[name](given)

        return run

    memo = methods["ours, all"]
    weights, source = list(memo.adaptable.values()), [value.detach().clone() for value in memo.adaptable.values()]

    @torch.no_grad()
    def restore() -> None:
        torch._foreach_copy_(weights, source)

    runs: dict[str, Timed] = {"plain": plain, **{name: ours(name) for name in methods}}
    runs |= {f"{name}, channels last": ours(name, layout=torch.channels_last) for name in methods}
    if args.bf16:
        runs |= {f"{name}, bf16": ours(name, True) for name in methods}
    parts: dict[str, tuple[Timed, Timed]] = {
        "augmentation": (
            lambda: [pil_views(image, args.views, crop, random) for image in images],
            lambda: make_views(images, args.views, augment, range(len(images))),
        ),
        "restore": (lambda: copy.deepcopy(net), restore),
    }
    for name, (theirs, mine) in parts.items():
        runs |= {f"{name}, plain": theirs, f"{name}, ours": mine}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first is for warming up
                times[name].append((time.perf_counter() - start) / (1 if "restore" in name else args.images))
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"{args.net}, {args.pixels} px, {args.views} views, batches of {args.images}, torch {torch.__version__}")
    for name, value in middle.items():
        base = middle[f"{name.split(',')[0]}, plain"] if name.split(",")[0] in parts else middle["plain"]
        print(f"{name:26} {1000 * value:9.2f} ms an image  {value / base:5.2f}x plain")


if __name__ == "__main__":
    main()
