"""What evidence before adaptation saves and costs: poem, and a gate before other methods, beside the source.

    python tests/measure/protected.py --source-ckpt runs/digits/source_gn
    python tests/measure/protected.py --root ROOT --source-ckpt resnet26_gn.safetensors --net cifar/resnet26_gn

Error in percent on shuffled streams, reset at each domain: clean held-out images, and corruptions. The calibration is
other clean images: the validation images of the digits, or test images of a folder that are in no stream. Of a gated
method also the share of batches that it adapted on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tta import adapt
from lightning_tta.modules.loading import load_source
from plumbing import arguments, digits_or_folder, header, row

DIGITS = ["gaussian_noise", "defocus_blur", "haze", "contrast", "pixelate", "jpeg"]
FOLDER = ["gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate", "jpeg_compression"]
RATES = {"digits": {"lr": 2e-2, "optimizer": "sgd"}, "folder": {}}  # of configs/digits/benchmark.yaml


def gather(data: Any) -> dict[str, tuple[Tensor, Tensor, list[str]]]:
    """Images, labels and what the data call the images, by domain, in the stream's order."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for batch in data.predict_dataloader():
        parts.setdefault(data.domain_names[int(batch["domain"][0])], []).append(batch)
    return {
        name: (
            torch.cat([batch["image"] for batch in batches]),
            torch.cat([torch.as_tensor(batch["label"]) for batch in batches]),
            [str(int(index)) for batch in batches for index in batch["index"]],
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
    kind = "folder" if options.root else "digits"
    both = {"batch_size": options.batch, "num_workers": 0, "stream": "iid"}
    size = options.images or (1000 if options.root else None)
    named = {"domains": options.domains or (FOLDER if options.root else DIGITS), "num_images": size}
    streams = gather(digits_or_folder(options.root, named, named, **both))
    number = options.clean or (4000 if options.root else None)
    clean = {"domains": ["clean"], "num_images": number}
    streams = {**gather(digits_or_folder(options.root, clean, clean, **both)), **streams}
    if options.root:
        every = {"domains": ["clean"], "num_images": None}
        images, _, names = gather(digits_or_folder(options.root, every, every, **both))["clean"]
        used = {name for _, _, indices in streams.values() for name in indices}
        calibration = images[[position for position, name in enumerate(names) if name not in used]]
    else:
        data = digits_or_folder("", named, named, **both)
        calibration = torch.cat([batch["image"] for batch in data.val_dataloader()])
    source = [{"image": part} for part in calibration[: options.calibration].split(options.batch)]
    print(f"Calibration {sum(len(part['image']) for part in source)}, batches of {options.batch}\n")
    header("", *(f"{name} ({len(labels)})" for name, (_, labels, _) in streams.items()))
    errors: dict[str, dict[str, float]] = {}
    for word in options.methods:
        name, _, gate = word.partition("+")
        settings = {"gate": "poem"} if gate else {}
        if name not in ("source", "poem"):
            settings |= RATES[kind]
        net = load_source(options.source_ckpt, options.net or None, 10 if options.net else None).eval()
        method = adapt(net, name, in_place=True, **settings)
        if not method.prepared:
            method.prepare(source)
        cells, errors[word] = [], {}
        for domain, (images, labels, _) in streams.items():
            method.reset()
            wrong, opened = 0, []
            for part, truth in zip(images.split(options.batch), labels.split(options.batch), strict=True):
                wrong += int((method(part).argmax(1) != truth).sum())
                opened.append(method.stats.get("gate_open", 1.0))
            errors[word][domain] = 100 * wrong / len(labels)
            share = f" ({100 * sum(opened) / len(opened):.0f} %)" if gate else ""
            cells.append(f"{errors[word][domain]:.1f}{share}")
        row(word, *cells)
    return errors


if __name__ == "__main__":
    main()
