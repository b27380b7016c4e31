"""A long stream with broken batches: does memory grow, does accuracy on the good ones suffer?

    python tests/measure/soak.py --batches 20000 --methods tent eata zerosiam

Domains take turns every 50 batches. Of all batches, a share is broken: NaN or constant images, frames of the wrong
size, empty batches, 0-255 pixels. They come between the good batches, which are the same in the run without them. Each
is a whole predict run of TestTimeAdaptation with on_bad_batch=skip. Prints resident memory (Linux) and the size of the
method's state along the way, and the accuracy on the good batches of both runs.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_tta.guard.callback import Guard
from lightning_tta.methods import available_methods
from lightning_tta.methods.base.state import size
from lightning_tta.modules import TestTimeAdaptation
from stream_memory import resident_mb
from tiny import DOMAINS, Made, quiet_trainer, train

OPTIONS: dict[str, dict[str, Any]] = {"eata": {"entropy_margin": 0.9, "diversity_margin": 0.95}}
"""Options that make a method's filters keep something on this problem."""
BROKEN = ("nan", "some nan", "constant", "too small", "channels", "empty", "0-255")


class Soak(IterableDataset[dict[str, Tensor]]):
    """Good batches, with a share of broken ones between them. Broken ones have the label -1."""

    def __init__(self, made: Made, batches: int, batch_size: int, broken: float) -> None:
        self.made, self.batches, self.batch_size, self.broken = made, batches, batch_size, broken

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """All of them, in order."""
        dice, kind = random.Random(0), 0
        for number in range(self.batches):
            images, labels = self.made.batch(self.batch_size, DOMAINS[number // 50 % len(DOMAINS)], number)
            if dice.random() < self.broken:
                yield break_batch(images, BROKEN[kind % len(BROKEN)])
                kind += 1
            yield {"image": images, "label": labels}


def break_batch(images: Tensor, how: str) -> dict[str, Tensor]:
    """A broken batch in the place of ``images``."""
    if how == "nan":
        images = torch.full_like(images, float("nan"))
    elif how == "some nan":
        images = torch.where(torch.arange(len(images))[:, None, None, None] % 2 == 0, images, float("nan"))
    elif how == "constant":
        images = torch.full_like(images, 0.5)
    else:
        changed = {"too small": images[..., :2, :2], "channels": images[:, :1], "empty": images[:0]}
        images = changed[how] if how in changed else images * 255
    return {"image": images, "label": torch.full((len(images),), -1)}


class Notes(Callback):
    """Counts what is right on good batches, and notes memory some twenty times."""

    def __init__(self, batches: int) -> None:
        self.every = max(1, batches // 20)
        self.right = self.images = self.good = 0
        self.memory: list[tuple[int, float, int]] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count and note."""
        known = outputs["label"] >= 0
        if bool(known.any()):
            self.right += int((outputs["prediction"] == outputs["label"])[known].sum())
            self.images += int(known.sum())
            self.good += 1
            if self.good % self.every == 0:
                self.memory.append((self.good, resident_mb(), size(pl_module.method.state_dict())))


def soak(
    method: str, net: nn.Module, made: Made, batches: int, batch_size: int, broken: float, guard: bool
) -> dict[str, Any]:
    """One run; the account of it."""
    notes = Notes(batches)
    module = TestTimeAdaptation(
        partial(available_methods()[method], **OPTIONS.get(method, {})),
        backbone=net,
        on_bad_batch="skip",
        reset="never",
    )
    if not module.method.prepared:
        seeds = range(-1000, -992)
        module.method.prepare([dict(zip(("image", "label"), made.batch(64, "plain", s), strict=True)) for s in seeds])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(place, notes, *([Guard()] if guard else []))
        loader = DataLoader(Soak(made, batches, batch_size, broken), batch_size=None)
        trainer.predict(module, loader, return_predictions=False)
    assert module.summary is not None
    return {
        "accuracy": notes.right / notes.images,
        "good": notes.good,
        "memory": notes.memory,
        "seconds": time.perf_counter() - start,
        "alarms": len(module.watch.events) if module.watch is not None else 0,
        **{name: module.summary.result()[name] for name in ("batches", "skipped_batches", "nonfinite_images")},
    }


def main(args: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Run each method without and with broken batches, print, and return the accounts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batches", type=int, default=20_000, help="Good batches.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--broken", type=float, default=0.01, help="Share of broken batches.")
    parser.add_argument("--methods", nargs="+", default=["tent", "eata", "zerosiam"])
    parser.add_argument("--net", default="bn", choices=("bn", "gn", "ln"))
    parser.add_argument("--guard", action="store_true", help="With the callback Guard.")
    options = parser.parse_args(args)
    made = Made()
    found = {}
    for method in options.methods:
        runs = []
        for broken in (0.0, options.broken):
            net = train(options.net, made)
            run = soak(method, net, made, options.batches, options.batch_size, broken, options.guard)
            runs.append(run)
            print(
                f"{method}, {100 * broken:g} % broken: accuracy {100 * run['accuracy']:.2f} % on {run['good']} good of "
                f"{run['batches']} batches, {run['skipped_batches']} skipped, {run['nonfinite_images']} non-finite "
                f"images, {run['alarms']} alarms, {run['seconds']:.0f} s"
            )
        for good, memory, state in runs[1]["memory"]:
            print(f"{good:>9,} batches: {memory:7.1f} MB resident, state {state:,} bytes")
        second = [entry for entry in runs[1]["memory"] if entry[0] >= options.batches / 2]
        print(
            f"{method}: accuracy {100 * (runs[1]['accuracy'] - runs[0]['accuracy']):+.2f} points with broken batches; "
            f"second half {second[0][1]:.1f} to {second[-1][1]:.1f} MB",
            flush=True,
        )
        found[method] = runs
    return found


if __name__ == "__main__":
    main()
