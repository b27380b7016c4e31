"""What evidence before adaptation saves and costs: poem, and a gate before other methods, beside the source.

    python tests/measure/protected.py --source-ckpt runs/digits/source_gn
    python tests/measure/protected.py --root ROOT --source-ckpt resnet26_gn.safetensors --net cifar/resnet26_gn

Error in percent on shuffled streams, reset at each domain: clean held-out images, and corruptions. The calibration is
other clean images: the validation images of the digits, or test images of a folder that are in no stream. Of a gated
method also the share of batches that it adapted on. Then one stream of clean images, the last corruption, clean images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tta import adapt
from lightning_tta.modules.loading import load_source
from plumbing import arguments, digits_or_folder, header, positions_of, row

DIGITS = ["gaussian_noise", "defocus_blur", "haze", "contrast", "pixelate", "jpeg"]
FOLDER = ["gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate", "jpeg_compression"]
RATES: dict[str, dict[str, Any]] = {
    "digits": {"lr": 2e-2, "optimizer": "sgd"},
    "folder": {},
}  # of configs/digits/benchmark.yaml


def gather(data: Any) -> dict[str, tuple[Tensor, Tensor, list[int]]]:
    """Images, labels and their places among all test images, by domain, in the stream's order."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for batch in data.predict_dataloader():
        parts.setdefault(data.domain_names[int(batch["domain"][0])], []).append(batch)
    return {
        name: (
            torch.cat([batch["image"] for batch in batches]),
            torch.cat([torch.as_tensor(batch["label"]) for batch in batches]),
            [place for batch in batches for place in positions_of(data, batch)],
        )
        for name, batches in parts.items()
    }


def main(args: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print the table; errors by method and domain."""
    options = arguments(
        __doc__,
        args,
        source_ckpt=str,
        net="",
        root="",
        images=(0, "of each corruption; 0: all digits, 1000 of a folder"),
        clean=(0, "clean images; 0: all digits, 4000 of a folder"),
        calibration=(2000, "held-out images, at most"),
        batch=100,
        domains=([], "corruptions; by default six of the reported ones"),
        methods=["source", "tent", "eata", "poem", "tent+gate", "eata+gate"],
    )
    both = {"batch_size": options.batch, "num_workers": 0, "stream": "iid"}
    size = options.images or (1000 if options.root else None)
    named = {"domains": options.domains or (FOLDER if options.root else DIGITS), "num_images": size}
    streams = gather(digits_or_folder(options.root, named, named, **both))
    number = options.clean or (4000 if options.root else None)
    clean = {"domains": ["clean"], "num_images": number}
    streams = {**gather(digits_or_folder(options.root, clean, clean, **both)), **streams}
    if options.root:
        every = {"domains": ["clean"], "num_images": None}
        images, _, places = gather(digits_or_folder(options.root, every, every, **both))["clean"]
        used = {place for _, _, taken in streams.values() for place in taken}
        calibration = images[[position for position, place in enumerate(places) if place not in used]]
    else:
        data = digits_or_folder("", named, named, **both)
        calibration = torch.cat([batch["image"] for batch in data.val_dataloader()])
    source = [{"image": part} for part in calibration[: options.calibration].split(options.batch)]
    print(f"Calibration {sum(len(part['image']) for part in source)}, batches of {options.batch}\n")
    header("", *(f"{name} ({len(labels)})" for name, (_, labels, _) in streams.items()))
    errors: dict[str, dict[str, float]] = {word: {} for word in options.methods}
    for word in options.methods:
        method, cells = make(word, options, source), []
        for domain, (images, labels, _) in streams.items():
            method.reset()
            errors[word][domain], opened = run(method, images, labels, options.batch)
            cells.append(cell(errors[word][domain], opened, word))
        row(word, *cells)
    (clean_images, clean_labels, _), (images, labels, _) = streams["clean"], next(reversed(streams.values()))
    quarter, last = len(clean_labels) // 4, next(reversed(streams))
    parts = {
        f"clean ({quarter})": (clean_images[:quarter], clean_labels[:quarter]),
        f"{last} ({len(labels)})": (images, labels),
        f"clean ({len(clean_labels) - quarter})": (clean_images[quarter:], clean_labels[quarter:]),
    }
    print("\nOne stream of three parts, without a reset\n")
    header("", *parts, "forward passes a batch")
    for word in options.methods:
        method, cells, passes = make(word, options, source), [], []
        for images, labels in parts.values():
            error, opened = run(method, images, labels, options.batch, passes)
            cells.append(cell(error, opened, word))
        row(word, *cells, f"{sum(passes) / len(passes):.2f}")
    return errors


def make(word: str, options: Any, source: list[dict[str, Tensor]]) -> Any:
    """A method by its word, prepared; ``+gate`` behind it: with a gate before it."""
    name, _, gate = word.partition("+")
    settings = {"gate": "poem"} if gate else {}
    if name not in ("source", "poem"):
        settings |= RATES["folder" if options.root else "digits"]
    net = load_source(options.source_ckpt, options.net or None, 10 if options.net else None).eval()
    method = adapt(net, name, in_place=True, **settings)
    if not method.prepared:
        method.prepare(source)
    return method


def run(
    method: Any, images: Tensor, labels: Tensor, batch: int, passes: list[float] | None = None
) -> tuple[float, list[float]]:
    """Error in percent, and for each batch whether a gate was open; ``passes`` gets the forward passes of each."""
    wrong, opened = 0, []
    for part, truth in zip(images.split(batch), labels.split(batch), strict=True):
        wrong += int((method(part).argmax(1) != truth).sum())
        stats = method.stats
        opened.append(stats.get("gate_open", 1.0))
        if passes is not None:
            passes.append(stats["forwards"])
    return 100 * wrong / len(labels), opened


def cell(error: float, opened: list[float], word: str) -> str:
    """The error, with the share of batches that a gate let through."""
    return f"{error:.2f}{f' ({100 * sum(opened) / len(opened):.0f} %)' if '+' in word else ''}"


if __name__ == "__main__":
    main()
