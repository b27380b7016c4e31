"""Runs every claim of ``lightning-tta reproduce`` on files in the published layouts that this script writes.

A tiny net without trained weights, few images and one seed stand for the real ones: the numbers mean nothing. What is
shown is that each row runs, and that a run on real files differs by their presence only. For each claim: cells that
ran, figures that stand beside ours, cells without a result and why, seconds.

    python tests/measure/reproduce.py --claims zerosiam,meta_ttt --images 8
"""

import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import plumbing  # tests/ is importable now
import published
from lightning_tta.cli.main import main as command
from lightning_tta.reproduce.claims import load, names

FIFTEEN = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SHORT = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 1, "trainer.limit_val_batches": 1}


def write_all(root: Path, images: int) -> None:
    """All data sets."""
    published.cifar10_c(root, FIFTEEN, images)
    published.cifar10(root, setattr, images=1100)  # of which 5,000 are for validation
    published.cifar10_1(root)
    published.imagenet(root)
    published.imagenet_c(root, FIFTEEN)
    published.imagenet_a(root)
    published.imagenet_v2(root)
    published.pacs(root)
    published.office_home(root)


def run(name: str, root: Path, output: Path, net: str, images: int, more: list[str]) -> list[str]:
    """Run one claim; a row of the table."""
    start = time.perf_counter()
    failed = ""
    given = {"root": root, "output": output, "net": net, "images": images, "workers": 0, "seeds": 1}
    given |= {"trainer": "{accelerator: cpu}", "training": json.dumps(SHORT)}
    try:
        command(["reproduce", name, *(f"--{option}={value}" for option, value in given.items()), *more])
    except SystemExit as error:
        failed = f" (ended with {error.code})"
    result = json.loads((output / name / "reproduce.json").read_text())
    cells = sum(len(part["cells"]) for part in result["parts"].values())
    reasons = Counter(entry["reason"][:60] for part in result["parts"].values() for entry in part["skipped"])
    compared = [each for part in result["parts"].values() for each in part["comparisons"]]
    ran = sum(each["ours"] is not None for each in compared)
    assert not result["reproduction"], "a run with another net and few images must say so"
    seconds = f"{time.perf_counter() - start:.0f}"
    left_out = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "-"
    return [name, str(len(result["parts"])), str(cells), f"{ran} of {len(compared)}", left_out + failed, seconds]


def main(args: list[str] | None = None) -> None:
    """Run the claims and print the table."""
    options = plumbing.arguments(
        __doc__,
        args,
        claims=("", "names, separated by commas; by default all"),
        net=("timm/test_resnet", "the net in place of all nets"),
        images=(8, "images of each domain"),
        rows=("", "rows, as --rows of the command"),
        folder=("", "where files and results go; by default a temporary folder"),
    )
    more = [f"--rows={options.rows}"] if options.rows else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        write_all(folder / "data", options.images)
        wanted = options.claims.split(",") if options.claims else names()
        rows = [run(load(n).name, folder / "data", folder / "runs", options.net, options.images, more) for n in wanted]
    plumbing.header("claim", "parts", "cells", "figures with ours", "cells without a result", "seconds")
    for row in rows:
        plumbing.row(*row)


if __name__ == "__main__":
    main()
