"""A long stream with broken batches: does memory grow, does accuracy on the good ones suffer?

    python tests/measure/soak.py --batches 20000 --methods tent eata zerosiam

Domains take turns every 50 batches. Of all batches, a share is broken: NaN or constant images, frames of the wrong
size, empty batches, 0-255 pixels. They come between the good batches, which are the same in the run without them. Each
is a whole predict run of TestTimeAdaptation with on_bad_batch=skip. Prints resident memory (Linux) and the size of the
method's state along the way, and the accuracy on the good batches of both runs.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, IterableDataset

from lightning_tta.guard.callback import Guard
from lightning_tta.methods import available_methods
from lightning_tta.run.batches import StreamInput
from plumbing import TinyNet, arguments, leaves, predict, resident

OPTIONS: dict[str, dict[str, Any]] = {"eata": {"entropy_margin": 0.9, "diversity_margin": 0.95}}
"""Options that make a method's filters keep something on this problem."""
DOMAINS = ("plain", "dark", "noisy", "tinted")
BROKEN = ("nan", "some nan", "constant", "too small", "channels", "empty", "0-255")
CLASSES, PIXELS = 10, 12


def make_batch(size: int, domain: str, seed: int) -> dict[str, Tensor]:
    """Images (size, 3, 12, 12) in [0, 1] of ten patterns with noise, and their labels; the same from the same seed."""
    coarse = torch.rand(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    patterns = interpolate(coarse, size=(PIXELS, PIXELS), mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    images = 0.3 + 0.4 * patterns[labels] + 0.3 * torch.randn(size, 3, PIXELS, PIXELS, generator=generator)
    if domain == "dark":
        images = 0.4 * images
    elif domain == "noisy":
        images = images + 0.2 * torch.randn(images.shape, generator=generator)
    elif domain == "tinted":
        images = images * torch.tensor([1.0, 0.7, 0.5])[:, None, None] + 0.1
    return {"image": images.clamp(0, 1), "label": labels}


def train(kind: str, steps: int = 300) -> nn.Module:
    """A net that knows the plain domain; a second or two. The global random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = TinyNet(kind, CLASSES)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for step in range(steps):
            batch = make_batch(64, "plain", -1 - step)
            optimizer.zero_grad()
            cross_entropy(net(batch["image"]), batch["label"]).backward()
            optimizer.step()
    return net.eval()


def break_batch(images: Tensor, how: str) -> dict[str, Tensor]:
    """A broken batch in the place of ``images``, with the label -1."""
    odd = torch.arange(len(images))[:, None, None, None] % 2 == 0
    broken = {
        "nan": torch.full_like(images, float("nan")),
        "some nan": torch.where(odd, images, float("nan")),
        "constant": torch.full_like(images, 0.5),
        "too small": images[..., :2, :2],
        "channels": images[:, :1],
        "empty": images[:0],
        "0-255": images * 255,
    }[how]
    return {"image": broken, "label": torch.full((len(broken),), -1)}


class Soak(IterableDataset[dict[str, Tensor]]):
    """Good batches, with a share of broken ones between them."""

    def __init__(self, batches: int, batch_size: int, broken: float) -> None:
        self.batches, self.batch_size, self.broken = batches, batch_size, broken

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        dice, count = random.Random(0), 0
        for number in range(self.batches):
            batch = make_batch(self.batch_size, DOMAINS[number // 50 % len(DOMAINS)], number)
            if dice.random() < self.broken:
                yield break_batch(batch["image"], BROKEN[count % len(BROKEN)])
                count += 1
            yield batch


class Notes(Callback):
    """Counts what is right on good batches, and notes memory some twenty times."""

    def __init__(self, batches: int) -> None:
        self.every = max(1, batches // 20)
        self.right = self.images = self.good = 0
        self.memory: list[tuple[int, float, int]] = []  # good batches, MB, bytes of the method's state

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        known = outputs["label"] >= 0
        if bool(known.any()):
            self.right += int((outputs["prediction"] == outputs["label"])[known].sum())
            self.images += int(known.sum())
            self.good += 1
            if self.good % self.every == 0:
                state = [leaf for leaf in leaves(pl_module.method.state_dict()) if isinstance(leaf, Tensor)]
                self.memory.append((self.good, resident() / 1e6, sum(tensor.nbytes for tensor in state)))


def soak(method: str, net: nn.Module, batches: int, batch_size: int, broken: float, guard: bool) -> dict[str, Any]:
    """One run; the account of it."""
    notes = Notes(batches)
    loader = DataLoader(Soak(batches, batch_size, broken), batch_size=None)
    source = [make_batch(64, "plain", seed) for seed in range(-1000, -992)]
    kind = partial(available_methods()[method], **OPTIONS.get(method, {}))
    guards = [Guard()] if guard else []
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = [notes, StreamInput(on_bad_batch="skip"), *guards]
        report = predict(kind, loader, *callbacks, source=source, backbone=net, reset="never")
    return {
        "accuracy": notes.right / notes.images,
        "good": notes.good,
        "memory": notes.memory,
        "seconds": time.perf_counter() - start,
        "alarms": len(report["guard"]["events"]) if guard else 0,
        **{name: report[name] for name in ("batches", "skipped_batches", "nonfinite_images")},
    }


def main(args: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Run each method without and with broken batches, print, and return the accounts."""
    options = arguments(
        __doc__,
        args,
        batches=(20_000, "good batches"),
        batch_size=16,
        broken=(0.01, "share of broken batches"),
        methods=["tent", "eata", "zerosiam"],
        net=("bn", "bn, gn or ln"),
        guard=(False, "with the callback Guard"),
    )
    accounts = {}
    for method in options.methods:
        runs = []
        for broken in (0.0, options.broken):
            run = soak(method, train(options.net), options.batches, options.batch_size, broken, options.guard)
            runs.append(run)
            print(
                f"{method}, {100 * broken:g} % broken: accuracy {100 * run['accuracy']:.2f} % on {run['good']} good of "
                f"{run['batches']} batches, {run['skipped_batches']} skipped, {run['nonfinite_images']} non-finite "
                f"images, {run['alarms']} alarms, {run['seconds']:.0f} s"
            )
        for good, memory, state in runs[1]["memory"]:
            print(f"{good:>9,} batches: {memory:7.1f} MB resident, state {state:,} bytes")
        second = [memory for good, memory, _ in runs[1]["memory"] if good >= options.batches / 2]
        print(
            f"{method}: accuracy {100 * (runs[1]['accuracy'] - runs[0]['accuracy']):+.2f} points with broken batches; "
            f"second half {second[0]:.1f} to {second[-1]:.1f} MB",
            flush=True,
        )
        accounts[method] = runs
    return accounts


if __name__ == "__main__":
    main()
