"""Alarms without labels: how often they are false, and after how many shifted samples they come.

    python tests/measure/alarms.py --source-ckpt runs/digits/source_gn
    python tests/measure/alarms.py --root ROOT --source-ckpt resnet26_gn.safetensors --net cifar/resnet26_gn

One pass of the source net over clean held-out images and over each corruption; all streams are made from its logits.
The clean ones are validation and test images of the digits, or the test images of a folder. A stream without a shift is
a shuffle of clean images, of which the first are the calibration; a tenth as many are sorted by class. Each corruption
is 12 streams, with other shuffles and calibrations: from the first sample on, and after clean images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_tta.data import ShiftedDataModule
from lightning_tta.evidence.betting import ShiftTest
from lightning_tta.evidence.drift import LabelDriftTest
from lightning_tta.losses import entropy
from lightning_tta.modules.loading import load_source
from plumbing import arguments, digits_or_folder, header, positions_of, row

Answers = tuple[Tensor, Tensor, list[int]]
"""Logits (N, K), float64, labels (N,), and where the images stand among all test images; -1: they are none."""
FORMS: dict[str, dict[str, Any]] = {
    "conformal, mixture (default)": {"ranks": "conformal", "bets": "mixture"},
    "conformal, SF-OGD": {"ranks": "conformal", "bets": "sf_ogd"},
    "margin, mixture": {"ranks": "margin", "bets": "mixture"},
    "margin, SF-OGD": {"ranks": "margin", "bets": "sf_ogd"},
    "fixed, mixture": {"ranks": "fixed", "bets": "mixture"},
    "fixed, SF-OGD (the paper's)": {"ranks": "fixed", "bets": "sf_ogd"},
}
SHOWN = ["conformal, mixture (default)", "margin, mixture", "fixed, SF-OGD (the paper's)"]


def answers(net: torch.nn.Module, data: ShiftedDataModule) -> dict[str, Answers]:
    """What the net says of all images of a stream whose batches are of one domain each, by domain."""
    parts: dict[str, list[Answers]] = {}
    for batch in data.predict_dataloader():
        name = data.domain_names[int(batch["domain"][0])]
        logits = net(batch["image"]).double()
        parts.setdefault(name, []).append((logits, torch.as_tensor(batch["label"]), positions_of(data, batch)))
    return {
        name: (torch.cat([p[0] for p in rows]), torch.cat([p[1] for p in rows]), [i for p in rows for i in p[2]])
        for name, rows in parts.items()
    }


def first_alarm(test: Any, values: Tensor, step: int = 10) -> int | None:
    """After how many samples, in steps, the test has alarmed; ``None``: not at all."""
    for start in range(0, len(values), step):
        test.see(values[start : start + step])
        if test.alarmed:
            return min(start + step, len(values))
    return None


def usual(numbers: list[int | None]) -> str:
    """Median and largest; an alarm that did not come is larger than all."""
    filled = [float("inf") if number is None else number for number in numbers]
    texts = ["never" if value == float("inf") else f"{value:.0f}" for value in (median(filled), max(filled))]
    return f"{texts[0]} ({texts[1]})"


def false_alarms(
    pool: Answers, calibration: int, streams: int, alphas: list[float], order: str, forms: list[str]
) -> None:
    """A table of the share of clean streams with an alarm, in percent, by form and alpha."""
    logits, labels, _ = pool
    entropies, predictions, classes = entropy(logits), logits.argmax(1), logits.shape[1]
    counts = {name: dict.fromkeys(alphas, 0) for name in [*forms, "label drift"]}
    for seed in range(streams):
        shuffle = torch.randperm(len(entropies), generator=torch.Generator().manual_seed(seed))
        first, rest = shuffle[:calibration], shuffle[calibration:]
        if order == "sorted by class":
            rest = rest[labels[rest].argsort(stable=True)]
        for name in forms:
            form = FORMS[name]
            same = None if form["ranks"] == "margin" else ShiftTest(entropies[first], 0.05, seed=seed, **form)
            if same is not None:
                same.see(entropies[rest])
            for alpha in alphas:
                if same is None:
                    test = ShiftTest(entropies[first], alpha, seed=seed, **form)
                    test.see(entropies[rest])
                    counts[name][alpha] += test.alarmed
                else:  # alpha is in the threshold alone
                    counts[name][alpha] += same.bettor.largest >= torch.tensor(1 / alpha).log()
        drift = LabelDriftTest(predictions[first], classes, 0.05, seed=seed)
        drift.see(predictions[rest])
        for alpha in alphas:
            counts["label drift"][alpha] += drift.largest >= torch.tensor(1 / alpha).log()
    length = len(entropies) - calibration
    print(f"\n{streams} clean streams of {length} samples, {order}; calibration {calibration}: streams with alarm, %\n")
    header("", *(f"alpha {alpha:g}" for alpha in alphas))
    for name, alarms in counts.items():
        row(name, *(f"{100 * int(alarms[alpha]) / streams:.1f}" for alpha in alphas))


def delays(pool: Answers, shifted: dict[str, Answers], calibration: int, before: int, streams: int) -> None:
    """A table of the shifted samples until the alarm at alpha 0.05, median and largest, beside the accuracy lost."""
    logits, labels, places = pool
    accuracy = 100 * (logits.argmax(1) == labels).double().mean()
    shown: dict[str, Callable[[Tensor, int], Any]] = {
        name: lambda values, seed, form=FORMS[name]: ShiftTest(values, 0.05, seed=seed, **form) for name in SHOWN
    }
    print(f"\nShifted samples until the alarm, alpha 0.05, calibration {calibration}: median (largest) of {streams}\n")
    columns = [f"{name}{text}" for name in [*SHOWN, "label drift"] for text in ("", f", after {before} clean")]
    header("", "accuracy lost", "mean rank", *columns)
    for name, (others, truth, used) in shifted.items():
        if name == "clean":
            continue
        taken = set(used)
        free = torch.tensor([position for position, each in enumerate(places) if each not in taken])
        if len(free) < calibration + before:
            free = torch.arange(len(places))  # the same images, with and without the corruption: few that there are
        numbers: dict[str, list[int | None]] = {column: [] for column in columns}
        ranks = []
        for seed in range(streams):
            generator = torch.Generator().manual_seed(seed)
            clean = free[torch.randperm(len(free), generator=generator)][: calibration + before]
            order = torch.randperm(len(others), generator=generator)
            values, after = entropy(logits[clean]), entropy(others[order])
            for form, make in shown.items():
                for text, length in (("", 0), (f", after {before} clean", before)):
                    test = make(values[:calibration], seed)
                    test.see(values[calibration : calibration + length])
                    numbers[form + text].append(0 if test.alarmed else first_alarm(test, after))
            ranks.append(float(ShiftTest(values[:calibration]).cdf.ranks(after).mean()))
            classes, predicted = logits.shape[1], logits[clean].argmax(1)
            for text, length in (("", 0), (f", after {before} clean", before)):
                drift = LabelDriftTest(predicted[:calibration], classes, seed=seed)
                drift.see(predicted[calibration : calibration + length])
                numbers["label drift" + text].append(
                    0 if drift.alarmed else first_alarm(drift, others[order].argmax(1))
                )
        lost = accuracy - 100 * (others.argmax(1) == truth).double().mean()
        row(name, f"{lost:.1f}", f"{sum(ranks) / len(ranks):.3f}", *(usual(numbers[column]) for column in columns))


def speed(pool: Answers, calibration: int, batch: int = 200, rounds: int = 30) -> None:
    """A table of the time of a monitor on a batch, in microseconds, median."""
    logits = pool[0]
    print(f"\nMicroseconds a batch of {batch}, median of {rounds}\n")
    header("", "microseconds")
    tests: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
        name: (ShiftTest(entropy(logits[:calibration]), **form), entropy) for name, form in FORMS.items()
    }
    drift = LabelDriftTest(logits[:calibration].argmax(1), logits.shape[1])
    for name, (test, measure) in {**tests, "label drift": (drift, lambda each: each.argmax(1))}.items():
        times = []
        for number in range(rounds):
            some = logits[torch.arange(number * batch, (number + 1) * batch) % len(logits)]
            start = time.perf_counter()
            test.see(measure(some))
            times.append(time.perf_counter() - start)
        row(name, f"{1e6 * median(times):.0f}")


@torch.no_grad()
def main(args: list[str] | None = None) -> None:
    """Print the tables."""
    options = arguments(
        __doc__,
        args,
        source_ckpt=str,
        net="",
        root="",
        images=(0, "of each corruption; 0: all digits, 2000 of a folder"),
        clean=(0, "clean images; 0: all"),
        calibration=(0, "0: half of the clean digits, 2000 of a folder"),
        before=(0, "clean samples before the shift; 0: as many as the calibration"),
        streams=(200, "clean streams"),
        forms=(list(FORMS), "by name; by default all"),
        repeats=(12, "streams of a corruption"),
        domains=["reported", "held_out"],
        logits=("", "file to keep the net's answers in"),
    )
    path = Path(options.logits) if options.logits else None
    if path is not None and path.exists():
        pool, shifted = torch.load(path)
    else:
        net = load_source(options.source_ckpt, options.net or None, 10 if options.net else None).eval()
        both = {"batch_size": 200, "num_workers": 0, "stream": "iid"}
        clean = {"num_images": options.clean or None, "domains": ["clean"]}
        data = digits_or_folder(options.root, clean, clean, **both)
        pool = answers(net, data)["clean"]
        if not options.root:  # the net has not been trained on the validation images either
            for batch in data.val_dataloader():
                more = net(batch["image"]).double(), torch.as_tensor(batch["label"]), [-1] * len(batch["label"])
                pool = torch.cat([pool[0], more[0]]), torch.cat([pool[1], more[1]]), pool[2] + more[2]
        some = {"domains": options.domains}
        data = digits_or_folder(
            options.root,
            {**some, "num_images": options.images or None},
            {**some, "num_images": options.images or 2000},
            **both,
        )
        shifted = answers(net, data)
        if path is not None:
            torch.save((pool, shifted), path)
    calibration = options.calibration or (2000 if options.root else len(pool[1]) // 2)
    before = options.before or min(calibration, len(pool[1]) - calibration)
    print(f"Clean images {len(pool[1])}, accuracy {100 * (pool[0].argmax(1) == pool[1]).double().mean():.1f} %")
    alphas = [0.01, 0.05, 0.1, 0.2]
    false_alarms(pool, calibration, options.streams, alphas, "shuffled", options.forms)
    false_alarms(pool, calibration, max(1, options.streams // 10), alphas, "sorted by class", options.forms)
    delays(pool, shifted, calibration, before, options.repeats)
    speed(pool, calibration)


if __name__ == "__main__":
    main()
