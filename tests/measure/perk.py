"""Recall of keys and values by PERK: against chance, the context in the prompt, and a LoRA without meta-training.

    python tests/measure/perk.py --seeds 3 --keep FOLDER

For each seed a small GPT learns to answer with the context in its prompt (FT-ICR). It stays as it is, and PERK
learns a LoRA for it: with all inner steps differentiated, with the last half of them, with none (first order). Test
contexts are as long as those of training, and longer. Rows: ``question alone``: the GPT without context. ``context in
the prompt``: the same GPT with it. ``LoRA, N steps``: a new LoRA learns the context with N steps, optimizer and rate
being those with the lowest loss of the answers on validation contexts. Accuracies are of answers that are right in all
tokens, mean and standard deviation over seeds. The second table asks for the quarter of the pairs that is nearest to
the question, and for the farthest one. Nets are kept in FOLDER, and not trained again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_tta.data.recall import RecallData
from lightning_tta.modules.perk import PERK
from plumbing import arguments, header, row

RATES = {"sgd": (0.1, 0.3, 1.0, 3.0), "adamw": (3e-3, 1e-2, 3e-2)}
Score = Callable[[RecallData, int], float]


def data(options: argparse.Namespace, seed: int, **changes: object) -> RecallData:
    """The task."""
    given = {"pairs": [2, options.pairs], "value_length": options.digits, "key_length": options.letters}
    given |= {"test_pairs": options.test_pairs, "questions": options.pairs, "contexts": options.contexts}
    given |= {"train_batches": options.batches, "val_batches": 4, "test_batches": options.test_batches, "seed": seed}
    return RecallData(**{**given, **changes})  # type: ignore[arg-type]


def trained(name: str, options: argparse.Namespace, seed: int, source: RecallData, make: Callable[[], PERK]) -> PERK:
    """The module after its training, or from the folder; its CPU seconds are in ``seconds``."""
    path = Path(options.keep) / f"{name}-{seed}.pt" if options.keep else None
    seed_everything(seed, verbose=False)
    module = make()
    if path is not None and path.is_file():
        kept = torch.load(path, weights_only=True)
        module.load_state_dict(kept["state"])
        module.seconds = kept["seconds"]  # type: ignore[assignment]
        return module.eval()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, gradient_clip_val=1.0, limit_val_batches=0, **quiet
    )
    start = time.process_time()
    trainer.fit(module, train_dataloaders=source.train_dataloader())
    module.seconds = time.process_time() - start  # type: ignore[assignment]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state": module.state_dict(), "seconds": module.seconds}, path)
    return module.eval()


def new_base(options: argparse.Namespace) -> PERK:
    """The net that reads the context in its prompt, before its training."""
    net = {"layers": options.layers, "width": options.width, "heads": options.heads}
    return PERK(backbone=net, reading="prompt", optimizer=lambda p: torch.optim.AdamW(p, lr=options.base_lr))


def new_perk(options: argparse.Namespace, base: PERK, unrolled: int) -> PERK:
    """PERK before its training."""
    return PERK(
        backbone=base.backbone,
        steps=options.steps,
        unrolled_steps=unrolled,
        inner_optimizer=options.optimizer,
        inner_lr=options.inner_lr,
        optimizer=lambda p: torch.optim.AdamW(p, lr=options.lr, weight_decay=0.0),
    )


def accuracy(module: PERK, source: RecallData, pairs: int, context: bool = True) -> float:
    """The share of right answers."""
    batches = source.batches("test", pairs)
    right = [module.answers(batches[i], context)[0].float() for i in range(len(batches))]
    return torch.cat(right).mean().item()


def best_plain(base: PERK, source: RecallData, steps: int) -> PERK:
    """A new LoRA with the optimizer and rate that do best on validation contexts."""
    batches = source.batches("val")
    tried = []
    for optimizer, rates in RATES.items():
        for rate in rates:
            torch.manual_seed(0)
            inner = {"steps": steps, "unrolled_steps": 0, "inner_optimizer": optimizer, "inner_lr": rate}
            module = PERK(backbone=base.backbone, learn_rates=False, **inner).eval()  # type: ignore[arg-type]
            loss = sum(module.answers(batches[i])[1].item() for i in range(len(batches)))
            tried.append((loss, len(tried), module))
    return min(tried)[2]


def cell(values: Sequence[float]) -> str:
    """In percent, with the standard deviation over seeds."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main(args: Sequence[str] | None = None) -> dict[str, dict[int, list[float]]]:
    """Train, measure, print the tables; accuracies by row and number of pairs."""
    options = arguments(
        __doc__,
        args,
        seeds=3,
        first_seed=0,
        layers=2,
        width=64,
        heads=4,
        pairs=(8, "most pairs of a training context"),
        test_pairs=["8", "16", "32"],
        letters=(1, "of a key"),
        digits=(2, "of a value"),
        contexts=(16, "in a batch"),
        batches=(200, "outer steps"),
        base_batches=(6000, "steps of the net with the context in its prompt"),
        base_lr=2e-3,
        test_batches=12,
        steps=(4, "inner steps"),
        plain_steps=["4", "32"],
        optimizer=("sgd", "of the inner loop: sgd or adamw"),
        inner_lr=0.3,
        lr=2e-3,
        keep="",
    )
    options.test_pairs = [int(pairs) for pairs in options.test_pairs]
    rows: dict[str, dict[int, list[float]]] = {}
    near_far: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        source = data(options, seed)
        long = data(options, seed, train_batches=options.base_batches)
        base = trained("base", options, seed, long, partial(new_base, options))
        modules = {"question alone": base, "context in the prompt": base}
        modules |= {f"LoRA, {steps} steps": best_plain(base, source, int(steps)) for steps in options.plain_steps}
        for unrolled in dict.fromkeys((0, options.steps // 2, options.steps)):
            name = f"PERK, {unrolled} of {options.steps} steps differentiated"
            make = partial(new_perk, options, base, unrolled)
            modules[name] = trained(f"perk{unrolled}", options, seed, source, make)
        for name, module in modules.items():
            seconds.setdefault(name, []).append(getattr(module, "seconds", 0.0))
            for pairs in options.test_pairs:
                value = accuracy(module, source, pairs, name != "question alone")
                rows.setdefault(name, {}).setdefault(pairs, []).append(value)
            for place, asked in (("nearest", [0.0, 0.25]), ("farthest", [0.75, 1.0])):
                value = accuracy(module, data(options, seed, asked=asked), options.pairs, name != "question alone")
                near_far.setdefault(name, {}).setdefault(place, []).append(value)
    print(f"Accuracy in percent, contexts of N pairs; trained with 2 to {options.pairs}; {options.seeds} seeds\n")
    header("", *(f"{pairs} pairs" for pairs in options.test_pairs), "CPU s of training")
    for name, values in rows.items():
        row(name, *(cell(values[pairs]) for pairs in options.test_pairs), f"{statistics.mean(seconds[name]):.0f}")
    print(f"\nThe same by where the pair stands, {options.pairs} pairs\n")
    header("", "nearest quarter", "farthest quarter")
    for name, places in near_far.items():
        row(name, *(cell(values) for values in places.values()))
    return rows


if __name__ == "__main__":
    main()
